"""Memory that runs out, as torch, numpy, CUDA and vLLM say it: phase, bytes and keys in one line.

The messages are the libraries' own, real ones where a CPU can make them. Not exercised: a GPU.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from sfpo_megatron.data.errors import BadRowsError, DataError
from sfpo_megatron.host.phases import Phase, doing, phase_of, record_phases, recorded_phase
from sfpo_megatron.host.shortage import (
    ENGINE_ADVICE,
    MemoryShortage,
    free_memory,
    killed_by,
    total_memory,
)
from sfpo_megatron.launcher.failures import first_failure, write_error_file
from sfpo_megatron.launcher.rank import message_line
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.root_cause import EngineLog
from sfpo_megatron.tracking.timers import Timers

GIB, MIB = 1 << 30, 1 << 20
TORCH = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.25 GiB is free. Including non-PyTorch memory, this process has 77.80 GiB memory in "
    "use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 5.00 MiB is reserved."
)
VLLM_BLOCKS = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
VLLM_LENGTH = (
    "To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (1.50 GiB). Based on the available "
    "memory, the estimated maximum model length is 12288."
)
VLLM_START = (
    "Free memory on device cuda:0 (5.00/79.11 GiB) on startup is less than desired GPU memory "
    "utilization (0.9, 71.20 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
    "other processes."
)
VLLM_SHM = (
    "Insufficient space in /dev/shm for shared-memory allocation: 160 MiB required, 64 MiB free. "
    "Increase /dev/shm (e.g. --shm-size or --ipc=host)."
)
VLLM_CPU = (
    "Available memory on node 0 (2.00/15.00 GiB) on kv cache allocation is less than requested "
    "memory for kv (4.00 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce "
    "CPU memory used by other processes."
)


@pytest.mark.parametrize(
    ("text", "wanted", "free", "total", "key"),
    [
        (TORCH, 2.5 * GIB, 1.25 * GIB, round(79.11 * GIB), None),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", 20 * MIB, None, None, None),
        ("CUDA error: out of memory\nCUDA kernel errors might be", None, None, None, None),
        ("NCCL error: Cuda failure 2 'out of memory'", None, None, None, None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", None, None, None, None),
        (VLLM_BLOCKS, None, None, None, "on CPU rollout.engine_args.kv_cache_memory_bytes: 1 GiB"),
        (VLLM_LENGTH, 4 * GIB, 1.5 * GIB, None, "rollout.max_response_tokens"),
        (VLLM_START, round(71.2 * GIB), 5 * GIB, round(79.11 * GIB), "lower rollout.gpu_memory"),
        (VLLM_SHM, 160 * MIB, 64 * MIB, None, "--shm-size"),
        (VLLM_CPU, 4 * GIB, 2 * GIB, 15 * GIB, "lower rollout.engine_args.kv_cache_memory_bytes"),
    ],
)
def test_what_the_messages_say(
    text: str, wanted: float | None, free: float | None, total: float | None, key: str | None
) -> None:
    found = MemoryShortage.in_text(text)
    assert found is not None
    assert (found.wanted_bytes, found.free_bytes, found.total_bytes) == (wanted, free, total)
    assert key is None if found.advice is None else key is not None and key in found.advice


def test_real_ones_of_a_cpu() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 58, dtype=torch.uint8)
    found = MemoryShortage.of(torchs.value)
    assert found is not None and found.wanted_bytes == 1 << 58
    assert found.total_bytes == total_memory() and (found.free_bytes or 0) > 0
    with pytest.raises(MemoryError) as pythons:
        bytearray(1 << 60)
    assert MemoryShortage.of(pythons.value) is not None
    assert MemoryShortage.of(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None


MEMINFO = f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {60 << 20} kB\n"
STEP = "system.slice/slurmstepd.scope/job_7/step_0"
NO_LIMIT_V1 = (1 << 63) - 4096


@pytest.mark.parametrize(
    ("groups", "files", "total", "free"),
    [
        ("0::/\n", {}, 64 * GIB, 60 * GIB),
        ("0::/\n", {"memory.max": "max", "memory.current": 0}, 64 * GIB, 60 * GIB),
        ("0::/\n", {"memory.max": 8 * GIB, "memory.current": 3 * GIB}, 8 * GIB, 5 * GIB),
        (  # Slurm's own limit is the job's; the step has none
            f"0::/{STEP}/user/task_0\n",
            {
                f"{STEP}/memory.max": "max",
                f"{STEP}/memory.current": GIB,
                f"{Path(STEP).parent}/memory.max": 16 * GIB,
                f"{Path(STEP).parent}/memory.current": 15 * GIB,
            },
            16 * GIB,
            GIB,
        ),
        (
            "9:name=systemd:/\n5:cpu,memory:/slurm/job_7\n0::/\n",
            {
                "memory/slurm/job_7/memory.limit_in_bytes": 4 * GIB,
                "memory/slurm/job_7/memory.usage_in_bytes": 5 * GIB,
                "memory/slurm/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/slurm/memory.usage_in_bytes": 5 * GIB,
            },
            4 * GIB,
            0,
        ),
        (  # a container whose group is mounted in place of the root
            "4:memory:/docker/0123\n",
            {
                "memory/memory.limit_in_bytes": 2 * GIB,
                "memory/memory.usage_in_bytes": GIB,
            },
            2 * GIB,
            GIB,
        ),
    ],
)
def test_memory_is_what_slurm_or_a_container_allows(
    tmp_path: Path, groups: str, files: dict[str, int | str], total: int, free: int
) -> None:
    """By files as the kernel writes them, of control groups of both versions."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, value in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    assert (total_memory(tmp_path), free_memory(tmp_path)) == (total, free)


