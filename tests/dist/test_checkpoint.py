"""Checkpoints of model, optimizer, schedule and RNG: what is loaded is what was saved, bit for bit,
under the same layout and under others; what upstream gets wrong in loading is handled.

Weights and moments are compared as full Hugging Face tensors that the test gathers by itself. Not
exercised: CUDA, TransformerEngine (its FusedAdam's state contract is, over tests/te_standin).
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import DP2, EP2, PP2, PP2DP2, TE1, TE_PP2, TE_SP2, TP1, TP2, VPP2, Layout, on_ranks
from made.bits import all_same_bits, clones
from made.checkpoints import assert_equal, load, save, step_counts, trained, training_state
from made.policies import OVERLAP, PRECISION_AWARE, offloaded_policy
from torch import Tensor

if TYPE_CHECKING:
    from workbench import Workbench

    from sfpo_megatron.mcore.setup import Policy


@on_ranks(
    *(TP1, TP2, DP2, PP2, TE1, TE_SP2, TE_PP2),
    dtype=["float32", "bfloat16"],
    only=["TP1-float32", "TP2-float32", "DP2-bfloat16"],
)
def test_training_goes_on_as_if_it_had_not_stopped(bench: Workbench, dtype: str) -> None:
    """The next pass of a loaded policy ends in the bits of that of the policy that was saved."""
    policy = trained(bench, dtype=dtype)
    directory = save(bench, policy, f"same-{bench.layout.name}-{dtype}")
    saved = training_state(bench, policy)
    loaded = bench.policy(dtype=dtype)
    load(loaded, directory)
    assert_equal(training_state(bench, loaded), saved)
    assert loaded.scheduler.num_steps == policy.scheduler.num_steps == 3
    bench.one_pass(policy, bench.prepared(policy, 1))()
    bench.one_pass(loaded, bench.prepared(loaded, 1))()
    assert_equal(training_state(bench, loaded), training_state(bench, policy))
    assert step_counts(loaded) == step_counts(policy) == {4.0}


CHAIN = ("DP2", "PP2", "PP2xVPP2", "TP2", "TP1")
"""The order in which the harness runs them: two ranks by name, then one."""


@on_ranks(
    DP2, PP2, VPP2, TP2, TP1, needs=DP2, model=["qwen2_tied", "qwen3_untied"],
    only=["DP2-qwen3_untied", "TP2-qwen3_untied", "PP2-qwen3_untied"],
)  # fmt: skip
def test_other_layouts(bench: Workbench, model: str) -> None:
    """Each loads what the one before it in CHAIN has saved, and saves it again; TP1 loads them all.
    A vocabulary of 101 is padded otherwise in each."""
    mine = bench.layout.name
    place = {name: bench.directory / f"cross-{model}-{name}" for name in CHAIN}
    if mine == CHAIN[0]:
        policy = trained(bench, model=model)
        bench.save(f"cross-{model}", {}, training_state(bench, policy))
        save(bench, policy, place[mine].name)
        return
    expected = bench.load(f"cross-{model}")[1]
    before = [name for name in CHAIN[: CHAIN.index(mine)] if place[name].exists()]
    for source in before if mine == "TP1" else before[-1:]:
        policy = bench.policy(model=model)
        load(policy, place[source])
        assert_equal(training_state(bench, policy), expected)
        assert step_counts(policy) == {2.0}
    save(bench, policy, place[mine].name)


@on_ranks(DP2, EP2, form=["native", "megatron_lm"], only=["DP2-native"])
def test_the_ranks_agree_on_what_rank_0_writes_for_all(bench: Workbench, form: str) -> None:
    """Megatron compares it at each save, and warns of what differs."""
    import references

    model = references.TRAINED_MOE if bench.layout == EP2 else "qwen3_untied"
    policy = trained(bench, model=model)
    warned: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warned.append  # type: ignore[method-assign]
    validation = logging.getLogger("megatron.core.dist_checkpointing.validation")
    validation.addHandler(handler)
    save(bench, policy, f"agreed-{bench.layout.name}-{form}", form=form)
    validation.removeHandler(handler)
    assert [record.getMessage() for record in warned] == []


@on_ranks(EP2, TP2, needs=EP2)
def test_experts(bench: Workbench) -> None:
    """Two optimizers, of experts and of the rest; into the same layout, and into one optimizer."""
    check_experts(bench, EP2)


@on_ranks(DP2, EP2, needs=DP2)
def test_experts_of_one_optimizer(bench: Workbench) -> None:
    """Into two: of experts and of the rest."""
    check_experts(bench, DP2)


def check_experts(bench: Workbench, saved: Layout) -> None:
    """What `saved` saves, loaded by every layout."""
    import references

    model, name = references.TRAINED_MOE, f"experts-{saved.name}"
    if bench.layout == saved:
        policy = trained(bench, model=model)
        save(bench, policy, name)
        bench.save(f"{name}-state", {}, training_state(bench, policy))
    loaded = bench.policy(model=model)
    load(loaded, bench.directory / name)
    assert_equal(training_state(bench, loaded), bench.load(f"{name}-state")[1])
    assert step_counts(loaded) == {2.0}


@on_ranks(TP1)
def test_upstreams_two_faults(bench: Workbench) -> None:
    """Each shows without our handling, and not with it."""
    from unittest.mock import patch

    import pytest
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from sfpo_megatron.mcore import checkpoint, optimizer_state

    directory = save(bench, trained(bench), "faults")
    nothing = patch.object(optimizer_state, "fp32_states", lambda _: contextlib.nullcontext())
    with nothing, pytest.raises(KeyError, match="step"):
        checkpoint.load(bench.policy(), directory)

    policy, shared = bench.policy(), []
    original = DistributedOptimizer.load_state_dict

    def watch(self: Any, state: Any) -> None:
        original(self, state)
        shared.append(len({s["step"].data_ptr() for s in self.optimizer.state.values()}))

    with patch.object(DistributedOptimizer, "load_state_dict", watch):
        checkpoint.load(policy, directory)
    assert shared[-1] == 1, "upstream gives each param a step count of its own now"
    bench.one_pass(policy, bench.prepared(policy, 1))()
    assert step_counts(policy) == {4.0}


@on_ranks(TP1, DP2, full=["TP1"])
def test_several_buckets(bench: Workbench) -> None:
    """Loaded by an optimizer with one bucket. Upstream saves all but the first shifted."""
    from unittest.mock import patch

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from sfpo_megatron.mcore.shards import main_params

    policy = trained(bench, ddp=OVERLAP | {"bucket_size": 20_000})
    (member,) = policy.optimizer.chained_optimizers
    assert len(member.buffers[0].buckets) > 2
    assert member.buffers[0].numel_unpadded < member.buffers[0].numel
    directory = save(bench, policy, f"buckets-{bench.layout.name}")
    loaded = bench.policy()
    load(loaded, directory)
    assert_equal(training_state(bench, loaded), training_state(bench, policy))

    def upstreams(member: Any, state_of: Any, keys: Any, **settings: Any) -> Any:
        return DistributedOptimizer.get_parameter_state_dp_zero(member, **settings)

    with patch.object(main_params, "gathered_states", upstreams):
        directory = save(bench, policy, f"buckets-upstream-{bench.layout.name}")
    right = clones(loaded.shards.tensors())
    load(loaded, directory)
    found = all_same_bits(loaded.shards.tensors(), right)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert not all(everyone), "upstream no longer saves several buckets shifted"


@on_ranks(
    TP1,
    TP2,
    dtype=["float32", "bfloat16"],
    full=["TP1-bfloat16", "TP2-float32", "TP2-bfloat16"],
)
def test_optimizers_without_sharding(bench: Workbench, dtype: str) -> None:
    """Megatron's other two: of fp32 params, and of bf16 ones with fp32 copies."""

    def state(policy: Policy) -> list[Tensor]:
        return clones([*policy.shards.tensors(), *policy.shards.moments()])

    plain = {"use_distributed_optimizer": False}
    policy = trained(bench, dtype=dtype, ddp=plain)
    directory = save(bench, policy, f"plain-{bench.layout.name}-{dtype}")
    loaded = bench.policy(dtype=dtype, ddp=plain)
    load(loaded, directory)
    for step in (1, 2):
        found, expected = state(loaded), state(policy)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), step
        assert step_counts(loaded) == step_counts(policy) == {2.0 * step}
        for each in (policy, loaded):
            bench.one_pass(each, bench.prepared(each, 1))()


