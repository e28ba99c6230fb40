"""resharding.MegatronWeightSource yields the full Hugging Face tensors from every layout.

Compared bit for bit with the model's file and, after an optimizer step, with a gather of the tests'
own (workbench.hf_weights). Not exercised here: sending them into an engine (tests/e2e).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from harness import (
    DP2,
    EP2,
    EP2DP4,
    EP2PP2,
    PP2,
    SP2,
    SP2EP2,
    TE1,
    TE_EP2,
    TE_PP2,
    TE_SP2,
    TE_SP2EP2,
    TE_VPP2,
    TP1,
    TP2,
    TP2PP2,
    VPP2,
    on_ranks,
)
from made.bits import same_bits
from made.policies import OVERLAP
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
    *(TE1, TE_SP2, TE_PP2, TE_VPP2), only=["TE1-qwen3_untied"], model=["qwen2_tied", "qwen3_untied"]
)
def test_source_of_the_te_spec(bench: Workbench, model: str) -> None:
    """Norms are parameters of the layers behind them there."""
    check_source(bench, model)


@on_ranks(
    *(TP1, EP2, SP2EP2, EP2DP4, EP2PP2, TE_EP2, TE_SP2EP2),
    only=["DP2xEP2-qwen3moe_untied", "TP2+SPxEP2-qwen3moe_untied", "DP2xEP2xPP2-mixtral_tied"],
    model=MOE_MODELS[:2],
)
def test_source_collects_the_experts_of_every_rank(bench: Workbench, model: str) -> None:
    check_source(bench, model)


def check_source(bench: Workbench, model: str) -> None:
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


def check_other_ways(bench: Workbench, source: MegatronWeightSource) -> None:
    """What vLLM's own transports read: exactly the exported tensors, in the manifest's order, as
    its `ParamMeta` says; everywhere, on rank 0, or every rank's own slice. A pass that breaks off
    is followed to its end."""
    from sfpo_megatron.resharding.source_pass import SourcePass

    written = written_by_all_ranks(source)
    names = list(written)
    manifest = source.metadata()
    for stream in (source.__iter__, source.everywhere, source.shards):
        driver = SourcePass(manifest, stream)
        driver.restart(fresh=True, verify=False)
        broken = iter(driver)
        for _ in range(1 + bench.rank):  # ranks that fail at different tensors
            next(broken)
        driver.follow()
        driver.follow()
        assert next(broken, None) is None
    assert [name for name, _ in source.shards()] == names
    for index, (name, tensor) in enumerate(source.everywhere()):
        meta = manifest[index]
        assert (name, tensor.dtype, tuple(tensor.shape)) == (meta.name, meta.dtype, meta.shape)
        assert same_bits(tensor, written[name]), name
    for index, (name, tensor) in enumerate(source):
        meta = manifest[index]
        if bench.rank == 0:
            assert (name, tensor.dtype, tuple(tensor.shape)) == (meta.name, meta.dtype, meta.shape)
            assert same_bits(tensor, written[name]), name


def check_shards(bench: Workbench, source: MegatronWeightSource) -> None:
    """The shards of all ranks, put together as nccl_m2n's receivers do it, are the model."""
    import torch

    written = written_by_all_ranks(source)
    layout = bench.layout
    for (name, shard), dim in zip(source.shards(), source.shard_dims, strict=True):
        full = written[name]
        if dim is None:
            assert same_bits(shard, full), name
            continue
        at = bench.rank % layout.tensor
        assert same_bits(shard, torch.chunk(full, layout.tensor, dim=dim)[at]), name
    dims = dict(zip(written, source.shard_dims, strict=True))
    if layout.tensor > 1:
        assert dims["model.layers.0.self_attn.k_proj.weight"] == 0
        assert dims["model.layers.0.mlp.down_proj.weight"] == 1
        assert dims["model.layers.0.input_layernorm.weight"] is None
        assert dims["model.embed_tokens.weight"] is None, "the vocabulary is padded in this model"
    else:
        assert set(dims.values()) == {None}


@on_ranks(*(TP1, TP2, PP2, DP2, TP2PP2), full=["DP2-qwen3_untied"], model=["qwen3_untied"])
def test_other_ways_give_the_exported_tensors(bench: Workbench, model: str) -> None:
    from sfpo_megatron.resharding.source import MegatronWeightSource

    source = MegatronWeightSource(bench.policy(model))
    if bench.layout.pipeline > 1:  # no rank has a part of every weight
        source.shards = source.everywhere  # type: ignore[method-assign]
    check_other_ways(bench, source)
    if bench.layout.pipeline == 1:
        check_shards(bench, source)


@on_ranks(EP2, EP2PP2, model=MOE_MODELS[:1])
def test_other_ways_collect_experts(bench: Workbench, model: str) -> None:
    from sfpo_megatron.resharding.source import MegatronWeightSource

    source = MegatronWeightSource(bench.policy(model))
    source.shards = source.everywhere  # type: ignore[method-assign]
    check_other_ways(bench, source)


@on_ranks(TP2, PP2, EP2, SP2EP2, way=["rank_0", "everywhere", "shards"])
def test_peak_memory_of_a_pass(bench: Workbench, way: str) -> None:
    """At most two buckets (of refit.bucket_bytes, or the largest tensor, if larger: here that).
    What vLLM packs into is its own (docs/refit.md)."""
    from sfpo_megatron.resharding.source import MegatronWeightSource
    from sfpo_megatron.resharding.source_pass import packed_bytes

    model = MOE_MODELS[0] if bench.layout.expert > 1 else "qwen3_untied"
    source = MegatronWeightSource(bench.policy(model))
    if way == "shards" and bench.layout.pipeline * bench.layout.expert > 1:
        return
    stream = {"rank_0": source.__iter__, "everywhere": source.everywhere, "shards": source.shards}
    bucket = packed_bytes(source.metadata(), 0)
    found = peak_of_storages(stream[way], held=source._params.values())
    bench.figures = {f"peak_over_bucket_{way}": round(found / bucket, 2)}
    assert found <= 2 * bucket, (way, found, bucket)


def peak_of_storages(stream: Any, held: Iterable[Tensor]) -> int:
    """Bytes of the storages that operators make during a pass and that are alive at a time;
    temporaries inside an operator are not seen. (The profiler does not see what gloo's threads
    free.)"""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    known = {tensor.untyped_storage().data_ptr() for tensor in held}

    class Peak(TorchDispatchMode):
        alive: ClassVar[dict[int, tuple[StorageWeakRef, int]]] = {}
        peak = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in known:
                        ref = StorageWeakRef(storage)
                        self.alive[ref.cdata] = (ref, storage.nbytes())
            gone = [key for key, (ref, _) in self.alive.items() if ref.expired()]
            for key in gone:
                del self.alive[key]
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
            return out

    with Peak() as mode:
        items = iter(stream())
        while next(items, None) is not None:  # a `for` would hold the last one beside the next
            time.sleep(0.01)  # gloo's threads let go of the last one a moment later
    mode.alive.clear()
    return mode.peak


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