def test_memory_that_nothing_tells_of_is_unknown(tmp_path: Path) -> None:
    assert (total_memory(tmp_path), free_memory(tmp_path)) == (None, None)


def test_what_is_something_else() -> None:
    for error in (ValueError("memory"), OSError(errno.ENOSPC, "full"), RuntimeError("NCCL")):
        assert MemoryShortage.of(error) is None
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise ValueError("about the cause") from cause
    except ValueError as error:
        assert MemoryShortage.of(error) is not None


def test_a_rank_says_phase_bytes_and_keys() -> None:
    """The innermost phase, as the loop's own timers name it."""
    timers = Timers()
    with pytest.raises(torch.OutOfMemoryError) as raised, timers("step"), timers("passes"):
        raise torch.OutOfMemoryError(TORCH)
    assert message_line(raised.value, 3) == (
        "error: rank 3: GPU memory ran out during passes: 2.50 GiB wanted, 1.25 GiB free of "
        "79.11 GiB; lower train.max_tokens_per_microbatch or train.logprob_chunk_tokens, set "
        "megatron.transformer.recompute_granularity, or raise parallel.tensor or parallel.pipeline"
    )
    for phase, key in {"refit": "refit.bucket_bytes", "build": "parallel.tensor"}.items():
        with pytest.raises(MemoryError) as other, doing(phase):
            raise MemoryError
        assert f"ran out during {phase}" in message_line(other.value, 0)
        assert key in message_line(other.value, 0)


def test_a_phase_is_seen_through_what_is_raised_from_it() -> None:
    with pytest.raises(RuntimeError) as raised, doing("outer"):
        try:
            with doing("inner"):
                raise MemoryError
        except MemoryError as error:
            raise RuntimeError("wrapped") from error
    assert phase_of(raised.value) == "inner"
    assert [type(note) for note in raised.value.__cause__.__notes__] == [Phase]  # type: ignore[union-attr]


def test_a_killed_rank_was_in_a_phase(tmp_path: Path) -> None:
    """The kernel's SIGKILL leaves no message: the launcher reads what the rank was doing."""
    folder = RunDirectory(tmp_path)
    record_phases(folder.phase_file(1))
    with doing("step"), doing("passes"):
        assert recorded_phase(folder.phase_file(1)) == "passes"
        line, code = first_failure({1: (-9, 11)}, folder)
    assert code == 1 and line.startswith("error: rank 1 (pid 11) was killed by SIGKILL; the kernel")
    assert "memory ran out during passes" in line and " GiB free of " in line
    assert "train.max_tokens_per_microbatch" in line
    assert recorded_phase(folder.phase_file(1)) is None and recorded_phase(tmp_path / "no") is None
    folder.forget_ranks()
    assert not folder.phase_file(1).exists()
    assert "during" not in killed_by(signal.SIGKILL, None)
    assert killed_by(signal.SIGSEGV, "passes") == "killed by SIGSEGV"


