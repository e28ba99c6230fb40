"""A machine that is too small for the run, said before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from made.configs import run_config

from sfpo_megatron.config.rules import machine as rules

MIB = 1 << 20


@pytest.mark.parametrize(
    ("free_mib", "tensor_parallel", "refused"),
    [(64, 2, True), (64, 1, False), (241, 2, False), (239, 2, True), (None, 2, False)],
)
def test_shared_memory_for_the_engines_ring_buffers(
    monkeypatch: pytest.MonkeyPatch, free_mib: int | None, tensor_parallel: int, refused: bool
) -> None:
    """Containers have 64 MiB unless told otherwise."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    free = None if free_mib is None else free_mib * MIB
    monkeypatch.setattr(rules, "free_shared_memory", lambda: free)
    config = run_config(rollout={"tensor_parallel": tensor_parallel})
    problems = list(rules.machine(config))
    assert len(problems) == refused
    if refused:
        assert problems[0].level == "error_here"
        assert "64 MiB free in /dev/shm" in problems[0].found or free_mib == 239
        with pytest.raises(RuntimeError, match=r"rollout.tensor_parallel: found 2 .*--shm-size"):
            rules.check_shared_memory(config)
    else:
        rules.check_shared_memory(config)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # engines may be on other machines
    assert not list(rules.machine(config))


def test_the_bytes_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults, as they stand in its sources (not imported: seconds)."""
    found = find_spec("vllm")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    queue = (folder / "distributed/device_communicators/shm_broadcast.py").read_text()
    assert "max_chunk_bytes: int = 1024 * 1024 * 24," in queue and "max_chunks: int = 10," in queue
    assert "check_shm_free_space(self.total_bytes_of_buffer)" in queue
    envs = (folder / "envs.py").read_text()
    assert "VLLM_MQ_MAX_CHUNK_BYTES_MB: int = 16" in envs
    config = run_config(rollout={"tensor_parallel": 2})
    assert rules.ring_buffer_bytes(config) >= 10 * (24 * MIB + 3)
    monkeypatch.setenv("VLLM_MQ_MAX_CHUNK_BYTES_MB", "64")
    assert rules.ring_buffer_bytes(config) >= 640 * MIB


def test_train_refuses_and_check_warns(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sfpo_megatron import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(rules, "free_shared_memory", lambda: 64 * MIB)
    model_dir()
    Path("c.yaml").write_text(
        "output_dir: run\nmodel: {path: model}\nrollout: {tensor_parallel: 2}\n"
        "data: {train: [{source: reasoning_gym, task: chain_sum, size: 64}]}\n"
    )
    assert cli.main(["check", "c.yaml"]) == 0
    assert (
        "warning: c.yaml: rollout.tensor_parallel: found 2 with 64 MiB" in capsys.readouterr().err
    )
    assert cli.main(["train", "c.yaml", "parallel.data=1", "parallel.tensor=1"]) == 2
    error = capsys.readouterr().err
    assert "found 2 with 64 MiB free in /dev/shm, expected 241 MiB or more" in error
    assert not Path("run").exists()
