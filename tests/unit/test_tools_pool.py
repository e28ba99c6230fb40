"""Tools in their processes: results, errors for the model, and that one call harms no other.

Not exercised: the controller's actor (tests/e2e/test_tools.py).
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import own_tools
import pytest
from made.processes import gone

from sfpo_megatron.config.environments import ToolArgs
from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.plugins import TOOL, PluginError
from sfpo_megatron.sandbox.process import CannotServe
from sfpo_megatron.tools.declared import choices_of, schemas_of
from sfpo_megatron.tools.pool import ToolPool, ToolResult, ToolsFailed

OWN = own_tools.__name__
SHOUT = f"{OWN}:shout"


@pytest.fixture(scope="module", autouse=True)
def path() -> Iterator[None]:
    """Tool processes find the module too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


def pool_of(*tools: str, num_workers: int = 1, **tool_args: dict[str, object]) -> ToolPool:
    args = ToolArgs(tools=tools, tool_args=tool_args)
    return ToolPool(choices_of(args), timeout_s=0.5, num_workers=num_workers)


@pytest.fixture(scope="module")
def pool() -> Iterator[ToolPool]:
    made = pool_of("calculator", "python", SHOUT, shout={"times": 2})
    yield made
    made.close()


def call(pool: ToolPool, name: str, **arguments: object) -> ToolResult:
    return asyncio.run(pool.call(name, arguments))


def test_results(pool: ToolPool) -> None:
    assert call(pool, "calculator", expression="6*7") == ToolResult(text="42")
    assert call(pool, "shout", text="hi") == ToolResult(text="HIHI")
    assert call(pool, "python", code="6*7") == ToolResult(text="42")


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("calculator", {"expression": "1/0"}, "division by zero"),
        ("calculator", {"x": "1"}, "unknown argument 'x'; the arguments are: expression"),
        ("calculator", {}, "no argument 'expression'; the arguments are: expression"),
        ("abacus", {}, "unknown tool 'abacus'; the tools are: calculator, python, shout"),
        ("shout", {"text": "raise"}, "LookupError: no such word"),
        ("shout", {"text": "exit"}, "SystemExit: gone"),
        ("shout", {"text": "a", "times": 9}, "unknown argument 'times'; the arguments are: text"),
        ("shout", {"text": "memory"}, "MemoryError: "),
        ("shout", {"text": "crash"}, "shout crashed, or took more memory than it may"),
        ("shout", {"text": "hang"}, "shout took longer than 0.5 s"),
        ("shout", {"text": "flood"}, "shout took longer than 0.5 s"),
    ],
)
def test_errors_are_told_and_the_next_call_is_answered(
    pool: ToolPool, name: str, arguments: dict[str, object], text: str
) -> None:
    assert call(pool, name, **arguments) == ToolResult(text=text, failed=True)
    assert call(pool, "calculator", expression="6*7") == ToolResult(text="42")


def test_a_long_result_is_bounded(pool: ToolPool) -> None:
    assert len(call(pool, "shout", text="long").text) == 100_000


def test_a_program_that_hangs_does_not_cost_its_process(pool: ToolPool) -> None:
    before = pool.pids
    assert call(pool, "python", code="while True: pass").text.endswith("took longer than 0.5 s]")
    assert pool.pids == before


def test_what_a_call_leaves_behind_is_ended(pool: ToolPool) -> None:
    assert gone(int(call(pool, "shout", text="leave").text[:9]))


def test_a_process_that_was_killed_while_it_was_idle_is_replaced(pool: ToolPool) -> None:
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert call(pool, "shout", text="hi") == ToolResult(text="HIHI")
    assert pool.pids != [pid]


def mapped(mib: int) -> str:
    return f"import mmap\nlen(mmap.mmap(-1, {mib} << 20)) >> 20"


@pytest.fixture
def roomy() -> Iterator[ToolPool]:
    """Programs may have more memory than the process that starts them takes for itself."""
    made = pool_of("python", SHOUT, python={"memory_mib": 1536, "timeout_s": 20.0})
    yield made
    made.close()