@on_ranks(TP1, full=["TP1-0.5", "TP1-1.0"], fraction=[0.5, 1.0])
def test_cpu_offloaded_optimizer(bench: Workbench, fraction: float) -> None:
    """The inner fp32 params, which Adam steps, are saved and loaded."""

    def state(policy: Policy) -> list[Tensor]:
        return clones([*policy.shards.tensors(), *policy.shards.moments()])

    policy = offloaded_policy(bench, fraction)
    bench.one_pass(policy, bench.prepared(policy))()
    directory = save(bench, policy, f"offloaded-{fraction}")
    loaded = offloaded_policy(bench, fraction)
    load(loaded, directory)
    for step in (1, 2):
        found, expected = state(loaded), state(policy)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), step
        assert step_counts(loaded) == step_counts(policy) == {2.0 * step}
        for each in (policy, loaded):
            bench.one_pass(each, bench.prepared(each, 1))()


@on_ranks(TP1)
def test_before_the_first_step(bench: Workbench) -> None:
    """There are no moments yet; loaded, the first step is that of a new policy."""
    policy, loaded = bench.policy(), bench.policy()
    directory = save(bench, policy, "unstepped")
    load(loaded, directory)
    fresh = bench.policy()
    for each in (policy, loaded, fresh):
        bench.one_pass(each, bench.prepared(each))()
    assert_equal(training_state(bench, loaded), training_state(bench, fresh))
    assert_equal(training_state(bench, policy), training_state(bench, fresh))


