"""What comes back for a request: order, seeds, logprobs, ends, scores; and what is refused.

Not exercised: several engines (test_kills.py), and a real task.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import fleet
import pytest
import tiny
import torch

from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.types import Rollout


def rollouts(client: RolloutClient, **changes: Any) -> list[Rollout]:
    client.submit(fleet.make_request("generation", **changes))
    return client.collect("generation")


def test_order_and_fields(tied: RolloutClient) -> None:
    tied.submit(fleet.make_request("generation", num_samples=3, temperature=1.0))
    scored = tied.collect_scored("generation")
    made = scored.rollouts
    assert [(r.prompt_id, r.sample) for r in made] == [
        (prompt.id, sample) for prompt in fleet.PROMPTS for sample in range(3)
    ]
    for rollout, prompt in zip(made, [p for p in fleet.PROMPTS for _ in range(3)], strict=True):
        assert rollout.prompt_token_ids == prompt.token_ids
        assert 1 <= len(rollout.token_ids) <= 16
        assert len(rollout.generator_logprobs) == len(rollout.token_ids)
        assert rollout.correct == (rollout.reward >= 1)
    assert scored.times.generate_s > 0


def test_samples_depend_on_the_seed_only(tied: RolloutClient) -> None:
    """The same step again: the same. Another step, another sample: others."""
    first = rollouts(tied, num_samples=4, temperature=1.0)
    assert first == rollouts(tied, num_samples=4, temperature=1.0)
    other = rollouts(tied, num_samples=4, temperature=1.0, step=2)
    assert [r.token_ids for r in first] != [r.token_ids for r in other]
    for start in range(0, len(first), 4):
        assert len({r.token_ids for r in first[start : start + 4]}) == 4


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logprobs_are_of_the_sampled_distribution(
    untied_tp2: RolloutClient, models: dict[str, Path], top_p: float
) -> None:
    """T=0.7: equal to transformers' log-softmax after temperature (and top_p) within 1e-4.

    Reads the weights that test_refit left behind, so it asks the engine which model that is.
    """
    from transformers import AutoModelForCausalLM

    model = models["untied_a" if untied_tp2.health().weight_version in (0, 2) else "untied_b"]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for rollout in rollouts(untied_tp2, temperature=0.7, top_p=top_p):
        ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(rollout.prompt_token_ids) - 1 : -1].double()
        logits = logits / 0.7
        if top_p < 1:
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered > top_p
            logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
        tokens = torch.tensor(rollout.token_ids)[:, None]
        expected = logits.log_softmax(-1).gather(-1, tokens)[:, 0]
        found = torch.tensor(rollout.generator_logprobs, dtype=torch.float64)
        assert (expected - found).abs().max() < 1e-4


def test_responses_end_at_eos_or_at_the_limit(tied: RolloutClient) -> None:
    """At T=2 EOS has a chance at every token: of 128 responses of up to 100, some end early."""
    made = rollouts(tied, num_samples=16, temperature=2.0, max_response_tokens=100)
    ended = [r for r in made if r.finished]
    cut = [r for r in made if not r.finished]
    assert ended and cut
    for rollout in ended:
        assert rollout.token_ids[-1] == tiny.EOS and tiny.EOS not in rollout.token_ids[:-1]
        assert "<eos>" not in rollout.text
    for rollout in cut:
        assert len(rollout.token_ids) == 100 and tiny.EOS not in rollout.token_ids


def test_health_is_answered_while_generating(tied: RolloutClient) -> None:
    tied.submit(fleet.make_request("busy", temperature=1.0, num_samples=4, max_response_tokens=200))
    began = time.monotonic()
    health = tied.health()
    assert time.monotonic() - began < 2
    assert health.engines_alive == (True,) and health.num_unfinished_requests == 1
    assert len(tied.collect("busy")) == 32
    assert tied.health().num_unfinished_requests == 0


def test_wrong_requests_are_refused(tied: RolloutClient) -> None:
    long = dataclasses.replace(fleet.PROMPTS[0], id="made/long", token_ids=(5,) * 101)
    with pytest.raises(RolloutError, match=r"prompt made/long: found 101 tokens.*\(100\)"):
        tied.submit(fleet.make_request("long", prompts=(long,)))
    with pytest.raises(RolloutError, match=r"found max_response_tokens 257"):
        tied.submit(fleet.make_request("greedy", max_response_tokens=257))
    with pytest.raises(RolloutError, match="never submitted"):
        tied.collect("unheard-of")
    tied.submit(fleet.make_request("twice"))
    with pytest.raises(RolloutError, match="already submitted"):
        tied.submit(fleet.make_request("twice"))
    assert len(tied.collect("twice")) == 16


def test_every_server_listens_on_loopback(tied: RolloutClient) -> None:
    """Ray's servers, the engines' and the driver's own: none is reached from outside."""
    import psutil

    tied.health()
    driver = psutil.Process()
    family = {process.pid: process.name() for process in driver.children(recursive=True)}
    family[driver.pid] = "driver"
    listening = {
        (family[connection.pid], connection.laddr.ip.removeprefix("::ffff:"))
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in family
    }
    assert any(name == "gcs_server" for name, _ in listening), listening
    assert {address for _, address in listening} <= {"127.0.0.1", "::1"}, listening
