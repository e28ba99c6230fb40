"""resharding.MegatronWeightSource yields the full Hugging Face tensors from every layout.

Compared bit for bit with the model's file and, after an optimizer step, with a gather of the tests'
own (workbench.hf_weights). Not exercised here: sending them into an engine (tests/e2e).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import DP2, EP2, EP2DP4, EP2PP2, PP2, SP2, SP2EP2, TP1, TP2, TP2PP2, VPP2, on_ranks
from references import MOE_MODELS
from safetensors.torch import load_file

if TYPE_CHECKING:
    from torch import Tensor
    from workbench import Workbench

    from sfpo_megatron.resharding.source import MegatronWeightSource


@on_ranks(
    *(TP1, TP2, SP2, PP2, VPP2, DP2, TP2PP2),
    full=["TP2+SP-qwen2_tied", "PP2xVPP2-qwen3_untied", "DP2-qwen3_untied"],
    model=["qwen2_tied", "qwen3_untied"],
)
def test_source_equals_the_file_and_follows_training(bench: Workbench, model: str) -> None:
    check_source(bench, model)


@on_ranks(
    *(TP1, EP2, SP2EP2, EP2DP4, EP2PP2),
    only=["DP2xEP2-qwen3moe_untied", "TP2+SPxEP2-qwen3moe_untied", "DP2xEP2xPP2-mixtral_tied"],
    model=MOE_MODELS[:2],
)
def test_source_collects_the_experts_of_every_rank(bench: Workbench, model: str) -> None:
    check_source(bench, model)


def check_source(bench: Workbench, model: str) -> None:
    from workbench import OVERLAP, same_bits

    from sfpo_megatron.resharding.source import MegatronWeightSource

    policy = bench.policy(model, ddp=OVERLAP if bench.layout.data > 1 else None)
    source = MegatronWeightSource(policy)
    original = load_file(bench.directory / model / "model.safetensors")
    promised = {meta.name: (meta.shape, meta.dtype) for meta in source.metadata()}
    assert promised == {name: (tuple(t.shape), t.dtype) for name, t in original.items()}
    got = {name: tensor.clone() for name, tensor in source}
    assert list(got) == list(promised)
    if bench.rank == 0:
        for name, tensor in original.items():
            assert same_bits(got[name], tensor), name
    bench.one_pass(policy, bench.prepared(policy))()
    trained = {name: tensor.clone() for name, tensor in source}
    written = written_by_all_ranks(source)
    for index, (name, tensor) in enumerate(written.items()):
        gathered = source.gather(index)
        assert (gathered is not None) == (source.leaders[index] == bench.rank)
        assert gathered is None or same_bits(gathered, tensor), name
    expected = bench.hf_weights(policy)
    if bench.rank == 0:
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_bits(trained[name], tensor), name
            assert same_bits(written[name], tensor), name
            assert not same_bits(trained[name], original[name]), f"{name} was not trained"


def written_by_all_ranks(source: MegatronWeightSource) -> dict[str, Tensor]:
    """What `write` puts into full tensors, each rank its own pieces; nothing twice, nothing left
    out. The ranks' checksums add up to the full tensor's."""
    import torch

    from sfpo_megatron.resharding.checksums import checksum, signed

    source.prepare()
    found = {}
    for index, meta in enumerate(source.metadata()):
        # Bits summed over ranks, as integers: a piece that two ranks wrote would show.
        integer = {2: torch.int16, 4: torch.int32}[meta.dtype.itemsize]
        target = torch.zeros(meta.shape, dtype=integer)
        source.write(index, target.view(meta.dtype))
        total = source.control.sum(target.to(torch.int64))
        found[meta.name] = total.to(integer).view(meta.dtype)
        part = torch.tensor([signed(source.checksum(index))])
        assert source.control.sum(part).item() == checksum(found[meta.name]), meta.name
    return found
