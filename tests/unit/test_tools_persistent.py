"""The tool python with an interpreter that an episode keeps: what it keeps, and what ends it.

Not exercised: the controller's actor, machines without `unshare`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.config.environments import ToolArgs
from sfpo_megatron.sandbox.isolation import isolation
from sfpo_megatron.sandbox.kept_interpreter import Session
from sfpo_megatron.sandbox.process import CannotServe, DidNotStart
from sfpo_megatron.tools import interpreters
from sfpo_megatron.tools.declared import choices_of, schemas_of
from sfpo_megatron.tools.pool import ToolPool, ToolResult, ToolsFailed

PERSISTENT = {"interpreter": "persistent", "timeout_s": 20.0}
GONE = "; the next call gets a fresh interpreter, without what was defined]"


def pool_of(**settings: object) -> ToolPool:
    args = ToolArgs(tools=("python", "calculator"), tool_args={"python": settings})
    return ToolPool(choices_of(args), timeout_s=5.0, num_workers=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[ToolPool]:
    made = pool_of(**PERSISTENT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def brief() -> Iterator[ToolPool]:
    """Half a second for a call."""
    made = pool_of(interpreter="persistent", timeout_s=0.5)
    yield made
    made.close()


def episode(pool: ToolPool, *programs: str) -> list[ToolResult]:
    async def calls() -> list[ToolResult]:
        with pool.episode():
            return [await pool.call("python", {"code": code}) for code in programs]

    return asyncio.run(calls())


def texts(pool: ToolPool, *programs: str) -> list[str]:
    results = episode(pool, *programs)
    assert not any(result.failed for result in results), results
    return [result.text for result in results]


def test_annotations_are_values_as_in_any_program(pool: ToolPool) -> None:
    """The interpreter's own `from __future__` is none of the program's."""
    (found,) = texts(pool, "class A:\n  x: int\nA.__annotations__")
    assert found == "{'x': <class 'int'>}"


def test_what_one_call_defines_the_next_one_has(pool: ToolPool) -> None:
    found = texts(
        pool,
        "import math\nx = 3\ndef f(n): return n * x",
        "f(math.floor(2.5))",
        "open('f', 'w').write('kept')\nprint('a')\nprint('b', end='')",
        "x += 1\nf(open('f').read())",
        "raise SystemExit",
        "print(x)\ny",
        "import sys\nprint('err', file=sys.stderr)\nx",
    )
    assert found[:5] == ["", "6", "a\nb", "'keptkeptkeptkept'", ""]
    assert found[5].startswith("4\nTraceback") and found[5].endswith("name 'y' is not defined")
    assert found[6] == "err\n4"


def test_episodes_have_interpreters_of_their_own(pool: ToolPool) -> None:
    """Side by side too; calls of one turn are made in their order."""

    async def one(number: int) -> list[str]:
        with pool.episode():
            codes = [f"x = {number}", "x += 100", "x"]
            results = await asyncio.gather(*(pool.call("python", {"code": c}) for c in codes))
            await asyncio.sleep(0)
            again = await pool.call("python", {"code": "x + 0.5"})
        return [results[-1].text, again.text]

    async def all_of_them() -> list[list[str]]:
        return await asyncio.gather(*map(one, range(5)))

    assert asyncio.run(all_of_them()) == [[f"{n + 100}", f"{n + 100}.5"] for n in range(5)]
    assert "is not defined" in texts(pool, "x")[0]


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("print('seen')\nwhile True: pass", "seen\n[ended: it took longer than 0.5 s"),
        ("import time\ntime.sleep(60)", "[ended: it took longer than 0.5 s"),
        ("import ctypes\nctypes.string_at(0)", "[ended by signal 11"),
        ("import os\nos._exit(0)", "[ended: the program has ended its interpreter"),
        (
            "import os\n"
            "for fd in range(3, 99):\n  try: os.write(fd, b'x' * 99)\n  except OSError: pass",
            "[ended",
        ),
        ("import os\nos.closerange(3, 99)", "[ended"),
    ],
)  # fmt: skip
def test_a_lost_interpreter_is_told_and_a_fresh_one_follows(
    brief: ToolPool, program: str, how: str
) -> None:
    first, lost, fresh, again = episode(brief, "x = 1", program, "'x' in globals()", "1 + 1")
    assert first == ToolResult(text="")
    assert lost.failed and how in lost.text and lost.text.endswith(GONE)
    assert fresh == ToolResult(text="False") and again == ToolResult(text="2")


@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("y = 'a' * (1 << 30)", "MemoryError"),
        ("for _ in range(3000): print('x' * 999)", "[more output is not shown]"),
        ("while True: print('x' * 999)", "[more output is not shown]"),
        ("import io, sys\nsys.stdout = io.StringIO()\nsys.stderr.close()\n1 / 0", ""),
        ("open('f', 'w').write('x' * (2 << 20))", "File too large"),
        ("open('/etc/passwd')", "'/etc/passwd'"),
        ("import os\nos.environ['A_TOKEN']", "KeyError: 'A_TOKEN'"),
    ],
)
def test_limits_are_those_of_a_fresh_one(
    pool: ToolPool, monkeypatch: pytest.MonkeyPatch, program: str, ending: str
) -> None:
    """And cost nothing that was defined."""
    monkeypatch.setenv("A_TOKEN", "secret")
    _, found, after = texts(pool, "x = 1", program, "x")
    assert found.endswith(ending) and len(found) < 21_000
    assert after == "1"


def test_arguments_are_checked(pool: ToolPool) -> None:
    async def calls() -> list[ToolResult]:
        with pool.episode():
            return [await pool.call("python", args) for args in ({}, {"code": "1", "x": 2})]

    assert [result.text for result in asyncio.run(calls())] == [
        "no argument 'code'; the arguments are: code",
        "unknown argument 'x'; the arguments are: code",
    ]


@pytest.mark.skipif(not isolation().processes, reason="unshare is not allowed here")
def test_nothing_is_left_of_an_episode() -> None:
    """Not of one that was cancelled in mid-call either."""
    pool = pool_of(**PERSISTENT)
    mark = f"62.{os.getpid()}"
    start = (
        "import os\nif os.fork() == 0:\n"
        f"  os.setsid(); os.execvp('sleep', ['sleep', '{mark}'])\nx = 1"
    )

    async def cancelled() -> None:
        with pool.episode():
            await pool.call("python", {"code": start})
            async with asyncio.timeout(0.3):
                await pool.call("python", {"code": "import time\ntime.sleep(60)"})

    assert texts(pool, start, "x") == ["", "1"]
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(cancelled())
    pool.close()
    assert time.monotonic() - begun < 15
    time.sleep(0.2)
    commands = [Path("/proc", pid, "cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [path for path in commands if path.exists() and mark in path.read_text()]


def test_a_long_program_is_handed_over(pool: ToolPool) -> None:
    """Longer than a pipe holds."""
    assert texts(pool, f"x = {'1' * 1000 + ' + 0'} # {'é' * 200_000}\nlen(str(x))") == ["1000"]


def test_what_the_model_is_told_and_what_is_refused() -> None:
    args = ToolArgs(tools=("python",), tool_args={"python": {"interpreter": "persistent"}})
    (schema,) = schemas_of(choices_of(args))
    assert "Variables are kept from call to call." in str(schema)
    (schema,) = schemas_of(choices_of(ToolArgs(tools=("python",))))
    assert "kept" not in str(schema) and "interpreter" not in str(schema)
    with pytest.raises(CannotServe, match="interpreter: found 'eternal', expected one of fresh, p"):
        pool_of(interpreter="eternal")


@pytest.mark.parametrize("error", [DidNotStart("no namespace"), OSError(24, "Too many open files")])
def test_an_interpreter_that_cannot_be_started_is_told_to_the_model(
    pool: ToolPool, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**settings: object) -> Session:
        raise error

    monkeypatch.setattr(interpreters, "Session", refuse)
    (result,) = episode(pool, "1")
    assert result.failed and f"no interpreter could be started ({error})" in result.text


def test_an_interpreter_that_can_never_be_started_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were told of in earlier episodes count too; one that starts begins the count
    again."""

    def refuse(**settings: object) -> Session:
        raise DidNotStart("no namespace")

    pool = pool_of(**PERSISTENT)
    with monkeypatch.context() as patch:
        patch.setattr(interpreters, "Session", refuse)
        assert all(result.failed for result in episode(pool, *["1"] * 15))
    assert texts(pool, "1") == ["1"]
    monkeypatch.setattr(interpreters, "Session", refuse)
    assert all(result.failed for result in episode(pool, *["1"] * 15))
    with pytest.raises(ToolsFailed, match=r"^16 calls of the tool python .* \(no namespace\)$"):
        episode(pool, "1")
    pool.close()


def test_a_session_is_closed_once() -> None:
    session = Session(memory_bytes=512 << 20)
    assert session.run("1", timeout_s=20).output == "1\n"
    session.close()
    session.close()
    assert not session.is_open
