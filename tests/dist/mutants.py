"""Breaks SFPO in one place, named by SFPO_MUTANT, so that tests can be seen to fail.

Imported by the ranks (worker.py) and, as a pytest plugin, by unit tests; without the variable it
does nothing. test_mutants.py runs each mutant against the test that must notice.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DIST, UNIT = "tests/dist", "tests/unit"


@dataclass(kw_only=True, frozen=True, slots=True)
class Mutant:
    apply: Callable[[], None]
    noticed_by: str
    """The test that fails."""


def no_reposition() -> None:
    from sfpo_megatron.sfpo import SlowSnapshot

    SlowSnapshot.reposition = lambda self, alpha: self._shards.publish()  # type: ignore[method-assign]


def no_publish() -> None:
    from sfpo_megatron.mcore.shards import MainParamShards

    MainParamShards.publish = lambda self: None  # type: ignore[method-assign]


def no_last_gather() -> None:
    from sfpo_megatron.mcore.shards import MainParamShards

    MainParamShards.params_ready = lambda self: None  # type: ignore[method-assign]


def gate_always_open() -> None:
    from sfpo_megatron.sfpo import EntropyGate

    EntropyGate.is_open = lambda self, step: True  # type: ignore[method-assign]


def one_shard_not_taken() -> None:
    from sfpo_megatron.sfpo import SlowSnapshot

    def take(self: Any) -> None:
        pairs = list(self._slow.paired(self._shards.tensors()))
        for slow, shard in pairs[:-1]:
            slow.copy_(shard.detach())

    SlowSnapshot.take = take  # type: ignore[method-assign]


def one_fast_pass_less() -> None:
    from sfpo_megatron import sfpo

    original = sfpo.sfpo_step

    def sfpo_step(run_pass: Any, snapshot: Any, *, num_fast_passes: int, alpha: float) -> Any:
        fewer = max(num_fast_passes - 1, 0)
        results = original(run_pass, snapshot, num_fast_passes=fewer, alpha=alpha)
        return results[: num_fast_passes - fewer] + results  # as many results as asked for

    sfpo.sfpo_step = sfpo_step


def mean_in_each_microbatch() -> None:
    """The classic fault: the loss is a mean inside each microbatch, whatever its tokens."""
    from sfpo_megatron.objectives.objective import PolicyObjective

    original = PolicyObjective.__call__

    def call(self: Any, logprobs: Any, entropy: Any, microbatch: Any) -> Any:
        terms = original(self, logprobs, entropy, microbatch)
        mean = terms.loss * 20.0 / microbatch.loss_mask.sum().clamp(min=1)
        return dataclasses.replace(terms, loss=mean)

    PolicyObjective.__call__ = call  # type: ignore[method-assign]


def remainders_rounded_half_to_even() -> None:
    from sfpo_megatron.mcore.shards import precision_aware

    def split(main: Any, bf16: Any, remainder: Any) -> None:
        bf16.copy_(main)
        remainder.copy_(precision_aware._halves(main)[0])

    precision_aware.split = split


def fp32_masters_not_copied_to_model() -> None:
    from sfpo_megatron.mcore.shards.precision_aware import PrecisionAwareMainParams

    PrecisionAwareMainParams.copy_to_model = lambda self: None  # type: ignore[method-assign]


def staged_edits_not_written_back() -> None:
    from sfpo_megatron.mcore.shards.precision_aware import PrecisionAwareMainParams

    PrecisionAwareMainParams._write_back = lambda *_: None  # type: ignore[method-assign]


def offloaded_masters_not_edited() -> None:
    from sfpo_megatron.mcore.shards import hybrid

    def tensors(self: Any) -> Any:
        for group in self._hybrid.param_groups:
            yield from group["params"]

    hybrid.HybridMainParams.tensors = tensors  # type: ignore[method-assign]


def experts_left_out() -> None:
    from sfpo_megatron.mcore.shards import MainParamShards

    MainParamShards.tensors = lambda self: self._members[0].tensors()  # type: ignore[method-assign]


def every_pack_weighs_the_same() -> None:
    """Megatron's own way with auxiliary losses."""
    from sfpo_megatron.mcore.aux_losses import AuxLosses

    AuxLosses.of = lambda chunks, scale_loss: None  # type: ignore[method-assign,assignment]