@on_ranks(TP1)
def test_settings_are_those_of_the_run_that_loads(bench: Workbench) -> None:
    """Upstream takes lr, betas and the fused kernel from the checkpoint's param groups."""
    directory = save(bench, trained(bench), "settings")
    loaded = bench.policy(lr=7e-5)
    load(loaded, directory)
    loaded.scheduler.step(increment=1)
    for group in loaded.optimizer.param_groups:
        assert group["lr"] == group["max_lr"] == 7e-5
        assert group["fused"] is True


@on_ranks(DP2)
def test_random_numbers_of_every_rank(bench: Workbench) -> None:
    policy = bench.policy()
    torch.manual_seed(5 + bench.rank)
    random.seed(6 + bench.rank)
    np.random.seed(7 + bench.rank)
    random.gauss(0, 1), np.random.standard_normal()  # both keep half of a pair
    directory = save(bench, policy, "rng")
    expected = draw()
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, expected)
    assert everyone[0] != everyone[1]
    draw()
    load(policy, directory)
    assert draw() == expected


def draw() -> list[float]:
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    return [torch.rand(1).item(), random.gauss(0, 1), np.random.standard_normal(), tracked]


@on_ranks(TE1, dtype=["bfloat16"])
def test_precision_aware_optimizer(bench: Workbench, dtype: str) -> None:
    """fp32 main params are saved, not their int16 remainders, and joined and split without loss;
    Megatron's plain optimizer loads them too."""
    from sfpo_megatron.mcore.shards.kinds import bind, members

    precise = {"use_precision_aware_optimizer": True}
    policy = trained(bench, dtype=dtype, optimizer=precise)
    directory = save(bench, policy, "precise")
    loaded = bench.policy(dtype=dtype, optimizer=precise)
    load(loaded, directory)
    plain = bench.policy(dtype=dtype)
    load(plain, directory)

    def states(policy: Policy) -> Iterator[tuple[str, Tensor]]:
        (member,) = members(policy.optimizer)
        binding = bind(member)
        for index, param in enumerate(member.model_param_group_index_map):
            state = binding.state_of(param)
            yield from ((f"{index}/{n}", t.clone()) for n, t in state.items())

    assert_equal(dict(states(loaded)), dict(states(policy)))
    assert_equal(dict(states(plain)), dict(states(policy)))
    bench.one_pass(policy, bench.prepared(policy, 1))()
    bench.one_pass(loaded, bench.prepared(loaded, 1))()
    assert_equal(dict(states(loaded)), dict(states(policy)))