def test_a_program_has_the_memory_that_is_set_and_the_process_its_own(roomy: ToolPool) -> None:
    assert call(roomy, "python", code=mapped(1200)) == ToolResult(text="1200")
    assert "Cannot allocate memory" in call(roomy, "python", code=mapped(1600)).text
    own = call(roomy, "shout", text="map")
    assert own.failed and "Cannot allocate memory" in own.text


def test_a_machine_that_begins_no_program_ends_the_run(roomy: ToolPool) -> None:
    """If it had begun some before, each call tells the model of it, up to a limit."""
    assert call(roomy, "python", code="6*7") == ToolResult(text="42")
    (pid,) = roomy.pids
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 30, 1 << 30))
    told = call(roomy, "python", code="6*7")
    assert told.failed and told.text.startswith("an interpreter ended with 1 before its program b")
    assert told.text.rstrip().endswith("ValueError: not allowed to raise maximum limit")
    with pytest.raises(ToolsFailed, match=r"^16 calls of the tool python in a row"):
        for _ in range(15):
            assert call(roomy, "python", code="6*7").failed


def test_calls_share_the_processes() -> None:
    pool = pool_of("calculator", num_workers=2)

    async def many() -> list[ToolResult]:
        calls = (pool.call("calculator", {"expression": f"{n}+1"}) for n in range(40))
        return await asyncio.gather(*calls)

    pids = pool.pids
    assert [result.text for result in asyncio.run(many())] == [str(n + 1) for n in range(40)]
    pool.close()
    assert len(pids) == 2 and all(map(gone, pids))


def test_tools_that_cannot_be_had_are_named() -> None:
    with pytest.raises(CannotServe, match=f"^tool {SHOUT} raised ValueError: times: found a neg"):
        pool_of(SHOUT, shout={"times": -1})
    with pytest.raises(PluginError, match=r"tool_args\.shout: found volume, .* settings: times;"):
        pool_of(SHOUT, shout={"volume": 1})
    with pytest.raises(PluginError, match=r"tool_args\.needs: found no file, .*; set file"):
        pool_of(f"{OWN}:needs")


# ---- what a model is told ----------------------------------------------------------------------


def test_schemas_are_those_of_the_field_without_settings() -> None:
    (schema,) = schemas_of(choices_of(ToolArgs(tools=(SHOUT,), tool_args={"shout": {"times": 2}})))
    text = {"type": "string", "description": "What to say."}
    parameters = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    function = {"name": "shout", "description": "Say it louder.", "parameters": parameters}
    assert schema == {"type": "function", "function": function}
    searched = ToolArgs(tools=("search",), tool_args={"search": {"path": "f"}})
    for choice in (*choices_of(ToolArgs(tools=("calculator", "python"))), *choices_of(searched)):
        assert schemas_of([choice])[0]["type"] == "function"


def test_a_function_that_says_too_little_is_refused() -> None:
    with pytest.raises(PluginError, match=r"untyped, of which a model cannot be told .*; add them"):
        schemas_of(choices_of(ToolArgs(tools=(f"{OWN}:untyped",))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tools": ("abacus",)}, r"^tools\.0: found 'abacus', expected one of calculator, python"),
        ({"tools": (SHOUT, "other:shout")}, "each name once; remove one shout"),
        ({"tool_args": {"search": {}}}, r"^tool_args\.search: .* one of calculator; correct"),
        ({"tool_args": {"calculator": 3}}, "expected a section of keys"),
        ({"max_turns": 0}, "max_turns"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        ToolArgs(**settings)  # type: ignore[arg-type]


def test_tools_are_found_without_an_import() -> None:
    TOOL.find(SHOUT)
    TOOL.find("calculator")
    with pytest.raises(PluginError, match="nothing that can be called 'whisper'"):
        TOOL.find(f"{OWN}:whisper")
