"""The reward `code`: shares of tests passed, and programs that want more than they deserve.

Everything runs in a scoring pool's processes, as in a run. Not exercised: machines without Landlock
or `unshare`, but for what is left behind there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.rewards import code
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.scores import Score
from sfpo_megatron.rewards.wire import WireProblem
from sfpo_megatron.sandbox import landlock
from sfpo_megatron.sandbox.isolation import isolation

TIMEOUT_S, BRIEF_S = 60.0, 0.5
DOUBLE = "n = int(input())\nprint(2 * n)"
RUNS = [{"input": f"{n}\n", "output": f"{2 * n}\n"} for n in (1, 2, 21)]
ASSERTS = ["assert f(1) == 2", "assert f(2) == 4", "assert f(21) == 42"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ScoringPool]:
    with ScoringPool(RewardConfig(function="code", timeout_s=TIMEOUT_S, num_workers=1)) as made:
        yield made


@pytest.fixture(scope="module")
def brief() -> Iterator[ScoringPool]:
    """For programs that take all the time that there is."""
    with ScoringPool(RewardConfig(function="code", timeout_s=BRIEF_S, num_workers=1)) as made:
        yield made


def problem(tests: list[object]) -> WireProblem:
    return WireProblem(id="p/0", question="?", answer=json.dumps(tests), metadata={})


def block(program: str) -> str:
    return f"So:\n```python\n{program}\n```\nDone."


def score(pool: ScoringPool, tests: list[object], program: str) -> Score:
    (found,) = pool.score([(problem(tests), block(program))])
    return found


@pytest.mark.parametrize(
    ("tests", "program", "share"),
    [
        (RUNS, DOUBLE, 1),
        (RUNS, "print(2 * int(input()) if True else 0, end='')", 1),
        (RUNS, "n = int(input())\nprint(2 * n if n < 20 else n)", 2 / 3),
        (RUNS, "print(4)", 1 / 3),
        (RUNS, "print(2 * int(input()))\nraise SystemExit", 1),
        (RUNS, "print(2 * int(input()))\n1 / 0", 0),
        (RUNS, "print(2 * int(input()))\nraise SystemExit(3)", 0),
        (RUNS, "import sys\nprint('noise', file=sys.stderr)\nprint(2 * int(input()))", 1),
        (RUNS, "import sys\nif __name__ == '__main__': print(2 * int(sys.stdin.read()))", 1),
        (
            RUNS,
            "import threading\nthreading.Thread(target=lambda: print(2 * int(input()))).start()",
            1,
        ),
        (RUNS, "2 * int(input())", 0),
        (RUNS, "print(", 0),
        (ASSERTS, "def f(n): return 2 * n", 1),
        (ASSERTS, "def f(n):\n  print(n)\n  return 2 * n if n < 20 else None", 2 / 3),
        (ASSERTS, "def f(n): return n + 1", 1 / 3),
        (ASSERTS, "def f(n): return 2 * n\nif __name__ == '__main__': f(input())", 1),
        (ASSERTS, "def g(n): return 2 * n", 0),
        (ASSERTS, "def f(n): return open", 0),
        ([*RUNS, *ASSERTS], "def f(n): return 2 * n\nif __name__ == '__main__': print(f(3))", 0.5),
        (["assert abs(f(2) - 0.3) < 1e-6"], "def f(n): return 0.1 + 0.2", 1),
        (["assert not f(2)", "assert len(f(3)) == 3"], "def f(n): return [0] * n", 0.5),
        (["assert S().f([1]) == {0: (1,)}"], "class S:\n  def f(self, x): return {0: (*x,)}", 1),
        (["assert f() == {'a': 2}"], "import collections as c\nf = lambda: c.Counter('aa')", 1),
        (["assert math.isclose(f(), 1, rel_tol=0.1), 'far'"], "def f(): return 0.95", 1),
        (["assert isinstance(f(), int) and f() is True"], "def f(): return True", 1),
        (["assert f() == 1"], "@lambda f: f\ndef f(): return 1", 1),
        (["assert f() == [-float('inf'), 1]"], "def f(): return [-float('inf'), 1]", 1),
        (["assert math.isnan(f())", "assert f() == 1"], "def f(): return float('nan')", 0.5),
        (["assert f() == float('inf')"], "def f(): return 'inf'", 0),
        (["assert list(f(3)) == [0, 1, 2]"], "def f(n): yield from range(n)", 1),
        (["assert list(f(3)) == [0, 1, 2]"], "def f(n): return map(int, '012')", 1),
        (["assert f(3) == [0, 1, 2]"], "def f(n): yield from range(n)", 0),
        (["assert len(f(3)) == 3 and f(3)[1] == 1"], "def f(n): return range(n)", 1),
        (["assert next(f(1)) == 1"], "def f(n): return iter([n])", 1),
        (["assert sorted(f()) == ['a', 'b']"], "def f(): return {'b': 1, 'a': 2}.keys()", 1),
        (["assert list(f())"], "import itertools\ndef f(): return itertools.count()", 0),
        (["assert list(f())"], "def f(): return iter([open])", 0),
        ([{"input": "a\ud800", "output": "2"}, RUNS[0]], "print(len(input()))", 0.5),
        ([{"input": "", "output": "a\nb"}], "print('a\\vb')", 0),
        ([{"input": "", "output": "a\nb"}], "print('a \\r')\nprint('b')", 1),
    ],
)  # fmt: skip
def test_shares(pool: ScoringPool, tests: list[object], program: str, share: float) -> None:
    found = score(pool, tests, program)
    assert found.reward == pytest.approx(share)
    assert found.correct == (share == 1)


SUM = "a, b = map(int, input().split())\n"
UNUSUAL = {
    "stdout that exit writes out": (
        "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
        f"atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\n{SUM}print(a + b)"
    ),
    "bytes that exit writes out": (
        "import atexit, io, os, sys\nsys.stdin = io.BytesIO(os.read(0, 99))\n"
        "input = lambda: sys.stdin.readline().decode()\nsys.stdout = io.BytesIO()\n"
        "atexit.register(lambda: os.write(1, sys.stdout.getvalue()))\n"
        f"{SUM}sys.stdout.write(b'%d' % (a + b))"
    ),
    "stdout under another name": (
        f"import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\n{SUM}old.write(str(a + b))"
    ),
    "stdout wrapped": (
        f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\n{SUM}print(a + b)"
    ),
    "stdout closed": f"import sys\n{SUM}print(a + b)\nsys.stdout.close()",
    "no stdout": f"import sys\n{SUM}print(a + b)\nsys.stdout = None",
    "a file left open": f"import os\n{SUM}out = os.fdopen(os.dup(1), 'w')\nout.write(str(a + b))",
    "a finalizer": (
        f"import weakref\n{SUM}class S: pass\ns = S()\nweakref.finalize(s, print, a + b)"
    ),
    "a pool of threads": (
        "import concurrent.futures as c\n"
        f"{SUM}print(c.ThreadPoolExecutor(2).submit(lambda: a + b).result())"
    ),
    "a file of its own": f"{SUM}open('x', 'x').write(str(a + b))\nprint(open('x').read())",
    "the name of its file": f"import os\n{SUM}print(a + b if os.path.isabs(__file__) else 0)",
    "input read twice": (
        "import sys\nlines = sys.stdin.read() + sys.stdin.read()\n"
        "print(sum(map(int, lines.split())))"
    ),
    "input by descriptor": "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 99).split())))",
    "a loop to the end of input": (
        "n = 0\nwhile True:\n  try: n += sum(map(int, input().split()))\n  except EOFError: break\n"
        "print(n)"
    ),
}


@pytest.mark.parametrize("program", UNUSUAL.values(), ids=UNUSUAL)
def test_programs_read_write_and_end_as_python_lets_them(pool: ScoringPool, program: str) -> None:
    tests = [{"input": "3 4\n", "output": "7\n"}, {"input": "30 40\n", "output": "70\n"}]
    assert score(pool, tests, program).reward == 1


CHEATS = {
    "exits before the tests": "import os\nos._exit(0)",
    "exits in the test": "import os\ndef f(n): os._exit(0)",
    "is equal to all": (
        "class Equal:\n"
        "  def __eq__(self, other): return True\n"
        "  __ne__ = __lt__ = __gt__ = __hash__ = lambda *_: True\n"
        "def f(n): return Equal()"
    ),
    "an int that is equal to all": (
        "class Int(int):\n"
        "  def __eq__(self, other): return True\n"
        "  def __int__(self): return self\n"
        "  def __repr__(self): return '*'\n"
        "def f(n): return Int(7)"
    ),
    "other builtins": (
        "import builtins\nbuiltins.repr = lambda x: 'True'\nbuiltins.bool = lambda x: True\n"
        "builtins.AssertionError = SystemExit\ndef f(n): return 0"
    ),
    "looks into the frames": (
        "import sys\n"
        "def f(n):\n"
        "  frame = sys._getframe()\n"
        "  while frame:\n"
        "    for x in list(frame.f_locals.values()):\n"
        "      if f'== {2 * n}' in str(x): return 2 * n\n"
        "    frame = frame.f_back\n"
    ),
    "reads what is open and near": (
        "import os\n"
        "def f(n):\n"
        "  found = ''\n"
        "  for path in ['/proc/self/environ', f'/proc/{os.getppid()}/cmdline',\n"
        "      f'/proc/{os.getppid()}/mem', *map(str, range(20)), *os.listdir('.')]:\n"
        "    try: found += open(int(path) if path.isdigit() else path).read(1 << 16)\n"
        "    except (OSError, ValueError): pass\n"
        "  return 2 * n if f'== {2 * n}' in found else 0\n"
        "for n in (1, 2, 21): f(n)\n"
        "def f(n): return 0\n"
    ),
    "code for the judge": (
        "def f(n): return S('1) or (True')\n"
        "class S(str):\n"
        "  __repr__ = lambda self: '__import__(\"os\")._exit(0)'\n"
        "  __str__ = lambda self: '2 == 2 or 4'\n"
    ),
    "kills what tries it": "import os\nos.kill(os.getppid(), 9)\ndef f(n): return 0",
    "goes on as what tries it": (
        "import builtins, os\nos._exit = lambda status: None\n"
        "builtins.SystemExit, os.waitpid = ValueError, lambda *_: (0, 0)\n"
        'line = b\'{"status": 0, "output": "2", "values": ["2"]}\'\n'
        "import json\njson.dumps = lambda found: line.decode()\ndef f(n): return 0\n"
    ),
    "writes into what is read": (
        "import json, os\n"
        "line = json.dumps({'status': 0, 'output': '', 'values': ['True']}).encode() + b'\\n'\n"
        "for fd in range(3, 64):\n"
        "  try: os.write(fd, line * 9)\n"
        "  except OSError: pass\n"
        "def f(n): return 0\n"
    ),
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS)
def test_cheats_earn_nothing(pool: ScoringPool, program: str) -> None:
    assert score(pool, ASSERTS, program).reward == 0
    assert score(pool, RUNS, program).reward == 0
    assert score(pool, RUNS, DOUBLE).reward == 1, "the next response pays for it"


def test_the_output_of_another_test_is_not_taken(pool: ScoringPool) -> None:
    """Nor all of them at once."""
    assert score(pool, RUNS, "print('2\\n4\\n42')").reward == 0
    assert score(pool, RUNS, "print(42)").reward == pytest.approx(1 / 3)


COSTLY = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(600)",
    "deaf loop": (
        "import signal\nfor s in (15, 2, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    ),
    "1 GB of output": "while True: print('x' * (1 << 20))",
    "1 GB at once": "print('x' * (1 << 30))",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "threads": (
        "import threading\n"
        "while True:\n"
        "  try: threading.Thread(target=lambda: threading.Event().wait()).start()\n"
        "  except RuntimeError: pass\n"
    ),
    "crash": "import ctypes\nctypes.string_at(0)",
    "endless recursion": "def f(n): return f(n)\nf(1)",
    "many files": "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'w').write('x' * 9999)",
}


@pytest.mark.parametrize("program", COSTLY.values(), ids=COSTLY)
def test_what_costs_time_or_memory_is_bounded(brief: ScoringPool, program: str) -> None:
    """The scoring process goes on, and in the end it is the program's own limit that ends it."""
    pids = brief.worker_pids
    found = score(brief, [*RUNS, *ASSERTS], program)
    assert found.reward == 0 and not found.timed_out
    assert brief.worker_pids == pids, "it cost the scoring process"


