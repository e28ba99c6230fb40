"""An environment of one's own on a real engine: examples/your_own/environment.py, and what it does.

What the engine says of a second turn is held to transformers over the whole rollout, as the trainer
will compute it. Not exercised: several engines, their loss in the middle of an episode
(tests/unit/test_episodes.py).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import digits
import fleet
import pytest
import tiny
import torch
from safetensors.torch import load_file

from sfpo_megatron.batching import BatchLayout, build_minibatches
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.errors import RolloutError
from sfpo_megatron.rollout.reports import environment_metrics
from sfpo_megatron.types import RolloutBatch

EXAMPLES = Path(__file__).parents[2] / "examples" / "your_own"
OWN = """
from dataclasses import replace
from environment import AnswerThenCheck

class Checked(AnswerThenCheck):
    text = "1+2=3*4"  # the tiny model knows no letters

    async def run(self, prompt, generate, seed):
        if prompt.text == "raise":
            raise LookupError("no such tool")
        print("episode of", prompt.id)

        async def short(token_ids):
            "A turn of at most five tokens that counts as ended: a random model hardly ends any."
            return replace(await generate(token_ids, max_tokens=5), finished=True)

        is_short = int(prompt.id[-1]) % 2 == 0
        episode = await super().run(prompt, short if is_short else generate, seed)
        return replace(episode, reward=0.25) if prompt.id == "made/0" else episode
"""
CHECK = "1+2=3*4"


@pytest.fixture(scope="module")
def checked(
    start: Any, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> RolloutClient:
    """Started on tied_a; its module is found by PYTHONPATH, in the controller's actor too."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "checked_environment.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        for path in (str(EXAMPLES), str(folder)):
            patch.syspath_prepend(path)
            patch.setenv("PYTHONPATH", path, prepend=os.pathsep)
        client = start(models["tied_a"], environment="checked_environment:Checked")
    client.wait_ready(300)
    return client


def test_two_turns_are_a_trainable_batch(checked: RolloutClient, models: dict[str, Path]) -> None:
    """Log-probs of both turns are within 1e-4 of transformers' over the whole rollout, and the loss
    covers them and nothing between them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models["tied_a"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["tied_a"])
    said = tokenizer.encode(CHECK, add_special_tokens=False)
    assert len(said) == len(CHECK)
    checked.submit(fleet.make_request("turns", temperature=2.0, max_response_tokens=40))
    made = checked.collect("turns")
    num_turns = []
    for rollout in made:
        mask, ids = torch.tensor(rollout.response_mask), torch.tensor(rollout.token_ids)
        (told,) = (~mask).nonzero(as_tuple=True)
        num_turns.append(1 + bool(told.numel()))
        if told.numel():
            first = int(told[0])
            assert first == 5 or ids[first - 1] == tiny.EOS, "the first turn did not end"
            assert ids[told].tolist() == said[: told.numel()]
            assert told.tolist() == list(range(first, first + told.numel()))
        assert len(ids) <= 40 and (rollout.finished or len(ids) == 40)
        whole = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(whole).logits[0, len(rollout.prompt_token_ids) - 1 : -1].double()
        wanted = (logits / 2.0).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        found = torch.tensor(rollout.generator_logprobs, dtype=torch.float64)
        assert (wanted - found)[mask].abs().max() < 1e-4
        assert rollout.reward == 0.25 if rollout.prompt_id == "made/0" else rollout.reward == 0
    assert num_turns.count(2) >= 8 and num_turns.count(1) > 1

    batch = RolloutBatch.from_rollouts(made, 2)
    layout = BatchLayout(minibatches=2, data_rank=0, data_size=1, max_tokens=400)
    minibatches = build_minibatches(batch, torch.ones(batch.num_rollouts), layout)
    valid = sum(minibatch.global_valid_tokens for minibatch in minibatches)
    assert valid == sum(sum(rollout.response_mask) for rollout in made)
    wanted = {"environment/tokens": valid / len(made), "environment/reward": 0.25}
    assert environment_metrics(made) == wanted


def test_the_same_request_gives_the_same_episodes(checked: RolloutClient) -> None:
    found = []
    for _ in range(2):
        checked.submit(fleet.make_request("again", temperature=2.0, max_response_tokens=60))
        found.append([(r.token_ids, r.response_mask) for r in checked.collect("again")])
    assert found[0] == found[1]


def test_what_it_raises_is_named_and_the_controller_lives(checked: RolloutClient) -> None:
    raising = dataclasses.replace(fleet.PROMPTS[3], text="raise")
    checked.submit(fleet.make_request("raises", prompts=(fleet.PROMPTS[2], raising)))
    wanted = r"checked_environment:Checked raised LookupError: no such tool on prompt made/3;"
    with pytest.raises(RolloutError, match=wanted):
        checked.collect("raises")
    checked.submit(fleet.make_request("after"))
    assert len(checked.collect("after")) == 16


TWO_TURNS = """
from dataclasses import replace

from sfpo_megatron.rollout.episodes import Episode

class TwoTurns:
    def __init__(self, tokenizer):
        self.more = tokenizer.encode("=", add_special_tokens=False)

    async def run(self, prompt, generate, seed):
        episode = Episode().then(await generate(prompt.token_ids, max_tokens=3)).told(self.more)
        episode = episode.then(await generate((*prompt.token_ids, *episode.token_ids)))
        return replace(episode, reward=float(seed % 2))  # a random model solves nothing
"""


@pytest.mark.full
def test_a_run_trains_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP2, with the module in the working directory: the engine's log-probs are the trainer's, over
    the generated tokens alone."""
    (tmp_path / "two_turns.py").write_text(TWO_TURNS)
    monkeypatch.chdir(tmp_path)
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        train={"num_steps": 2},
        rollout={"environment": "two_turns:TwoTurns"},
        debug={"save_rollouts": str(tmp_path / "rollouts.safetensors")},
    )
    digits.train(config)
    lines, _ = digits.read_metrics(tmp_path / "run")
    saved = load_file(tmp_path / "rollouts.safetensors")
    for step, line in enumerate(lines, start=1):
        mask, lengths = saved[f"{step}.response_mask"], saved[f"{step}.response_lengths"]
        assert line["logprob_diff_max"] < 1e-3 and line["grad_norm"] > 0
        assert line["response_tokens_mean"] == pytest.approx(int(mask.sum()) / lengths.numel())
        assert int((~mask).sum()) == lengths.numel()  # one token each is the environment's