def padding_is_balanced_too() -> None:
    from sfpo_megatron.mcore.aux_losses import AuxLosses

    original = AuxLosses.padding_mask

    def padding_mask(self: Any, microbatch: Any, *, pre_process: bool) -> Any:
        return original(self, microbatch, pre_process=pre_process) & False

    AuxLosses.padding_mask = padding_mask  # type: ignore[method-assign]


MUTANTS = {
    "no_reposition": Mutant(
        apply=no_reposition,
        noticed_by=f"{DIST}/test_sfpo_exact.py::"
        "test_alpha_zero_goes_back_and_moments_carry_through[TP1]",
    ),
    "no_publish": Mutant(
        apply=no_publish,
        noticed_by=f"{DIST}/test_bf16_shards.py::"
        "test_params_are_bf16_of_the_lerp_after_each_reposition[DP2-False]",
    ),
    "no_last_gather": Mutant(
        apply=no_last_gather,
        noticed_by=f"{DIST}/test_gathers.py::"
        "test_what_is_sent_to_engines_is_the_shards_joined[DP2-True]",
    ),
    "gate_always_open": Mutant(
        apply=gate_always_open, noticed_by=f"{UNIT}/test_sfpo.py::test_gate_table"
    ),
    "one_shard_not_taken": Mutant(
        apply=one_shard_not_taken,
        noticed_by=f"{DIST}/test_sfpo_exact.py::"
        "test_alpha_zero_goes_back_and_moments_carry_through[TP1]",
    ),
    "mean_in_each_microbatch": Mutant(
        apply=mean_in_each_microbatch,
        noticed_by=f"{DIST}/test_invariance.py::test_gradients_fp32[TP1-qwen2_tied-False]",
    ),
    "one_fast_pass_less": Mutant(
        apply=one_fast_pass_less,
        noticed_by=f"{DIST}/test_sfpo_exact.py::test_alpha_one_is_k_plus_one_plain_passes[TP1]",
    ),
    "remainders_rounded_half_to_even": Mutant(
        apply=remainders_rounded_half_to_even,
        noticed_by=f"{DIST}/test_precision_aware.py::test_codec[TE1]",
    ),
    "fp32_masters_not_copied_to_model": Mutant(
        apply=fp32_masters_not_copied_to_model,
        noticed_by=f"{DIST}/test_precision_aware.py::"
        "test_a_null_step_after_a_reposition_changes_nothing[TE1-fp32_masters]",
    ),
    "staged_edits_not_written_back": Mutant(
        apply=staged_edits_not_written_back,
        noticed_by=f"{DIST}/test_precision_aware.py::"
        "test_a_null_step_after_a_reposition_changes_nothing[TE1-remainders]",
    ),
    "offloaded_masters_not_edited": Mutant(
        apply=offloaded_masters_not_edited,
        noticed_by=f"{DIST}/test_hybrid_optimizer.py::"
        "test_a_null_step_after_a_reposition_changes_nothing[DP2]",
    ),
    "experts_left_out": Mutant(
        apply=experts_left_out,
        noticed_by=f"{DIST}/test_experts.py::"
        "test_two_optimizers_whose_shards_cover_every_weight_once[DP2xEP2-float32]",
    ),
    "every_pack_weighs_the_same": Mutant(
        apply=every_pack_weighs_the_same,
        noticed_by=f"{DIST}/test_aux_losses.py::"
        "test_gradients_are_those_of_a_mean_over_tokens[DP2xEP2-40]",
    ),
    "padding_is_balanced_too": Mutant(
        apply=padding_is_balanced_too,
        noticed_by=f"{DIST}/test_aux_losses.py::"
        "test_gradients_are_those_of_a_mean_over_tokens[TP2+SPxEP2-40]",
    ),
}  # fmt: skip

if os.environ.get("SFPO_MUTANT"):
    MUTANTS[os.environ["SFPO_MUTANT"]].apply()
