"""Every environment variable that this project sets, by the role of the process that has it.

`TABLE` has those whose value is fixed. `COMPUTED` names those whose value is found out, and where.
What users may set is in neither, but that a value of theirs stays (`yields`). docs/processes.md has
both; tests/unit/test_variables.py holds the package and launch/slurm/ to them. Standard library.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeAlias

Role: TypeAlias = Literal["launcher", "rank", "controller", "engine", "scorer", "job"]
"""`rank`: a trainer rank, and who starts engines alone (`eval`). `job`: Slurm's job script."""
When: TypeAlias = Literal[
    "always", "cpu", "gpu", "one machine", "huge pages", "starts Ray", "starts a Ray of its own",
    "ordered kernels", "first start", "restart", "ipc", "Ray's part",
]  # fmt: skip
"""What has to be so of the process or its run."""
_ACTORS: tuple[Role, ...] = ("controller", "engine")


class Variable(NamedTuple):
    """One variable in one value."""

    roles: tuple[Role, ...]
    name: str
    """A pattern where it is removed."""
    value: str | None
    """None: removed."""
    why: str
    when: When = "always"
    yields: bool = False
    """What the user has set stays."""


class Computed(NamedTuple):
    """One variable whose value is found out."""

    roles: tuple[Role, ...]
    name: str
    what: str
    file: str
    """The file that sets it."""


_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_*", "PET_*", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
)


_THREADS = "with more threads, and any other busy process, a run is 10x slower"
_NICE = "Ray's own 15 starves engines and controller beside trainer ranks, where cores are few"
TABLE: tuple[Variable, ...] = (
    Variable(("launcher", "job"), "OMP_NUM_THREADS", "1", _THREADS, yields=True),
    Variable((*_ACTORS, "scorer"), "OMP_NUM_THREADS", "1", _THREADS),
    Variable(("scorer",), "OPENBLAS_NUM_THREADS", "1", _THREADS),
    Variable(("scorer",), "MKL_NUM_THREADS", "1", _THREADS),
    Variable(
        ("launcher",), "GLOO_SOCKET_IFNAME", "lo",
        "our launcher never leaves the machine, nor do its engines", "one machine", yields=True,
    ),
    # malloc gives such blocks back to the kernel at each free: every embedding gradient is faulted
    # in anew, 4 KiB at a time.
    Variable(
        ("launcher",), "THP_MEM_ALLOC_ENABLE", "1",
        "torch asks for huge pages from 2 MiB on", "huge pages", yields=True,
    ),
    # megatron/core/tensor_parallel/layers.py relies on it: a collective first, then the GEMM.
    Variable(
        ("rank",), "CUDA_DEVICE_MAX_CONNECTIONS", "1",
        "kernels start in the order they are queued in, so that collectives of tensor and context "
        "parallelism overlap with GEMMs", "ordered kernels", yields=True,
    ),
    Variable(
        ("rank",), "CUDA_DEVICE_MAX_CONNECTIONS", "1",
        "Megatron asks for it with sequence parallelism", "cpu", yields=True,
    ),
    Variable(
        _ACTORS, "CUDA_DEVICE_MAX_CONNECTIONS", None,
        "the trainer's alone: an engine's streams overlap freely",
    ),
    Variable(
        ("rank",), "RAY_USAGE_STATS_ENABLED", "0", "no call home", "starts Ray", yields=True
    ),
    Variable(("job",), "RAY_USAGE_STATS_ENABLED", "0", "no call home"),
    Variable(("rank",), "RAY_worker_niceness", "0", _NICE, "starts Ray", yields=True),
    Variable(("job",), "RAY_worker_niceness", "0", _NICE, "Ray's part", yields=True),
    Variable(
        ("rank",), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0",
        "Ray leaves CUDA_VISIBLE_DEVICES to actors that ask it for no GPU", "starts Ray",
        yields=True,
    ),
    Variable(
        ("rank",), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0",
        "its servers listen on loopback only", "starts a Ray of its own", yields=True,
    ),
    Variable(
        ("job",), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0",
        "who has started the engines ends them", "Ray's part",
    ),
    # With RANK and MASTER_PORT vLLM would join the trainer's process group.
    *(
        Variable(_ACTORS, name, None, "torchrun's, inherited from trainer rank 0")
        for name in _TORCHRUN
    ),
    Variable(_ACTORS, "VLLM_CPU_OMP_THREADS_BIND", "nobind", "engines share cores with ranks"),
    Variable(
        _ACTORS, "VLLM_CPU_KVCACHE_SPACE", "1",
        "GiB for keys and values on CPU, where `rollout.engine_args` has no "
        "`kv_cache_memory_bytes`", yields=True,
    ),
    # AsyncLLM's EngineCore is a process of its own whatever this says; on CPU it means just that.
    Variable(
        _ACTORS, "VLLM_ENABLE_V1_MULTIPROCESSING", "0",
        "with tensor_parallel 1 the worker lives in EngineCore's process",
    ),
    # It gives workers 5 s to end and EngineCore 5 s in all, then kills it.
    Variable(
        _ACTORS, "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1",
        "EngineCore has time left to unlink its ring buffers (160 MiB of shared memory)",
    ),
    Variable(
        ("engine",), "VLLM_LOGGING_LEVEL", "INFO",
        "its log has the backends that vLLM chose, the KV cache's size, what it fell back to",
        "first start", yields=True,
    ),
    Variable(
        ("engine",), "VLLM_LOGGING_LEVEL", "ERROR", "it has been said", "restart", yields=True
    ),
    Variable((*_ACTORS, "job"), "VLLM_NO_USAGE_STATS", "1", "no call home"),
    Variable(_ACTORS, "VLLM_HOST_IP", "127.0.0.1", "an engine stays on one machine"),
    Variable(
        _ACTORS, "VLLM_WORKER_MULTIPROC_METHOD", "spawn",
        "a forked EngineCore would inherit Ray's threads and locks, and our lifeline's pipe",
    ),
    Variable(
        ("engine",), "VLLM_ALLOW_INSECURE_SERIALIZATION", "1",
        "a handle of device memory has classes in it, which vLLM hands to its own processes by "
        "pickle only", "ipc",
    ),
    Variable(_ACTORS, "HF_HUB_OFFLINE", "1", "the trainer has fetched what there is"),
    Variable(_ACTORS, "TRANSFORMERS_OFFLINE", "1", "the trainer has fetched what there is"),
    Variable(_ACTORS, "TOKENIZERS_PARALLELISM", "false", "its threads do not bear a fork"),
    # Each process of an engine imports 4000 modules.
    Variable(
        _ACTORS, "PYTHONDONTWRITEBYTECODE", "", "byte code: 4 s of import instead of 24 s of CPU"
    ),
    Variable(
        _ACTORS, "TORCH_COMPILE_DISABLE", "1",
        "even eager vLLM compiles a helper of its sampler, which takes a C++ compiler", "cpu",
    ),
    # glibc maps again what vLLM allocates and frees of every layer. Huge pages are few, and nothing
    # is kept for the next.
    Variable(
        _ACTORS, "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1",
        "a third of a refit were page faults", "cpu",
    ),
)  # fmt: skip