@on_ranks(TP1, TP2, full=["TP2"])
def test_megatron_lm_format(bench: Workbench) -> None:
    """Its arguments and random state are beside the tensors; its weights load without ours."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    from sfpo_megatron.mcore.checkpoint import load_weights

    policy = trained(bench)
    directory = save(bench, policy, f"lm-{bench.layout.name}", form="megatron_lm", step=7)
    common = dist_checkpointing.load_common_state_dict(str(directory))
    assert common["iteration"] == 7 and common["checkpoint_version"] == 3.0
    assert common["args"].num_layers == policy.shape.num_layers
    assert common["args"].padded_vocab_size == policy.shape.padded_vocab_size(bench.layout.tensor)
    assert common["opt_param_scheduler"]["num_steps"] == 3
    keys = load_sharded_metadata(str(directory))
    assert any(key.startswith("rng_state") for key in keys)
    assert "embedding.word_embeddings.weight" in keys
    assert "optimizer.state.exp_avg.embedding.word_embeddings.weight" in keys
    fresh = bench.policy(lr=0.0)
    load_weights(fresh, directory)
    weights = bench.hf_weights(policy)
    assert_equal(bench.hf_weights(fresh), weights)
    bench.one_pass(fresh, bench.prepared(fresh))()  # lr 0: the main params are the loaded ones
    assert_equal(bench.hf_weights(fresh), weights)


@on_ranks(TP1)
def test_of_another_model(bench: Workbench) -> None:
    """Biases or a head that the model has not are not dropped; upstream's exception for a key that
    is not there, which is no Exception, is ours."""
    from sfpo_megatron.checkpoints.store import CheckpointError
    from sfpo_megatron.mcore.checkpoint import load_weights

    saved = {name: save(bench, trained(bench, model=name), f"as-{name}") for name in OTHERS}
    for model, other, found in OTHER_WEIGHTS:
        with pytest.raises(CheckpointError, match=found):
            load_weights(bench.policy(model), saved[other])
    with pytest.raises(CheckpointError, match=r"does not fit this model \(.*output_layer.weight"):
        load(bench.policy("qwen2_untied"), saved["qwen2_tied"])


OTHERS = ("qwen2_tied", "qwen2_untied")
OTHER_WEIGHTS = [
    ("llama_tied", "qwen2_tied", "no rule for key .*linear_qkv.bias"),
    ("qwen2_tied", "qwen2_untied", "no rule for key output_layer.weight"),
    ("qwen2_untied", "qwen2_tied", "no key for output_layer.weight"),
]


@on_ranks(TP1, DP2, fraction=[0.5, 1.0], only=["TP1-1.0", "DP2-0.5"])
def test_weights_alone_for_an_offloaded_optimizer(bench: Workbench, fraction: float) -> None:
    """A step goes on from them, not from those that its host copies were made of: Megatron's own
    `reload_model_params` leaves the copies as they are."""
    _a_step_keeps_loaded_weights(bench, fraction)


@on_ranks(TE1)
def test_weights_alone_for_a_precision_aware_offloaded_optimizer(bench: Workbench) -> None:
    _a_step_keeps_loaded_weights(bench, 0.5, **PRECISION_AWARE)


def _a_step_keeps_loaded_weights(bench: Workbench, fraction: float, **optimizer: Any) -> None:
    """A step with lr 0 by an offloaded optimizer, bit for bit."""
    from sfpo_megatron.mcore.checkpoint import load_weights

    policy = trained(bench, dtype="bfloat16")
    directory = save(bench, policy, f"alone-{bench.layout.name}-{fraction}")
    fresh = offloaded_policy(bench, fraction, lr=0.0, **optimizer)
    load_weights(fresh, directory)
    weights = bench.hf_weights(policy)
    assert_equal(bench.hf_weights(fresh), weights)
    assert bench.one_pass(fresh, bench.prepared(fresh))().num_skipped == 0
    assert_equal(bench.hf_weights(fresh), weights)


@on_ranks(PP2DP2)
def test_four_ranks(bench: Workbench) -> None:
    policy = trained(bench, dtype="bfloat16")
    directory = save(bench, policy, "four")
    loaded = bench.policy(dtype="bfloat16")
    load(loaded, directory)
    assert_equal(training_state(bench, loaded), training_state(bench, policy))
