"""TRL's GRPOTrainer on a case, in a venv of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.common import provenance
from benchmarks.versus.cases import Case, Material, Step

REQUIREMENTS = provenance.ROOT / "requirements/trl.txt"
SIDE = "benchmarks.versus.trl_side"
_MADE_OF = "made-of.txt"


@dataclass(kw_only=True, frozen=True, slots=True)
class Layout:
    """How TRL shares two cores."""

    name: str
    num_processes: int
    num_threads: int


LAYOUTS = (
    Layout(name="2 processes", num_processes=2, num_threads=1),
    Layout(name="1 process of 2 threads", num_processes=1, num_threads=2),
)


def python_of(folder: Path) -> Path:
    """The interpreter of a venv with TRL, made in `folder` if it is not there. What this project's
    own venv has (torch, transformers) it takes from there: the same builds, and no gigabytes."""
    python, marker = folder / "bin/python", folder / _MADE_OF
    wanted = REQUIREMENTS.read_text(encoding="utf-8") + sys.prefix
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(folder, with_pip=True, clear=(folder / "pyvenv.cfg").exists())
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.check_output(ask, text=True).strip())
    # Behind its own packages, whose versions count.
    (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
    marker.write_text(wanted, encoding="utf-8")
    return python


def versions(python: Path) -> dict[str, str]:
    """What a run of TRL is made of."""
    code = (
        "import json; from importlib.metadata import version as v; "
        "print(json.dumps({n: v(n) for n in ('trl', 'transformers', 'accelerate', 'torch')}))"
    )
    return json.loads(subprocess.check_output([str(python), "-c", code], text=True))


def run(
    python: Path, layout: Layout, case: Case, material: Material, num_steps: int, lr: float,
    log: Path, *, seed: int = 0,
) -> list[Step]:  # fmt: skip
    """All train steps of a run but the first."""
    out = log.with_suffix("")
    out.mkdir()
    settings = {
        "model": str(material.model),
        "rows": str(material.rows),
        "out": str(out),
        "reward": case.task.reward,
        "num_rollouts": case.num_rollouts,
        "group_size": case.group_size,
        "minibatches": case.minibatches,
        "sweeps": case.sweeps,
        "max_response_tokens": case.task.max_response_tokens,
        "lr": lr,
        "num_steps": num_steps,
        "seed": seed,
    }
    command = [
        *(str(python), "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={layout.num_processes}", "-m", SIDE, json.dumps(settings)),
    ]
    variables = os.environ | {
        "PYTHONPATH": str(provenance.ROOT),
        "OMP_NUM_THREADS": str(layout.num_threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=provenance.ROOT, env=variables, stdout=output, stderr=output
        )
    if done.returncode:
        raise RuntimeError(f"TRL ended with {done.returncode}:\n{log.read_text()[-4000:]}")
    ranks = [json.loads(file.read_text()) for file in sorted(out.glob("rank-*.json"))]
    return [_step(of_ranks) for of_ranks in zip(*ranks, strict=True)][1:]


def _step(of_ranks: tuple[dict[str, float], ...]) -> Step:
    """Times are rank 0's: the ranks wait for one another in every optimizer step."""
    first = of_ranks[0]
    return Step(
        seconds=first["seconds"],
        rollouts_s=first["rollouts_s"],
        passes_s=first["seconds"] - first["rollouts_s"],
        response_tokens=fmean(one["response_tokens"] for one in of_ranks),
        accuracy=fmean(one["accuracy"] for one in of_ranks),
    )