COMPUTED: tuple[Computed, ...] = (
    Computed(
        ("engine",), "CUDA_VISIBLE_DEVICES", "the devices of its place, as the run names them",
        "rollout/cluster.py",
    ),
    Computed(
        ("job",), "CUDA_VISIBLE_DEVICES", "for Ray: the devices of a node that no rank has",
        "ray_cluster.sh",
    ),
    Computed(
        ("engine",), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
        "1 where Ray does not choose its devices", "rollout/cluster.py",
    ),
    Computed(
        ("rank", "engine"), "GLOO_SOCKET_IFNAME",
        "the interface towards the run's other machines, unless one is named", "host/addresses.py",
    ),
    Computed(
        ("rank", "engine"), "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "0 while a refit's NCCL group is made: its watchdog would end the process",
        "resharding/streams.py",
    ),
    Computed(
        ("controller",), "SFPO_ROLLOUT_API_KEY",
        "an episode's key of the endpoint, for programs of the verifiers package",
        "rollout/environments/verifiers_play.py",
    ),
    Computed(
        (*_ACTORS, "scorer"), "PYTHONPATH", "what is found here is found there",
        "rollout/cluster.py",
    ),
    Computed(
        ("launcher", "rank", *_ACTORS, "scorer"), "TMPDIR",
        "a folder of the run's own, removed at its end", "host/temporary.py",
    ),
    Computed(
        ("launcher", "rank"), "RAY_TMPDIR", "the same for a Ray of the run's own",
        "host/temporary.py",
    ),
    Computed(
        ("launcher", "rank"), "TORCHINDUCTOR_CACHE_DIR", "where it was before TMPDIR moved",
        "host/temporary.py",
    ),
    Computed(
        _ACTORS, "VLLM_RPC_BASE_PATH", "its sockets are in its own folder", "host/temporary.py"
    ),
    Computed(
        ("launcher", "rank", *_ACTORS), "HOME",
        "a folder that can be written, with LOGNAME and USER",
        "host/home.py",
    ),
    Computed(("job",), "RAY_ADDRESS", "the job's Ray cluster", "train.sbatch"),
    Computed(
        ("job",), "RAY_AUTH_MODE", "token, with RAY_AUTH_TOKEN_PATH: nobody else gets in",
        "ray_cluster.sh",
    ),
    Computed(
        ("job",), "PET_NODE_RANK", "torchrun's number of a node, with PET_LOG_DIR", "train.sbatch"
    ),
)  # fmt: skip


def variables(role: Role, *facts: When, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process of `role`, of which `facts` are so, is started with."""
    return {
        row.name: environ.get(row.name, row.value) if row.yields else row.value
        for row in TABLE
        if role in row.roles and row.value is not None and row.when in ("always", *facts)
    }


def settle(role: Role, *facts: When, environ: MutableMapping[str, str] = os.environ) -> None:
    """Give this process what one of `role` has."""
    environ.update(variables(role, *facts, environ=environ))


def forget(role: Role, environ: MutableMapping[str, str] = os.environ) -> None:
    """Take from this process what one of `role` has not."""
    gone = [row.name for row in TABLE if role in row.roles and row.value is None]
    for name in [n for n in environ if any(fnmatchcase(n, pattern) for pattern in gone)]:
        del environ[name]


def table() -> str:
    """Both tables as one, for docs/processes.md."""
    lines = ["| Variable | Process | Value | Why, or where it is set |", "|---|---|---|---|"]
    grouped: dict[Variable, list[str]] = {}
    for row in TABLE:
        grouped.setdefault(row._replace(name=""), []).append(f"`{row.name}`")
    for row, names in grouped.items():
        value = "removed" if row.value is None else f"`{row.value}`" if row.value else "empty"
        value += " by default" if row.yields else ""
        value += "" if row.when == "always" else f" ({row.when})"
        lines.append(f"| {', '.join(names)} | {', '.join(row.roles)} | {value} | {row.why} |")
    lines += [
        f"| `{each.name}` | {', '.join(each.roles)} | {each.what} | {each.file} |"
        for each in COMPUTED
    ]
    return "\n".join(lines)
