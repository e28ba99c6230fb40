"""examples/game: the game, by a scripted model, and what it makes is what its config takes.

Not exercised: that it trains.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.game.game import HigherLower, reply
from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.rollout.sampling import Completion
from sfpo_megatron.types import Prompt

EXAMPLE = Path(__file__).parents[2] / "examples/game"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the example was made."""
    folder = tmp_path_factory.mktemp("game")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make.py"])
        patch.syspath_prepend(str(EXAMPLE))
        runpy.run_path(str(EXAMPLE / "make.py"), run_name="__main__")
    return folder


class Scripted(Generate):
    """A model that says these turns, and keeps what it was shown."""

    context_tokens, temperature, top_p = 150, 1.0, 1.0

    def __init__(self, tokenizer: Any, turns: Sequence[str]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.seen: list[str] = []

    async def __call__(self, token_ids: Sequence[int], **_: Any) -> Completion:  # type: ignore[override]
        self.seen.append(self.tokenizer.decode(token_ids))
        ids = self.tokenizer.encode(self.turns.pop(0), add_special_tokens=False)
        tokens = (*ids, self.tokenizer.eos_token_id)
        return Completion(token_ids=tokens, logprobs=(-0.5,) * len(tokens), finished=True)

    def branch(self, number: int) -> Generate:
        raise NotImplementedError


def play(made: Path, number: int, turns: Sequence[str]) -> tuple[Episode, Scripted]:
    tokenizer = load_tokenizer(str(made / "runs/game/model"))
    asked = [{"role": "user", "content": "Game 7: guess my number, 1 to 15."}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    prompt = Prompt(id="p/0", text="", token_ids=tuple(ids), question="", answer=str(number))
    model = Scripted(tokenizer, turns)
    game = HigherLower(tokenizer, max_turns=4)
    return asyncio.run(game.run(prompt, model, 0)), model


def test_a_game_that_is_won(made: Path) -> None:
    episode, model = play(made, 6, ["8", "four", " 6 ", "7"])
    assert model.turns == ["7"], "it went on"
    assert model.seen[-1].endswith(
        "<|im_start|>assistant\n8<|im_end|>\n<|im_start|>user\nlower<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nA number, please.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert episode.reward == 1.0 and episode.finished
    assert episode.metrics["turns"] == 3 and episode.metrics["no_number"] == 1


def test_a_game_that_is_lost(made: Path) -> None:
    episode, model = play(made, 15, ["8", "12", "13", "14"])
    assert not model.turns
    assert episode.reward == 0.0 and not episode.finished
    assert episode.metrics["found"] == 0 and episode.metrics["stop_turns"] == 1
    said = [
        token
        for token, ours in zip(episode.token_ids, episode.response_mask, strict=True)
        if not ours
    ]
    assert model.tokenizer.decode(said).count("higher") == 3


def test_replies() -> None:
    assert [reply(turn, 9) for turn in ("8", "9", "10", "", "9.0", "\u0669")] == [
        "higher", "", "lower", *["A number, please."] * 3,
    ]  # fmt: skip


def test_the_player_halves_in_one_game_of_three(made: Path) -> None:
    """The others begin with 8 once in 15. No guess is one that a reply has ruled out, and what is
    held out is in neither other set."""
    rows = {
        name: [json.loads(line) for line in (made / f"runs/game/data/{name}.jsonl").open()]
        for name in ("worked", "train", "eval")
    }
    first = [[message["content"] for message in row["messages"]] for row in rows["worked"]]
    assert 0.35 < sum(turns[1] == "8" for turns in first) / len(first) < 0.41
    for _, *turns in first:
        told = dict(zip(map(int, turns[::2]), turns[1::2], strict=False))
        low = max((guess for guess, said in told.items() if said == "higher"), default=0)
        high = min((guess for guess, said in told.items() if said == "lower"), default=16)
        assert all(low < guess < high for guess in map(int, turns[len(told) * 2 :: 2]))
    assert max(len(turns) for turns in first) == 8
    questions = [{turns[0] for turns in first}]
    questions += [{row["prompt"] for row in rows[name]} for name in ("train", "eval")]
    assert sum(map(len, questions)) == len(set().union(*questions)) == 8012


def test_check_takes_it(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(EXAMPLE.parents[1]))
    assert cli.main(["check", str(EXAMPLE / "config.yaml"), "model.path=runs/game/model"]) == 0
    assert "warning" not in capsys.readouterr().err
    config = load_config(str(EXAMPLE / "config.yaml"), [])
    assert config.rollout.environment_args == {"max_turns": 4}
