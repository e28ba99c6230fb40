"""`--sbatch`: what would make the job another than what was laid out, or be no option at all.

Not exercised: what sbatch itself makes of the others (tests/slurm/).
"""

from __future__ import annotations

import re

import pytest

from sfpo_megatron.slurm.more_options import check_more


@pytest.mark.parametrize(
    ("option", "found", "instead"),
    [
        ("--nodes=4", "--nodes=4", "set --nodes"),
        ("--nodes 4", "--nodes", "set --nodes"),
        ("-N4", "-N4", "set --nodes"),
        ("--partition=h100 -t 10", "-t", "set --time"),
        ("--gpus-per-node=h100:4", "--gpus-per-node=h100:4", "set --gpus-per-node"),
        ("--gpus-per-node=8", "--gpus-per-node=8", "set --gpus-per-node"),
        ("--gres=gpu:h100:8", "--gres=gpu:h100:8", "write --sbatch=--gpus-per-node=h100:8"),
        (
            "--gres=nvme:1,gpu:h100",
            "--gres=nvme:1,gpu:h100",
            "write --sbatch=--gpus-per-node=h100:8",
        ),
        ("--signal=USR1@9", "--signal=USR1@9", "set --save-budget"),
        ("--array=0-3", "--array=0-3", "would all write one output_dir"),
        ("--ntasks-per-node=8", "--ntasks-per-node=8", "one task a node"),
        ("-n8", "-n8", "one task a node"),
    ],
)
def test_what_the_job_sets_itself(option: str, found: str, instead: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {found!r}, expected ")) as caught:
        check_more(["--qos=high", option], gpus_per_node=8)
    assert instead in str(caught.value)


@pytest.mark.parametrize("option", ["", "--", "-", "--=4", "h100", "--comment='a", "-p x\nrm y"])
def test_what_is_no_option(option: str) -> None:
    with pytest.raises(ValueError, match="expected one option of sbatch in one line"):
        check_more([option], gpus_per_node=8)


def test_what_is_the_users() -> None:
    check_more(
        [
            *("--partition=h100", "-p h100", "-A me", "--account me", "--qos=high", "-x node-1"),
            *("--constraint='a&b'", "--comment='no -N 4 here'", "--mail-type=END,FAIL", "-H"),
            *(
                "--gres=gpu:8",
                "--gres=nvme:1",
                "--gpus-per-node=h100:8",
                "--exclude=n[1-2]",
                "--no-requeue",
                "--dependency=afterok:1",
                "-d x",
            ),
        ],
        gpus_per_node=8,
    )
