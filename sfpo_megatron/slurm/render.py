"""A run's job script: the templates of launch/slurm/ with the config's values filled in.

Everything the job reads is in RUN/slurm: the script, what it sources, and the config as it was
checked, so that a later edit of either does not change a run that is in the queue.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from sfpo_megatron.config.load import dump_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.replacing import replacing
from sfpo_megatron.planner.nodes import JobLayout, LayoutError

TEMPLATES = Path(__file__).parent / "templates"
"""launch/slurm/ of the sources; the wheel carries it here."""
_SOURCED = ("before_env.sh", "job.sh", "ray_cluster.sh")
_HOLE = re.compile(r"@([A-Z]+(?:_[A-Z]+)*)@")
_PLAIN_PATH = re.compile(r"[\w./+=:,~-]+")
_AS_IT_IS = "surrogateescape"
SIGNAL_MARGIN_S = 60  # Slurm sends --signal up to this much late


@dataclass(kw_only=True, frozen=True, slots=True)
class Job:
    """What the config does not say."""

    script: str
    """`train` or `eval`: which of the templates."""
    nodes: int
    time: str
    """Time limit in sbatch's own form."""
    gpus_per_node: int
    work_dir: Path
    """Directory that relative paths of the config start from."""
    python: str
    """The interpreter on the nodes, unless env.sh names another."""
    save_budget_s: int
    """What a run that is asked to stop may take to save."""
    max_failures: int
    """Failures in a row, without a new checkpoint, before the job gives up."""
    accept_data_change: bool = False
    """The run continues, at every start of the job, on data that has changed."""
    env_file: Path = TEMPLATES / "env.sh"
    more_sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as `--partition=h100`."""


def render(config: RunConfig, job: Job, layout: JobLayout | None) -> dict[str, str]:
    """File name -> text of everything in RUN/slurm. `config.output_dir` is absolute; `layout` is
    None where nothing is trained.

    Raises LayoutError for an output_dir that sbatch would not take as it is.
    """
    run = config.output_dir
    if not _PLAIN_PATH.fullmatch(run):
        raise LayoutError(
            "output_dir",
            repr(run),
            "letters, digits and ./+=:,~-_ only",
            "choose another: sbatch reads other characters in its own way",
        )
    values = {
        "JOB_NAME": f"sfpo-{Path(run).name}",
        "NODES": str(job.nodes),
        "GPUS_PER_NODE": str(job.gpus_per_node),
        "TIME": job.time,
        "SIGNAL_S": str(job.save_budget_s + SIGNAL_MARGIN_S),
        "RUN": run,
        "RUN_DIR": shlex.quote(run),  # bash reads `~` behind a colon too
        "MORE_SBATCH": "\n".join(f"#SBATCH {option}" for option in job.more_sbatch),
        "WORK_DIR": shlex.quote(str(job.work_dir)),
        "PYTHON": shlex.quote(job.python),
        "SAVE_BUDGET_S": str(job.save_budget_s),
        "MAX_FAILURES": str(job.max_failures),
        "TRAIN_OPTIONS": " --accept-data-change" if job.accept_data_change else "",
    }
    if layout is not None:
        values["TRAIN_NODES"] = str(layout.train_nodes)
        values["RANKS_PER_NODE"] = str(layout.ranks_per_node)
    script = f"{job.script}.sbatch"
    template = (TEMPLATES / script).read_text(encoding="utf-8")
    return {
        script: _HOLE.sub(lambda hole: values[hole[1]], template).replace("\n\n\n", "\n\n"),
        **{name: (TEMPLATES / name).read_text(encoding="utf-8") for name in _SOURCED},
        # Byte by byte, for a shell asks for no encoding: a comment may be in another.
        "env.sh": job.env_file.read_text(encoding="utf-8", errors=_AS_IT_IS),
        "config.yaml": dump_config(config),
    }


def write(folder: Path, files: dict[str, str]) -> None:
    """Each file whole or not at all; the scripts can be run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with replacing(folder / name) as aside:
            aside.write_text(text, encoding="utf-8", errors=_AS_IT_IS)
            if name.endswith((".sh", ".sbatch")):
                aside.chmod(0o755)
