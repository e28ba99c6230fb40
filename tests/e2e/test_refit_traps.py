"""Each guard of the transport is needed: vLLM goes silently wrong without it.

An engine inside this process, so that a guard can be taken out. Every test: with the guard out the
engine does not become the sent model; with it, it does. If a newer vLLM no longer needs a guard,
its test fails here and the guard can go.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from engines import greedy, send
from torch import Tensor

from sfpo_megatron.families.hf_files import TensorMeta
from sfpo_megatron.resharding import filling
from sfpo_megatron.resharding.checksums import ChecksumError
from sfpo_megatron.resharding.transports import receiving, shm
from sfpo_megatron.resharding.transports.tensor_names import ManifestError


def tokens(llm: Any) -> list[tuple[int, ...]]:
    return [made for made, _ in greedy(llm)]


@pytest.fixture
def states(models: dict[str, Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tiny.load_state(models["tied_a"]), tiny.load_state(models["tied_b"])


def test_tied_lm_head_is_packed_anew(
    llm: Any, states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails without `Receiver.pack_heads`: the CPU lm_head keeps its packed weights."""
    a, b = states
    send(llm, b, tmp_path)
    expected = tokens(llm)
    send(llm, a, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shm.ShmEngine, "pack_heads", lambda self: None)
        send(llm, b, tmp_path)
        assert tokens(llm) != expected
    send(llm, b, tmp_path)
    assert tokens(llm) == expected


def test_waiting_tensors_are_copied_out_of_the_buffer(
    llm: Any, states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails without `ShmEngine.keep_waiting`: a fused layer waits for its other half while the
    next bucket overwrites the first."""
    a, b = states
    send(llm, b, tmp_path)
    expected = tokens(llm)
    send(llm, a, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shm.ShmEngine, "keep_waiting", lambda self: None)
        send(llm, b, tmp_path)
        assert tokens(llm) != expected
    send(llm, b, tmp_path)
    assert tokens(llm) == expected


def test_half_of_a_fused_qkv_is_refused(
    llm: Any, states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails without `check_manifest`: vLLM keeps old values, or garbage, and says nothing."""
    a, b = states
    send(llm, b, tmp_path)
    expected = tokens(llm)
    half = {n: t for n, t in b.items() if "k_proj" not in n}
    send(llm, a, tmp_path)
    with pytest.raises(ManifestError, match=r"k_proj.*missing"):
        send(llm, half, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(receiving, "check_manifest", lambda *args, **kwargs: None)
        send(llm, half, tmp_path)
        assert tokens(llm) != expected
    send(llm, b, tmp_path)
    assert tokens(llm) == expected


def test_one_changed_element_is_found_and_named(
    llm: Any, states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`refit.verify_every`: a bit that flips between the trainer's tensor and the engine."""
    _, b = states
    send(llm, b, tmp_path, verify=True)
    expected = tokens(llm)
    name = "model.layers.1.mlp.down_proj.weight"
    real = filling.StreamFiller.fill

    def plant(self: Any, bucket: Any, buffer: Tensor) -> Any:
        checksums = real(self, bucket, buffer)
        for index, view in enumerate(filling.views(self.manifest, bucket, buffer), bucket.first):
            if self.manifest[index].name == name:
                view[3, 5] += 1e-3
        return checksums

    with monkeypatch.context() as patch:
        patch.setattr(filling.StreamFiller, "fill", plant)
        with pytest.raises(ChecksumError, match=f"{name}: found checksum"):
            send(llm, b, tmp_path, verify=True)
    # This engine lives on in the test process; the fleet would end it.
    send(llm, b, tmp_path, verify=True)
    assert tokens(llm) == expected


def test_an_update_after_one_that_was_interrupted(
    llm: Any, states: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails without finishing the interrupted one: vLLM goes on with it, where some layers' params
    are those that load and others' are not."""
    a, b = states
    real, taken = shm.ShmEngine.receive_weights, 18  # the middle of the second layer

    def interrupted(self: Any, update_info: Any) -> None:
        """After some of the tensors."""
        if self._num_received > taken:
            self.interruption = "planted"
        else:
            real(self, update_info)

    def half(state: dict[str, Tensor]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shm.ShmEngine, "receive_weights", interrupted)
            send(llm, state, tmp_path)

    send(llm, b, tmp_path)
    expected = tokens(llm)
    for times in (1, 2):
        for _ in range(times):
            half(a)
        send(llm, b, tmp_path)
        assert tokens(llm) == expected
    with monkeypatch.context() as patch:
        patch.setattr(shm.ShmEngine, "finish_weight_update", lambda self: None)
        half(a)
    with pytest.raises(AttributeError, match="weight_loader"):
        send(llm, b, tmp_path)
    taken = -1
    half(a)  # finished, it puts this engine in order too
    send(llm, b, tmp_path)
    assert tokens(llm) == expected


@pytest.mark.parametrize("received", [0, 2, 4])
def test_an_update_of_too_few_or_too_many_tensors_is_no_update(llm: Any, received: int) -> None:
    """`llm`: vllm has been imported by then. The engine itself is left alone."""

    class OfThree(shm.ShmEngine):
        """Its model takes whatever it is given."""

        def __init__(self) -> None:
            meta = TensorMeta(name="a", shape=(1,), dtype=torch.float32)
            self._manifest = (meta,) * 3
            self.model = SimpleNamespace(load_weights=list)
            self._replay = iter

    engine = OfThree()
    engine.load([("a", torch.ones(1))] * received, None)
    with pytest.raises(RuntimeError, match=f"finish after {received} of 3 tensors"):
        engine.finish_weight_update()
