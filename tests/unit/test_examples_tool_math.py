"""examples/tool_math: what it makes is what its config takes. Not exercised: that it trains."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.data import SFTExamples
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.data.turns import TurnTemplate
from sfpo_megatron.rollout.environments.tool_calls import ToolCall, calls_in
from sfpo_megatron.tools.calculator import calculator

EXAMPLE = Path(__file__).parents[2] / "examples/tool_math"
WORKED = "data.train=[{source: jsonl, path: runs/tool_math/data/worked.jsonl, size: 60}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the example was made."""
    folder = tmp_path_factory.mktemp("tool_math")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make.py"])
        runpy.run_path(str(EXAMPLE / "make.py"), run_name="__main__")
    return folder


def rows_of(made: Path, name: str) -> list[dict[str, Any]]:
    text = (made / f"runs/tool_math/data/{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_teacher_is_right_where_it_asks(made: Path) -> None:
    """And mostly does not; what is held out is in neither other set."""
    num_asked = 0
    worked = rows_of(made, "worked")
    for row in worked:
        asked, *turns = row["messages"]
        calls = calls_in(turns[0]["content"], "hermes")
        num_asked += len(calls)
        if not calls:
            assert len(turns) == 1 and turns[0]["content"].startswith("Answer: ")
            continue
        (call,) = calls
        assert isinstance(call, ToolCall) and call.name == "calculator"
        assert calculator(call.arguments["expression"]) == turns[1]["content"]  # type: ignore[arg-type]
        assert turns[2]["content"] == f"Answer: {turns[1]['content']}"
        a, b = asked["content"].removeprefix("What is ").removesuffix("?").split(" * ")
        assert int(turns[1]["content"]) == int(a) * int(b)
    assert 0.3 < num_asked / len(worked) < 0.4
    questions = [{row["messages"][0]["content"] for row in worked}]
    questions += [{row["prompt"] for row in rows_of(made, name)} for name in ("train", "eval")]
    assert sum(map(len, questions)) == len(set().union(*questions))


def test_the_warm_start_learns_the_turns(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tools before them, as in the prompts of the run; the results are not learned."""
    monkeypatch.chdir(made)
    config = load_config(str(EXAMPLE / "config.yaml"), [WORKED, "model.path=runs/tool_math/model"])
    tokenizer = load_tokenizer(config.model.path)
    assert TurnTemplate(tokenizer, {}, [tokenizer.eos_token_id], role="tool")
    examples = SFTExamples(config, tokenizer).next_batch(20)
    example = next(one for one in examples if not all(one.learned))
    prompt = tokenizer.decode(example.prompt_ids)
    assert prompt.startswith("<|im_start|>system\nTools: calculator(expression)<|im_end|>")
    pairs = list(zip(example.response_ids, example.learned, strict=True))
    learned = tokenizer.decode([token for token, is_learned in pairs if is_learned])
    between = tokenizer.decode([token for token, is_learned in pairs if not is_learned])
    assert learned.startswith("<tool_call>") and learned.count("<|im_end|>") == 2
    assert between.startswith("\n<|im_start|>tool\n") and "Answer" not in between


def test_check_takes_it(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    assert cli.main(["check", str(EXAMPLE / "config.yaml"), "model.path=runs/tool_math/model"]) == 0
    assert "warning" not in capsys.readouterr().err
