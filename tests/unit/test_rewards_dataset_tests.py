"""The reward `code` on rows as public data sets have them.

Everything runs in a scoring pool's process, as in a run. The rows are written after the forms of
APPS, TACO, Eurus-2-RL, PrimeIntellect, DeepCoder and LiveCodeBench; none is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.rewards import code
from sfpo_megatron.rewards.pool import ScoringPool
from sfpo_megatron.rewards.wire import WireProblem

SUM = "a, b = map(int, input().split())\nprint(a + b)"
ADD = "def add(a, b): return a + b"
METHOD = "class Solution:\n  def add(self, a: List[int], b: int): return a[0] + b"
LCB = {"testtype": "functional", "metadata": {"func_name": "add"}}
PRIME = {"type": "function_call", "fn_name": "add"}


@pytest.fixture(scope="module")
def pool() -> Iterator[ScoringPool]:
    with ScoringPool(RewardConfig(function="code", timeout_s=60.0, num_workers=1)) as made:
        yield made


def share(pool: ScoringPool, row: object, *programs: str) -> float | None:
    blocks = "\n".join(f"```python\n{program}\n```" for program in programs)
    problem = WireProblem(id="p/0", question="?", answer=json.dumps(row), metadata={})
    (found,) = pool.score([(problem, blocks)])
    return found.reward


@pytest.mark.parametrize(
    "row",
    [
        {"inputs": ["3 4\n", "1 1"], "outputs": ["7\n", "3"]},
        {"inputs": [["3 4"], ["1 1"]], "outputs": [["7"], ["3", ""]], "fn_name": None},
        {"language": "python", "test_cases": [
            {"type": "stdin_stdout", "input": "3 4\n", "output": "7\n", "fn_name": None},
            {"type": "stdin_stdout", "input": "1 1\n", "output": "3\n", "fn_name": None},
        ]},
        [
            {"testtype": "stdin", "input": "3 4", "output": "7", "metadata": {"func_name": None}},
            {"testtype": "stdin", "input": "1 1", "output": "3", "metadata": "{}"},
        ],
    ],
)  # fmt: skip
def test_scripts(pool: ScoringPool, row: object) -> None:
    assert share(pool, row, SUM) == 0.5
    assert share(pool, row, SUM.replace("+", "-")) == 0


@pytest.mark.parametrize(
    "row",
    [
        {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [7, 3]},
        {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [[7], [3]]},
        {"fn_name": "add", "inputs": ["3\n4", "1\n1\n"], "outputs": ["7", "3"]},
        {"test_cases": [
            {**PRIME, "input": [3, 4], "output": 7}, {**PRIME, "input": [1, 1], "output": [3]},
        ]},
        [{**LCB, "input": "3\n4", "output": "7"}, {**LCB, "input": "1\n1", "output": "3"}],
        [{**LCB, "input": "3\n4", "output": "7", "metadata": '{"func_name": "add"}'},
         {**LCB, "input": "1\n1", "output": "3"}],
    ],
)  # fmt: skip
def test_calls(pool: ScoringPool, row: object) -> None:
    assert share(pool, row, ADD) == 0.5
    assert share(pool, row, ADD, "print(add(3, 4))") == 0.5, "an example of its use"
    assert share(pool, row, f"class Solution:\n  {ADD.replace('(', '(self, ')}") == 0.5
    assert share(pool, row, "def other(a, b): return a + b") == 0
    assert share(pool, row, "class Solution: pass") == 0
    assert share(pool, row, f"class Solution: pass\n{ADD}") == 0.5


@pytest.mark.parametrize(
    ("arguments", "output", "body", "passes"),
    [
        ([[1, 2]], 3, "return sum(x)", True),
        ([[1, 2]], [2, 1], "return tuple(x[::-1])", True),
        ([[1, 2]], [[1, 2]], "return x", True),
        ([[1, 2]], [1, 2], "return [[1, 2]]", False),
        ([[1, 2]], [1, 2], "return [x]", False),
        ([{"1": 2}], {"2": 1}, "return {v: k for k, v in x.items()}", True),
        ([{"a": 2}], {"a": [2]}, "return {'a': (x['a'],)}", True),
        ([None], True, "return x is None", True),
        (["a"], "a", "return x", True),
        ([1.5], 3.0, "return 2 * x", True),
        ([float("inf")], float("-inf"), "return -x", True),
        ([1], 2, "raise SystemExit", False),
        ([1], 2, "return type('E', (), {'__eq__': lambda *_: True})()", False),
        ([[3, 1]], 1, "heapify(x)\n  return pow(x[0], 5, 7)", True),
        ([[3, 1]], 4, "y: List[int] = x\n  return math.floor(inf and sum(y))", True),
        (5, 5, "return x", True),
    ],
)
def test_values(
    pool: ScoringPool, arguments: object, output: object, body: str, passes: bool
) -> None:
    row = {"fn_name": "f", "inputs": [arguments], "outputs": [output]}
    assert share(pool, row, f"def f(x):\n  {body}") == passes


def test_what_leetcode_gives(pool: ScoringPool) -> None:
    row = [{**LCB, "input": "[3]\n4", "output": "7"}]
    assert share(pool, row, METHOD) == 1
    future = "from __future__ import annotations\n"
    assert share(pool, row, future + METHOD) == 1
    before = [{"before": "from typing import List"}, "assert Solution().add([3], 4) == 7"]
    assert share(pool, before, METHOD) == 1
    assert share(pool, before[1:], METHOD) == 0


def test_a_function_named_as_one_of_python(pool: ScoringPool) -> None:
    row = {"fn_name": "sum", "inputs": [[[3, 4]]], "outputs": [7]}
    assert share(pool, row, "def sum(x): return x[0] + x[1]") == 1
    assert share(pool, row, "def total(x): return x[0] + x[1]") == 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"inputs": ["1"], "outputs": []}, "do not belong to each other"),
        ({"inputs": [], "outputs": []}, "no list with tests"),
        ({"inputs": [1], "outputs": ["2"]}, "test 0"),
        ({"fn_name": "f", "inputs": ["3 4"], "outputs": ["7"]}, "test 0"),
        ({"fn_name": "f(", "inputs": [[3]], "outputs": [7]}, "expected fn_name"),
        ({"language": "cpp", "test_cases": [{"input": "", "output": ""}]}, "cpp"),
        ([{"testtype": "functional", "input": "1", "output": "2"}], "expected fn_name"),
        ([{**PRIME, "input": [1], "output": 2}, {**PRIME, "fn_name": "g", "input": [1],
          "output": 2}], "add and g"),
        ([{**PRIME, "input": [1], "output": 2}, "assert add(1) == 2"], "test 1"),
        ([{"before": "from . import x"}, "assert f()"], "names of a module"),
        ([{"before": "import no_such_module"}, "assert f()"], "not installed"),
        ([{"before": 3}, "assert f()"], "a before that is no text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row: object, told: str) -> None:
    assert told in str(code.readable(json.dumps(row)))