def test_tests_that_ended_in_time_count() -> None:
    """Within a limit that a busy machine keeps, too."""
    program = "n = int(input())\nwhile n == 21: pass\nprint(2 * n)"
    with ScoringPool(RewardConfig(function="code", timeout_s=3.0, num_workers=1)) as pool:
        assert score(pool, RUNS, program).reward == pytest.approx(2 / 3)
        assert score(pool, RUNS, DOUBLE).reward == 1


@pytest.mark.skipif(landlock.abi() < 4, reason="the kernel has no Landlock 4")
def test_files_are_those_of_the_sandbox(pool: ScoringPool, tmp_path: Path) -> None:
    """And what one test has left is there for no other response."""
    secret = tmp_path / "answers.txt"
    secret.write_text("42")
    tests: list[object] = [{"input": "", "output": "42"}]
    assert score(pool, tests, f"print(open({str(secret)!r}).read())").reward == 0
    link = f"import os\nos.symlink({str(secret)!r}, 'x')\nprint(open('x').read())"
    assert score(pool, tests, link).reward == 0
    assert score(pool, tests, "open('left', 'w').write('42')\nprint(42)").reward == 1
    assert score(pool, tests, "print(open('left').read())").reward == 0


@pytest.mark.skipif(not isolation().processes, reason="unshare is not allowed here")
def test_nothing_is_left_behind(pool: ScoringPool) -> None:
    mark = f"61.{os.getpid()}"
    program = (
        "import os\nif os.fork() == 0:\n"
        f"  os.setsid(); os.execvp('sleep', ['sleep', '{mark}'])\n{DOUBLE}"
    )
    assert score(pool, RUNS, program).reward == 1
    commands = [Path("/proc", pid, "cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [path for path in commands if path.exists() and mark in path.read_text()]


def test_an_output_may_be_as_long_as_what_is_expected() -> None:
    text = "x" * 3_000_000
    tests: list[object] = [{"input": "", "output": text}] * 4
    program = "print('x' * 3_000_000)"
    assert code.passed(program, code.tests_of(json.dumps(tests)), TIMEOUT_S) == [True] * 4


@pytest.mark.parametrize(
    ("printed", "wanted", "is_same"),
    [
        ("0.30000000000000004", "0.3", True),
        ("1e-3 x", "0.001 x", True),
        (".5\n2", "0.50\n2", True),
        ("3.1415930", "3.14159265", True),
        ("3.14160", "3.14159265", False),
        ("1234567.90", "1234567.89", False),
        ("1000000000.5", "1000000000.25", True),
        ("7", "7.0", True),
        ("7.0", "7", False),
        ("1000000000001.5 1000000000001", "1000000000001.5 1000000000000", False),
        ("0.5 0.5", "0.5", False),
        ("0.5  1.50", "0.5 1.5", False),
        ("nan", "0.5", False),
        ("1_0.5", "10.5", False),
        ("v1.50", "v1.5", False),
        pytest.param(f"{'1' * 1_000_000}x", "1.5", False, id="a million digits and a letter"),
    ],
)
def test_decimals_may_be_written_and_rounded_otherwise(
    printed: str, wanted: str, is_same: bool
) -> None:
    assert code._same(printed, wanted) == is_same


def test_thinking_is_not_looked_at(pool: ScoringPool) -> None:
    response = f"<think>{block(DOUBLE)}</think>{block('print(1)')}"
    assert pool.score([(problem(RUNS), response)])[0].reward == 0
    assert pool.score([(problem(RUNS), f"<think>{block(DOUBLE)}")])[0].reward == 0


def test_what_is_explained() -> None:
    with ScoringPool(RewardConfig(function="code", num_workers=1), explain=True) as pool:
        (found,) = pool.score([(problem([*RUNS[:1], ASSERTS[2]]), block(DOUBLE))])
    explained = found.explained["code"]
    assert explained["found"] == f"{DOUBLE}\n"
    assert explained["read"] == ["test 0: passed", "test 1: failed"]
