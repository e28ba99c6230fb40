"""What `--sbatch` may add to a job script, behind its own options: no other job than ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_OWN = "nothing: the script starts its steps for one task a node"
_ARRAY = "nothing: the jobs of an array would all write one output_dir"
_SET = {
    "nodes": "--nodes",
    "N": "--nodes",
    "time": "--time",
    "t": "--time",
    "gpus-per-node": "--gpus-per-node",
    "signal": "--save-budget",
    **dict.fromkeys(("array", "a"), _ARRAY),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), _OWN),
}
"""Name of an option of sbatch that our own decide -> what is set in its place."""
_GPUS = "--gpus-per-node"
_OF_A_KIND = re.compile(rf"{_GPUS}=[A-Za-z][\w.-]*:(?P<num>\d+)", re.ASCII)
"""The same option as the script's, which is before it: sbatch takes the last."""
_GRES_OF_A_KIND = re.compile(r"--gres=(?:.*,)?gpu:(?P<kind>[A-Za-z][^,:]*).*")
_OPTION = re.compile(r"--(?P<long>[a-z][a-z-]*)(=.*)?|-(?P<short>[A-Za-z]).*", re.S)


def check_more(options: Sequence[str], *, gpus_per_node: int) -> None:
    """Raise ValueError for what is no option of sbatch, and for one that would make the job another
    than what was laid out, of `gpus_per_node`. Each becomes a line: another line in it would be a
    command of the job.
    """
    for option in options:
        try:
            words = shlex.split(option or "")  # argparse makes a list of `--sbatch=--`
        except ValueError:  # a quote that nothing closes
            words = []
        if not words or not _OPTION.fullmatch(words[0]) or len(option.splitlines()) > 1:
            raise ValueError(
                f"found {option!r}, expected one option of sbatch in one line; write it as "
                "--sbatch=--partition=h100, and repeat --sbatch for the next one"
            )
        for match in filter(None, map(_OPTION.fullmatch, words)):
            if gres := _GRES_OF_A_KIND.fullmatch(match[0]):
                raise ValueError(
                    f"found {match[0]!r}, expected GPUs of a kind by the option that the script "
                    "has: sbatch takes none with and without one; write "
                    f"--sbatch={_GPUS}={gres['kind']}:{gpus_per_node}"
                )
            kind = _OF_A_KIND.fullmatch(match[0])
            if kind is not None and int(kind["num"]) == gpus_per_node:
                continue
            if ours := _SET.get(match["long"] or match["short"]):
                raise ValueError(
                    f"found {match[0]!r}, expected an option that the job does not set itself; "
                    f"remove it and set {ours}"
                )
