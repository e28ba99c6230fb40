"""After a refit, a running engine is the engine that would start on the new weights.

Reference: a fresh engine on the new checkpoint, and transformers. Not exercised: bf16, more than
one engine, and the trainer's own gathering (tests/dist and the trainer's e2e test do that).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import pytest
import tiny
from engines import assert_is_model, greedy, refit, rollouts

from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import RolloutError


def test_tied_engine_equals_a_fresh_one(
    tied: RolloutClient, llm: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    before = rollouts(tied)
    refit(tied, models["tied_b"], 1, tmp_path)
    after = rollouts(tied)
    fresh = greedy(llm, num_samples=2)
    assert [r.token_ids for r in after] == [tokens for tokens, _ in fresh]
    for rollout, (_, logprobs) in zip(after, fresh, strict=True):
        assert rollout.generator_logprobs == pytest.approx(logprobs, abs=1e-4)
    assert_is_model(after, models["tied_b"])
    # The models differ enough for the comparison to mean something.
    assert sum(a.token_ids != b.token_ids for a, b in zip(before, after, strict=True)) == len(after)
    assert {r.weight_version for r in after} == {1}


def test_untied_tensor_parallel_engine_equals_the_model(
    untied_tp2: RolloutClient, models: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM splits the full tensors over its two ranks itself, vocabulary and fused qkv included."""
    assert_is_model(rollouts(untied_tp2), models["untied_a"])
    refit(untied_tp2, models["untied_b"], 1, tmp_path)
    assert_is_model(rollouts(untied_tp2), models["untied_b"])
    refit(untied_tp2, models["untied_a"], 2, tmp_path)
    made = rollouts(untied_tp2)
    assert_is_model(made, models["untied_a"])
    assert {r.weight_version for r in made} == {2}


def test_prefix_cache_is_forgotten(
    tied: RolloutClient, models: dict[str, Path], tmp_path: Path
) -> None:
    """Fails without `Engine.forget_prefixes`: shown by an engine that lacks it."""
    client: Any = tied
    refit(tied, models["tied_a"], 5, tmp_path)
    rollouts(tied)  # fills the cache with tied_a's keys and values
    client.calls.wait(client.calls.controller.set_forgets.remote(False), "test")
    try:
        refit(tied, models["tied_b"], 6, tmp_path)
        with pytest.raises(AssertionError):
            assert_is_model(rollouts(tied), models["tied_b"])
    finally:
        client.calls.wait(client.calls.controller.set_forgets.remote(True), "test")
    refit(tied, models["tied_b"], 7, tmp_path)
    assert_is_model(rollouts(tied), models["tied_b"])


def test_refused_while_generating(
    tied: RolloutClient, models: dict[str, Path], tmp_path: Path
) -> None:
    """And the engine stays usable: nothing was paused or begun."""
    refit(tied, models["tied_b"], 8, tmp_path)
    tied.submit(fleet.make_request("long", temperature=1.0, max_response_tokens=200))
    with pytest.raises(RolloutError, match="refit refused: request long is still generating"):
        refit(tied, models["tied_a"], 9, tmp_path)
    assert len(tied.collect("long")) == 16
    assert_is_model(rollouts(tied), models["tied_b"])


@pytest.mark.parametrize("kind", ["tied", "untied_tp2"])
def test_wrong_weights_are_named_before_anything_is_sent(
    kind: str,
    tied: RolloutClient,
    untied_tp2: RolloutClient,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    """vLLM alone takes a fused qkv without its k half; here rank 0 gets the tensor's name."""
    client = tied if kind == "tied" else untied_tp2
    model = models["tied_b" if kind == "tied" else "untied_b"]
    refit(client, model, 3, tmp_path)
    state = tiny.load_state(model)
    name = "model.layers.1.self_attn.k_proj.weight"
    wrong = {
        "missing from what": {n: t for n, t in state.items() if n != name},
        "no such tensor": state | {"model.layers.9.mlp.up_proj.weight": state[name]},
        "found shape": state | {name: state[name][:-1]},
        "found dtype torch.bfloat16": state | {name: state[name].bfloat16()},
    }
    for message, tensors in wrong.items():
        source = fleet.StateSource(tensors)
        config = fleet.make_config(model, tmp_path)
        sender = Refit(config, source=source, client=client.sync_client)
        expected = "model.layers.9.mlp.up_proj.weight" if "no such" in message else name
        with pytest.raises(RolloutError, match=f"preparing a refit: {expected}.*{message}"):
            sender.send(4)
    made = rollouts(client)
    assert {r.weight_version for r in made} == {3}
    assert_is_model(made, model)


@pytest.mark.full
def test_a_quantized_engine_equals_a_fresh_one(
    start: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    """rollout.quantization: vLLM quantizes what it is sent, as it does what it loads."""
    refitted, fresh = (
        start(models[name], dtype="bfloat16", quantization="fp8_per_channel")
        for name in ("untied_a", "untied_b")
    )
    for client in (refitted, fresh):
        client.wait_ready(280)
    before, expected = rollouts(refitted), rollouts(fresh)
    state = {n: t.bfloat16() for n, t in tiny.load_state(models["untied_b"]).items()}
    sender = Refit(
        fleet.make_config(models["untied_b"], tmp_path, dtype="bfloat16"),
        source=fleet.StateSource(state),
        client=refitted.sync_client,
    )
    sender.send(1)
    sender.close()
    after = rollouts(refitted)
    assert [r.token_ids for r in after] == [r.token_ids for r in expected]
    assert [r.token_ids for r in after] != [r.token_ids for r in before]
    for found, wanted in zip(after, expected, strict=True):
        assert found.generator_logprobs == pytest.approx(wanted.generator_logprobs, abs=1e-4)
