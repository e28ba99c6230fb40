"""Statistics by name on one rank, and the metrics that become of them.

Not exercised here: the agreement between ranks (tests/dist/test_statistics.py).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ragged import ragged, run

from sfpo_megatron.config.objective import ObjectiveConfig
from sfpo_megatron.mcore.passes import MinibatchResult, PassResult
from sfpo_megatron.mcore.statistics import Found, add_up, found_in
from sfpo_megatron.objectives.objective import ObjectiveTerms
from sfpo_megatron.run.metrics import Totals, pass_metrics


def found(sums: dict[str, float], maxima: dict[str, float]) -> Found:
    terms = ObjectiveTerms(
        loss=torch.tensor(1.5, requires_grad=True),
        sums={name: torch.tensor(value) for name, value in sums.items()},
        maxima={name: torch.tensor(value) for name, value in maxima.items()},
    )
    return found_in(terms, torch.tensor(0.25))


def test_a_minibatch_is_added_up_in_float64() -> None:
    """2**24 + 1 has no float32."""
    ones = [found({"a": 2.0**24, "b": 1}, {"m": 3}), found({"a": 1, "b": 1}, {"m": 2})]
    total = add_up(ones, counts=True)
    assert total.sums.tolist() == [3.0, 0.5, 2.0**24 + 1, 2] and total.maxima.tolist() == [3]
    (names,) = total.names
    assert names.sums == ("a", "b") and names.maxima == ("m",)


def test_what_another_rank_counts_keeps_its_names() -> None:
    """Tensor-parallel ranks: the same names, nothing to add; off the last stage: no names."""
    total = add_up([found({"a": 1}, {"m": 3})], counts=False)
    assert total.names and not total.sums.any() and not total.maxima.any()
    nothing = add_up([], counts=True)
    assert nothing.names == () and nothing.sums.tolist() == [0, 0] and not nothing.maxima.numel()


def test_other_names_in_another_microbatch_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"found a, c, m, expected .* earlier microbatch \(a, m\)"):
        add_up([found({"a": 1}, {"m": 1}), found({"a": 1, "c": 1}, {"m": 1})], counts=True)


@pytest.mark.parametrize(
    ("sums", "maxima", "name"),
    [({"a": 1}, {"a": 1}, "a"), ({"entropy": 1}, {}, "entropy"), ({}, {"loss": 1}, "loss")],
)
def test_a_name_stands_once(sums: Any, maxima: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"found {name} a second time"):
        found(sums, maxima)


# ---- metrics --------------------------------------------------------------------------------

ALWAYS = {
    *("loss", "entropy", "grad_norm", "clip_frac", "ppo_kl", "ratio_mean_first_pass"),
    *("ppo_kl_first_pass", "num_passes", "num_optimizer_steps", "num_skipped_steps"),
}
IN_A_PASS = {
    *("ratio_mean", "ratio_max", "clip_frac_low", "clip_frac_high", "ppo_kl"),
    *("entropy", "grad_norm", "loss"),
}
ONCE = ("mismatch_weight_mean", "mismatch_rejected", "ref_kl")


def results_of(*more: str, num_tokens: tuple[int, int] = (10, 30)) -> list[PassResult]:
    """Two passes of two minibatches: what the objective names by default, and `more`."""
    names = [name for name in run(ragged(0), ObjectiveConfig())[1] if name != "ratio_max"]

    def minibatch(k: int, tokens: int) -> MinibatchResult:
        return MinibatchResult(
            loss=0.5 * k,
            entropy=1.0 * k,
            grad_norm=2.0 * k,
            stats={name: float(k * tokens + i) for i, name in enumerate([*names, *more])},
            maxima={"ratio_max": float(k * tokens)},
            num_tokens=tokens,
            skipped=False,
        )

    passes = [tuple(minibatch(k, tokens) for tokens in num_tokens) for k in (1, 2)]
    return [PassResult(minibatches=minibatches) for minibatches in passes]


@pytest.mark.parametrize("own", [(), ("bounded",)])
@pytest.mark.parametrize("once", [(), ONCE])
def test_names_of_the_metrics(once: tuple[str, ...], own: tuple[str, ...]) -> None:
    found = pass_metrics(results_of(*once, *own), Totals())
    of_passes = {f"pass_{k}/{name}" for k in (1, 2) for name in (*IN_A_PASS, *own)}
    assert found.keys() == ALWAYS | of_passes | set(once)


def test_values_of_the_metrics() -> None:
    """Token-weighted: (10 * 10 + 30 * 30) / 40 = 25 a pass, plus the name's place."""
    found = pass_metrics(results_of(*ONCE, "bounded"), Totals(num_optimizer_steps=3))
    order = ("ratio_mean", "ppo_kl", "clip_frac_low", "clip_frac_high", *ONCE, "bounded")
    for k in (1, 2):
        for place, name in enumerate(order):
            if name not in ONCE:
                assert found[f"pass_{k}/{name}"] == 25 * k + place
        assert found[f"pass_{k}/ratio_max"] == 30 * k
        assert found[f"pass_{k}/entropy"] == k and found[f"pass_{k}/grad_norm"] == 2 * k
    assert [found[name] for name in ONCE] == [54, 55, 56]
    assert found["clip_frac"] == 52 + 53 and found["ppo_kl"] == 51
    assert found["ratio_mean_first_pass"] == 10 and found["num_optimizer_steps"] == 7


def test_metrics_of_a_batch_that_is_masked_out_are_nan() -> None:
    found = pass_metrics(results_of(num_tokens=(0, 0)), Totals())
    assert math.isnan(found["pass_1/ratio_mean"]) and math.isnan(found["clip_frac"])
