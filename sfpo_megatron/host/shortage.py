"""Memory that has run out: recognized once, where foreign errors come in. Standard library only.

Torch, the C library, NCCL and vLLM each say it in their own words; from here on it is a
`MemoryShortage`, whose line has what was wanted, what there was, and the keys that lower it.
"""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SIZE = r"([\d.]+) ?(bytes|B|KiB|MiB|GiB|TiB)"
_UNITS = {"bytes": 0, "B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}

_PASSES = (
    "lower train.max_tokens_per_microbatch or train.logprob_chunk_tokens, set "
    "megatron.transformer.recompute_granularity, or raise parallel.tensor or parallel.pipeline"
)
_ADVICE = {
    "build": "raise parallel.tensor, parallel.pipeline or parallel.expert, or start more ranks",
    "sfpo": f"set sfpo.snapshot: host; {_PASSES}",
    "refit": "lower refit.bucket_bytes",
    "save": "set checkpoint.async_save: false, or raise parallel.tensor or parallel.pipeline",
}
_KV_CACHE = (
    "raise rollout.gpu_memory_utilization (on CPU rollout.engine_args.kv_cache_memory_bytes: 1 GiB "
    "unless it is set) or rollout.tensor_parallel, or lower rollout.max_prompt_tokens, "
    "rollout.max_response_tokens"
)
_ROOT = Path("/")
_USAGE_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_USAGE_V2 = ("memory.max", "memory.current")
"""Files of a control group, by the version of its hierarchy."""
ENGINE_ADVICE = (
    "lower rollout.engine_args.max_num_seqs or rollout.gpu_memory_utilization, or raise "
    "rollout.tensor_parallel"
)


@dataclass(kw_only=True, frozen=True, slots=True)
class MemoryShortage:
    """What was asked for, and what there was."""

    what: str
    """The memory that ran out."""
    wanted_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    advice: str | None = None
    """Keys to change, where the message itself tells which."""

    def line(self, phase: str | None, advice: str | None = None) -> str:
        """One line for the user. `advice`: for a process that has none of our phases."""
        wanted = f": {in_gib(self.wanted_bytes)} wanted" if self.wanted_bytes is not None else ""
        free = f", {in_gib(self.free_bytes)} free" if self.free_bytes is not None else ""
        total = f" of {in_gib(self.total_bytes)}" if self.total_bytes is not None else ""
        during = f" during {phase}" if phase else ""
        keys = self.advice or advice or _ADVICE.get(phase or "", _PASSES)
        return f"{self.what} ran out{during}{wanted}{free}{total}; {keys}"

    @staticmethod
    def of(error: BaseException) -> MemoryShortage | None:
        """What `error`, or what caused it, says of memory; None if it is about something else."""
        for one in _chain(error):
            if found := MemoryShortage.in_text(str(one)):
                return found
            if isinstance(one, MemoryError):
                return MemoryShortage.of_host()
            if isinstance(one, OSError) and one.errno == errno.ENOMEM:
                return MemoryShortage.of_host()
        return None

    @staticmethod
    def of_host() -> MemoryShortage:
        """This machine's memory, where nobody said how much was wanted."""
        return MemoryShortage(what="memory", free_bytes=free_memory(), total_bytes=total_memory())

    @staticmethod
    def in_text(text: str) -> MemoryShortage | None:
        """The same for a message alone, as other processes leave it in a log."""
        for pattern, what, names, advice in _PATTERNS:
            if match := pattern.search(text):
                sizes: dict[str, int | None] = {
                    name: _bytes(*match.group(2 * i + 1, 2 * i + 2)) for i, name in enumerate(names)
                }
                if what == "memory":
                    sizes = {"free_bytes": free_memory(), "total_bytes": total_memory()} | sizes
                return MemoryShortage(what=what, advice=advice, **sizes)
        return None


_PATTERNS: tuple[tuple[re.Pattern[str], str, tuple[str, ...], str | None], ...] = tuple(
    (re.compile(pattern, re.DOTALL), what, names, advice)
    for pattern, what, names, advice in (
        # torch.OutOfMemoryError
        (
            rf"CUDA out of memory\. Tried to allocate {_SIZE}\..*?total capacity of {_SIZE} of "
            rf"which {_SIZE} is free",
            "GPU memory",
            ("wanted_bytes", "total_bytes", "free_bytes"),
            None,
        ),
        (
            rf"CUDA out of memory\. Tried to allocate {_SIZE}",
            "GPU memory",
            ("wanted_bytes",),
            None,
        ),
        # CUDA's own word, in NCCL's, cuBLAS's and page-locked allocations too
        (
            r"CUDA out of memory|CUDA error: out of memory|Cuda failure \d* ?'out of memory'"
            r"|CU\w+_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation",
            "GPU memory",
            (),
            None,
        ),
        # torch on CPU, numpy, C++
        (
            rf"DefaultCPUAllocator: .*?you tried to allocate {_SIZE}",
            "memory",
            ("wanted_bytes",),
            None,
        ),
        (rf"Unable to allocate {_SIZE} for an array", "memory", ("wanted_bytes",), None),
        (r"std::bad_alloc|Cannot allocate memory", "memory", (), None),
        # vLLM
        (
            rf"Insufficient space in /dev/shm for .*?: {_SIZE} required, {_SIZE} free",
            "shared memory (/dev/shm)",
            ("wanted_bytes", "free_bytes"),
            "give the container more (--shm-size=1g or --ipc=host), or set "
            "rollout.tensor_parallel: 1",
        ),
        (
            r"No available memory for the cache blocks",
            "memory for keys and values",
            (),
            _KV_CACHE,
        ),
        (
            rf"\({_SIZE} KV cache is needed, which is larger than the available KV cache memory "
            rf"\({_SIZE}\)",
            "memory for keys and values",
            ("wanted_bytes", "free_bytes"),
            _KV_CACHE,
        ),
        (
            r"Free memory on device \S+ \(([\d.]+)()/([\d.]+)() GiB\) on startup is less than "
            r"desired GPU memory utilization \([\d.]+, ([\d.]+)() GiB\)",
            "GPU memory",
            ("free_bytes", "total_bytes", "wanted_bytes"),
            "lower rollout.gpu_memory_utilization, or end what else is on the GPU",
        ),
        (
            r"Available memory on node \d+ \(([\d.]+)()/([\d.]+)() GiB\) on startup is less than "
            r"desired CPU memory utilization \([\d.]+, ([\d.]+)() GiB\)",
            "memory of an engine on CPU",
            ("free_bytes", "total_bytes", "wanted_bytes"),
            "lower rollout.gpu_memory_utilization, which vLLM takes for CPU memory too",
        ),
        (
            r"Available memory on node \d+ \(([\d.]+)()/([\d.]+)() GiB\) on kv cache allocation is "
            r"less than requested memory for kv \(([\d.]+)()",
            "memory for keys and values on CPU",
            ("free_bytes", "total_bytes", "wanted_bytes"),
            "lower rollout.engine_args.kv_cache_memory_bytes (or the variable "
            "VLLM_CPU_KVCACHE_SPACE, GiB, if it is set), or rollout.num_engines",
        ),
    )
)


def killed_by(signum: int, phase: str | None) -> str:
    """How a signal ended a process that was in `phase`: of SIGKILL, which the kernel sends when
    memory runs out, also what there was of it."""
    killed = f"killed by {signal.Signals(signum).name}"
    if signum != signal.SIGKILL:
        return killed
    line = MemoryShortage.of_host().line(phase)
    return f"{killed}; the kernel does that when memory runs out: if it did, {line}"


def total_memory(root: Path = _ROOT) -> int | None:
    """Bytes that this process and its siblings may use: the machine's, or less in a container or a
    Slurm job. `root` stands in for / wherever files are read."""
    sizes = [_meminfo("MemTotal", root), *(limit for limit, _ in _limits(root))]
    return min((size for size in sizes if size is not None), default=None)


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes of them that are left."""
    left = [max(0, limit - used) for limit, used in _limits(root)]
    sizes = [_meminfo("MemAvailable", root), *left]
    return min((size for size in sizes if size is not None), default=None)


def _meminfo(name: str, root: Path) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the control groups with a limit that this process is in: its own
    and those around it, for Slurm limits the step or the job, and a container sees its own alone as
    the outermost. Without a limit the file of the second version has a word, that of the first a
    number beyond every machine's memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = _USAGE_V1 if controllers else _USAGE_V2
        inner = base / own.strip("/")
        for group in (inner, *inner.parents):
            with suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text(encoding="ascii")) for name in names)
                yield limit, used
            if group == base:
                break


def in_gib(num_bytes: int) -> str:
    """`num_bytes` as torch writes them."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.2f} {unit}"
    return f"{num_bytes} bytes"


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** _UNITS[unit or "GiB"])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
