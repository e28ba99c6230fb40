"""The other jobs, and the preflight where it has something to say. `make test-full`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jobs
import pytest
from lab import SlurmLab

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


def test_evaluation_job(lab: SlurmLab, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = jobs.write_config(tmp_path, model, eval={"n": 8}, rollout={"num_engines": 1})
    job = jobs.submit(lab, config, job="eval")
    lab.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=120)
    assert lab.state(job) == "COMPLETED", jobs.output(run, job)
    (line,) = [json.loads(x) for x in (run / "eval.jsonl").read_text().splitlines()]
    assert line["model"] == str(model)
    assert line["eval/num_rollouts"] == 8 and 0 <= line["eval/accuracy"] <= 1
    assert not jobs.left_after(lab, job, 10)


def test_converter_job(lab: SlurmLab, tmp_path: Path) -> None:
    """Any of tools/, by the script as it lies in launch/slurm; from inside an allocation."""
    out = tmp_path / "model"
    job = lab.run(
        "sbatch", "--parsable", f"--output={tmp_path}/%j.out",
        f"--export=ALL,SFPO_PYTHON={sys.executable}", "--mem=4G",
        str(ROOT / "launch/slurm/convert.sbatch"), "tools/make_tiny_model.py",
        "--out", str(out), "--config", "tests/made/aiw.yaml", cwd=ROOT,
        env=lab.env | {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_PER_TASK": "2"},
    ).stdout.strip()  # fmt: skip
    lab.wait_for_state(job, "COMPLETED", "FAILED", timeout_s=60)
    assert lab.state(job) == "COMPLETED", (tmp_path / f"{job}.out").read_text()
    assert (out / "config.json").exists()


def test_a_job_on_nodes_that_show_too_few_gpus(lab: SlurmLab, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = jobs.submit(lab, jobs.write_config(tmp_path, model), env="SFPO_EXPECT_GPUS=8\n")
    lab.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=30)
    text = jobs.output(run, job)
    assert lab.state(job) == "FAILED" and lab.job(job)["Restarts"] == "0", text
    for node in ("node1", "node2"):
        assert f"preflight: {node}: found 0 GPUs, expected 8; leave it out with sbatch" in text
    assert not list((run / "slurm/logs").rglob("ray-*")), text


def test_a_job_on_slow_nodes(lab: SlurmLab, model: Path, tmp_path: Path) -> None:
    """All-reduce over gloo, two ranks a node, with a limit that loopback meets inside the nodes and
    misses between them."""
    run = tmp_path / "run"
    limits = "SFPO_PREFLIGHT_RANKS=2\nSFPO_MIN_GB_S_IN_NODE=0.0001\n"
    limits += "SFPO_MIN_GB_S_BETWEEN_NODES=1e9\n"
    job = jobs.submit(lab, jobs.write_config(tmp_path, model), env=limits)
    lab.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=90)
    text = jobs.output(run, job)
    assert lab.state(job) == "FAILED" and lab.job(job)["Restarts"] == "0", text
    for node in ("node1", "node2"):
        assert f"preflight: {node}: found" in text
    assert "in an all-reduce with its neighbours, expected 1e+09 or more" in text
    assert "in an all-reduce of its GPUs" not in text
    assert not list((run / "slurm/logs").rglob("ray-*")), text
