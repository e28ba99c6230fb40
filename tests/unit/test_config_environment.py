"""What `check` says of an environment's settings and tools, and where prompts tell of tools."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import own_tools
import pytest
from made.configs import run_check, run_config, write_run
from made.tool_templates import tool_tokenizer

from sfpo_megatron.config.environments import told_tools
from sfpo_megatron.config.origin import ConfigError
from sfpo_megatron.config.paths import with_absolute_paths
from sfpo_megatron.config.rules.environment import environment
from sfpo_megatron.config.tree import DataSource, RolloutConfig
from sfpo_megatron.data.prompts import eval_prompts

OWN = f"{own_tools.__name__}:shout"


def problems(chat_template: bool = True, name: str = "math_tool", **args: Any) -> list[str]:
    rollout = {"environment": name, "environment_args": args}
    config = run_config(rollout=rollout, data={"chat_template": chat_template})
    return [f"{problem.key}: {problem.message}" for problem in environment(config)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_turn": 3}, "rollout.environment_args.max_turn: found an unknown key.*max_turns"),
        ({"max_turns": "3"}, "rollout.environment_args.max_turns: found '3'"),
        ({"max_turns": 0}, "rollout.environment_args.max_turns: found 0"),
        ({"tools": "calculator"}, "rollout.environment_args.tools: found 'calculator'.*write a li"),
        ({"tools": ["abacus"]}, r"rollout.environment_args.tools.0: found 'abacus'"),
        ({"tools": ["nowhere:f"]}, r"rollout.environment_args.tools.0: found 'nowhere:f'"),
        ({"tools": ["search"]}, "tool_args.search.path: found nothing, expected a file"),
        ({"tools": ["search"], "tool_args": {"search": {"path": "x"}}}, "'x', which is no file"),
        ({"call_format": "xml"}, "call_format: found 'xml'.*hermes, llama"),
        ({"chat_template": False}, r"data.chat_template: found false with .* math_tool"),
        ({"name": "single_turn", "size": 3}, "rollout.environment_args: found size, expected noth"),
    ],
)
def test_what_is_wrong_is_named(args: dict[str, Any], message: str) -> None:
    (found,) = problems(**args)
    assert re.search(message, found), found


def test_what_is_right_is_not(tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("Paris")
    search = {"search": {"path": str(tmp_path / "facts.txt")}}
    assert not problems()
    assert not problems(tools=["calculator", "search", OWN], tool_args=search)
    assert not problems(name="single_turn", chat_template=False)
    assert not problems(name="mine:Env", chat_template=False, anything=3)


def test_check_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rollout = {"environment": "math_tool", "environment_args": {"max_turns": 0}}
    write_run(rollout=rollout)
    with pytest.raises(ConfigError, match=r"rollout\.environment_args\.max_turns: found 0"):
        run_check()


def test_the_file_that_is_searched_is_found_from_elsewhere() -> None:
    args = {"tools": ("search",), "tool_args": {"search": {"path": "facts.txt", "max_results": 1}}}
    config = run_config(rollout={"environment": "math_tool", "environment_args": args})
    found = with_absolute_paths(config).rollout.environment_args["tool_args"]["search"]
    assert found == {"path": os.path.abspath("facts.txt"), "max_results": 1}


def test_tools_of_an_own_environment_are_told_too() -> None:
    own = RolloutConfig(environment="mine:Env", environment_args={"tools": [OWN], "size": 3})
    told = told_tools(own)
    assert told is not None and told.tools == (OWN,)
    assert told_tools(RolloutConfig(environment="mine:Env", environment_args={"size": 3})) is None
    assert told_tools(RolloutConfig()) is None


def test_prompts_tell_of_the_tools(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "6 * 7 =", "answer": "42"}\n')
    source = DataSource(source="jsonl", path=str(rows))
    texts = []
    for name in ("math_tool", "single_turn"):
        config = run_config(
            rollout={"environment": name, "max_prompt_tokens": 999},
            data={"train": (source,), "eval": (source,), "chat_template": True},
        )
        (prompt,) = eval_prompts(config, tool_tokenizer())
        texts.append(prompt.text)
    assert '"name": "calculator"' in texts[0] and "expression" in texts[0]
    assert "calculator" not in texts[1]