def test_a_phase_that_cannot_be_noted_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the file cannot be made nor where writing fails later, once for good."""
    (tmp_path / "file").touch()
    record_phases(tmp_path / "file/rank_0.phase")
    file = tmp_path / "rank_0.phase"
    record_phases(file)
    tried = []

    def fail(*arguments: object) -> None:
        tried.append(arguments)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pwrite", fail)
    with doing("step"), doing("passes"):
        pass
    assert len(tried) == 1


def test_a_message_that_cannot_be_written_changes_no_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the disk has no room for is on stderr, and 2 stays: the same command would end so."""
    (tmp_path / "run").touch()  # a file where the folder should be
    folder = RunDirectory(tmp_path / "run")
    error = ValueError("found x, expected y")
    assert write_error_file(folder, 1, error, "error: rank 1: x", exit_code=2) == "error: rank 1: x"
    said = capsys.readouterr().err
    assert "ValueError: found x, expected y\n" in said and said.endswith("error: rank 1: x\n")
    for code, kept in ((2, 2), (7, 1)):
        line = f"error: rank 1 (pid 11) ended with exit code {code} and no message"
        assert first_failure({1: (code, 11)}, RunDirectory(tmp_path)) == (line, kept)


LOG = """ValueError: of an earlier engine
--- from here
(EngineCore pid=7) ERROR 11-29 01:02:03 [core.py:1165] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-29 01:02:03 [core.py:1165]   File "x.py", line 3, in f
(EngineCore pid=7) ERROR 11-29 01:02:03 [core.py:1165] {error}
Process EngineCore:
Traceback (most recent call last):
  File "y.py", line 4, in g
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (f"ValueError: {VLLM_LENGTH}", "keys and values ran out: 4.00 GiB wanted, 1.50 GiB free"),
        (
            f"torch.OutOfMemoryError: {TORCH}",
            f"wanted, 1.25 GiB free of 79.11 GiB; {ENGINE_ADVICE}",
        ),
        ("MemoryError: x", ENGINE_ADVICE),
        ("KeyError: 'model.norm.weight'", "KeyError: 'model.norm.weight'"),
        ("safetensors_rust.SafetensorError: header too large", "SafetensorError: header too large"),
    ],
)
def test_what_an_engine_died_of_is_in_its_log(tmp_path: Path, error: str, expected: str) -> None:
    """vLLM's own error says "See root cause above"; the user sees another file."""
    file = tmp_path / "engine-0.log"
    before, after = LOG.format(error=error).split("--- from here\n")
    file.write_text(before)
    log = EngineLog(file)
    assert log.root_cause() is None
    with file.open("a") as stream:
        stream.write(after)
    assert expected in (log.root_cause() or "")
    assert EngineLog(tmp_path / "none").root_cause() is None


def test_a_message_is_one_line() -> None:
    assert message_line(KeyError("a\n  b"), 3) == "error: rank 3: KeyError: 'a\\n b'"
    long = message_line(ValueError("x" * 5000), 0)
    assert len(long) < 900


def test_a_long_message_keeps_what_to_do() -> None:
    """The report of many bad rows ends with their count, and with the two ways out."""
    first = [
        DataError(f"rows.jsonl:{n}", found="nothing", expected="an answer", fix="correct the row")
        for n in range(1, 21)
    ]
    line = message_line(BadRowsError(first, {"without answer": 40, "too long": 2}), 0)
    assert line.startswith("error: rank 0: BadRowsError: rows.jsonl:1: found nothing, expected an")
    assert line.endswith(
        "42 bad rows (40 without answer, 2 too long), the first 20 above: correct them, or set "
        "data.on_bad_row=skip to leave them out"
    )
