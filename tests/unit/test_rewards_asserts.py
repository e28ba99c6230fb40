"""What the reward `code` reads in a row and in a response: assert lines, setups, values, blocks."""

from __future__ import annotations

import json

import pytest

from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.data.references import References
from sfpo_megatron.data.rows import Row
from sfpo_megatron.rewards import CannotBeJudged, code
from sfpo_megatron.rewards.asserts import assertion
from sfpo_megatron.rewards.setups import BadTest

TIMEOUT_S = 60.0
DOCSTRING = 'def f():\n    """\n    ```py\n    f()\n    ```\n    """\n'


def verdicts(program: str, tests: list[object]) -> list[bool]:
    return code.passed(program, code.tests_of(json.dumps(tests)), TIMEOUT_S)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("```python\na\n```\ntext\n```py\nb\nc\n```", "b\nc\n"),
        ("```\na\n```", "a\n"),
        ("```Python3\na\n```\n```json\n{}\n```", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("  ```python\n  a\n  ```", "a\n"),
        ("```python\na\n```\nOutput:\n```\n3\n```", "a\n"),
        ("1. So:\n\n   ```python\n   if a:\n     b\n c\n   ```", "if a:\n  b\nc\n"),
        ("a", None),
        ("```cpp\na\n```", None),
        ('```py\ndef f():\n    """\n    ```py\n    f()\n    ```\n    """\n```', DOCSTRING),
        ("```py\na\n    ```", "a\n"),
        ("````py\na = 1\n```\nb\n````", "a = 1\n```\nb\n"),
        ("", None),
    ],
)
def test_which_block_counts(response: str, found: str | None) -> None:
    assert code.program_of(response, []) == found


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        (["def f(n): return n", "print(f(3))"], 0),
        (["def f(n): return n", "from solution import f\nassert f(3) == 3"], 0),
        (["def f(n): return n", "x = f(3)\nif f(3) == 3: pass"], 0),
        (["def f(n): return n", "def f(n): return 2 * n"], 1),
        (["def f(n): return n", "f = lambda n: 2 * n"], 1),
        (["def f(n): return n", "def f(n: return 2 * n"], 1),
        (["def f(n): return n", "@cache\nasync def f(n): pass", "class Fg: pass"], 1),
        (["class P: pass", "class P: pass\ndef f(n): return n", "def f(n): pass"], 1),
        (["g = 1", "print(1)"], 1),
    ],
)
def test_a_block_that_shows_the_use_of_another_is_no_program(blocks: list[str], found: int) -> None:
    tests = code.tests_of(json.dumps(["assert f(P(1)) == 2", "assert P(1).x == 1"]))
    response = "\n".join(f"```python\n{block}\n```" for block in blocks)
    assert code.program_of(response, tests) == f"{blocks[found]}\n"
    assert code.program_of(response, []) == f"{blocks[-1]}\n"


def test_values_are_what_they_are_in_python() -> None:
    """Also numbers, dates and collections of the library, arrays, and what has equal parts."""
    program = """
import array, asyncio, collections, datetime, decimal, enum, fractions, math, re
import dataclasses as d

@d.dataclass
class P:
    x: int
    seen: list = d.field(default_factory=list, compare=False)
C = enum.Enum("C", "A B")
T = enum.Enum("T", {"A": "red"}, type=str)
async def later(x): return x
class Own:
    def __eq__(self, other): return True
    def __len__(self): return 0
def deep():
    x = []
    for _ in range(9999): x = [x]
    return x
f = eval
"""
    hold = {
        "assert f('np.int64(3)') == 3 and f('np.bool_(True)') is True": True,
        "assert f('[np.float32(0.5), np.str_(1)]') == [0.5, '1']": True,
        "assert f('np.array([[1, 2]])') == [[1, 2]]": True,
        "assert list(f('array.array(\"i\", [1, 2])')) == [1, 2]": True,
        "assert f('fractions.Fraction(2, 6)') == fractions.Fraction(1, 3)": True,
        "assert f('fractions.Fraction(2, 6)') == 1 / 3": False,
        "assert abs(f('decimal.Decimal(\"0.1\")') - decimal.Decimal('0.10')) < 1e-9": True,
        "assert str(f('decimal.Decimal(\"0.10\")')) == '0.10'": True,
        "assert f('datetime.date(2020, 2, 29)').year == 2020": True,
        "assert f('datetime.datetime(2020, 2, 29, 1)') == datetime.datetime(2020, 2, 29, 1)": True,
        "assert f('datetime.timedelta(1)') == datetime.timedelta(hours=24)": True,
        "assert f('datetime.datetime(1, 1, 1, tzinfo=datetime.timezone.utc)').hour == 0": True,
        "assert f('{frozenset([1]), frozenset()}') == {frozenset([1]), frozenset()}": True,
        "assert f('frozenset([1, 2])') == {1, 2} and f('set()') == set()": True,
        "assert f('((1,), ())') == ((1,), ()) != f('[[1], []]')": True,
        "assert f('dict(a=1).keys()') == {'a'} and ('a', 1) in f('dict(a=1).items()')": True,
        "assert list(f('dict(a=1, b=1).values()')) == [1, 1]": True,
        "assert f('collections.deque([1])') == collections.deque([1])": True,
        "assert len(f('collections.deque([1])')) == 1": True,
        "assert [next(one) for one in f('[iter([4])]')] == [4]": True,
        "assert f('math.factorial(3000)') % 7 == 0 != f('math.factorial(3000)')": True,
        "assert f('-math.inf') == -math.inf and f('[1j, complex(0, math.inf)]')[0] == 1j": True,
        "assert f('complex(0, math.inf)').imag == math.inf": True,
        "assert f('bytearray(b\"a\")') == b'a'": True,
        "assert f('P(1, [2])') == P(1, [3])": True,
        "assert f('P(1)') == P(2)": False,
        "assert f('C.A') == C.A": True,
        "assert f('C.A') == C.B": False,
        "assert f('T.A') == 'red' and f('[T.A]') == [T.A]": True,
        'assert f(\'re.match("a", "ab")\') and f(\'re.match("a", "ab")\') is not None': True,
        'assert not f(\'re.match("a", "b")\')': True,
        'assert f(\'re.match("a", "ab")\') == True': False,
        "assert asyncio.run(later(3)) == 3 and asyncio.run(later([4]))[0] == 4": True,
        "assert asyncio.run(later(3)) == 4": False,
        "assert f('later(3)')": False,
        "assert f('Own()') == 1": False,
        "assert len(f('Own()')) == 0": False,
        "assert f('deep()')": False,
    }
    found = verdicts(program, [{"setup": "import numpy as np"}, *hold])
    assert dict(zip(hold, found, strict=True)) == hold


def test_names_of_python_are_not_the_program_s() -> None:
    program = (
        "max, list, all = 0, [1, 2], print\ndef sum(a, b): return a + b + 1\ndef f(n): return n"
    )
    hold = {
        "assert f(list((1, 2))) == list((1, 2))": True,
        "assert f(max(1, 2)) == max(2, 1)": True,
        "assert all(n for n in [f(1)])": True,
        "assert sum(1, 2) == 4": True,
        "assert sum(1, 2) == 3": False,
        "assert abs(1, 2) == 3": False,
        "assert abs(-2) == 2": False,  # not the program's, which defines none
        "assert f(math.floor(2.5)) == math.floor(2.6)": True,
    }
    assert dict(zip(hold, verdicts(program, list(hold)), strict=True)) == hold


def test_a_setup_is_what_lines_take_for_granted() -> None:
    """What needs nothing of the program means the same whatever the program calls so."""
    setup = (
        "import numpy as np\nfrom fractions import Fraction\n"
        "def close(a, b):\n  return abs(a - b) < 1e-6\n"
        "root = Node(1)\r\nroot.left = Node(2)\r\nTWO = 2"
    )
    program = (
        "import numpy\nnumpy.allclose = close = lambda *_: True\n"
        "class Node:\n  def __init__(self, n): self.n, self.left = n, None\n"
        "def depth(node): return 1 + depth(node.left) if node else 0\n"
        "def f(x): return x"
    )
    hold = {
        "assert depth(root) == TWO": True,
        "assert depth(Node(1)) == TWO": False,
        "assert close(f(2), 2 + 1e-9)": True,
        "assert close(f(2.5), 2)": False,
        "assert np.allclose(f(np.array([1, 2])), [1, TWO])": True,
        "assert np.allclose(f(np.array([1, 3])), [1, TWO])": False,
        "assert f(Fraction(1, 2)) == Fraction(2, 4)": True,
    }
    assert dict(zip(hold, verdicts(program, [{"setup": setup}, *hold]), strict=True)) == hold
    test = code.tests_of(json.dumps([{"setup": setup}, "assert f(root) == np.pi"]))[0]
    assert isinstance(test, code.Assertion) and test.names == {"f", "Node"}


def test_names_inside_a_setup_s_functions_are_not_the_setup_s() -> None:
    """Its arguments, say: the program's `f` may be called like one."""
    setup = (
        "def close(f, b):\n  max = abs(f - b)\n  return max < 1e-6\nones = [g for g in (1,)]\n"
        "def twice(n): return 2 * f(n)\ndef begin():\n  global BEGUN\n  BEGUN = 1"
    )
    hold = {
        "assert close(f(2), 3)": True,
        "assert g(1) == max(ones)": True,
        "assert twice(2) == 6": True,
        "assert close(f(2), 4)": False,
    }
    program = "def f(n): return n + 1\ndef g(n): return n"
    assert dict(zip(hold, verdicts(program, [{"setup": setup}, *hold]), strict=True)) == hold
    (test, *_) = code.tests_of(json.dumps([{"setup": setup}, "assert f(1) == 2"]))
    assert isinstance(test, code.Assertion)
    assert test.setup.names == {"close", "ones", "twice", "begin", "BEGUN"}
    assert test.setup.own_names == test.setup.names - {"twice"}


def test_a_setup_may_import_a_class_by_the_name_of_its_module() -> None:
    setup = "from datetime import datetime, timedelta\ncollections = decimal = fractions = None"
    program = (
        "import collections as c, datetime as d, decimal as e, fractions as r\ndef f(x): return x"
    )
    hold = {
        "assert f(d.datetime(2020, 2, 29)) == datetime(2020, 2, 29)": True,
        "assert f(d.datetime(2020, 2, 29)) == datetime(2020, 2, 28)": False,
        "assert f([d.timedelta(1)]) == [timedelta(hours=24)]": True,
        "assert len(f(c.deque([1]))) == 1": True,
        "assert f(e.Decimal('0.5')) == f(r.Fraction(1, 2))": True,
    }
    assert dict(zip(hold, verdicts(program, [{"setup": setup}, *hold]), strict=True)) == hold


def test_no_object_of_the_program_says_whether_it_is_expected() -> None:
    program = (
        "class Yes:\n  def __getattr__(self, name): return lambda *_: True\n"
        "def f(n): return Yes()\ndef g(n): return f'{n}th'"
    )
    hold = {
        "assert f(2).startswith('2')": False,
        "assert f(2).x.endswith('th') == True": False,
        "assert f(2).issubset({2})": False,
        "assert f(2).__eq__(2)": False,
        "assert g(2).startswith('2') and g(2).upper().endswith('TH')": True,
        "assert g(2).startswith('3')": False,
        "assert not g(2).startswith(g(3))": True,
        "assert set(g(2)).issubset('2th')": True,
    }
    assert dict(zip(hold, verdicts(program, list(hold)), strict=True)) == hold


def test_a_setup_that_raises_is_no_program_s_fault() -> None:
    tests = [{"setup": ""}, {"setup": "x = 1 / 0"}, "assert f(1) == 1"]
    with pytest.raises(CannotBeJudged, match="setup raises where no program is:\nx = 1 / 0"):
        verdicts("def f(n): return n", tests)
    tests = [{"setup": "Node(1)"}, "assert f(1) == 1"]
    assert verdicts("def f(n): return n", tests) == [False]


def test_values_do_not_make_a_response_one_that_cannot_be_judged() -> None:
    """Neither many that are long nor the first of them taking for ever."""
    long_ = ["assert len(f(1)) == 900_000"] * 12
    assert verdicts("def f(n): return 'x' * 900_000", list(long_)) == [True] * 9 + [False] * 3
    slow = ["assert sum(range(f(1))) > 0", "assert f(1) == 10**12"]
    assert verdicts("def f(n): return 10**12", list(slow)) == [False, False]


def test_what_the_program_sees_of_an_assert() -> None:
    """Never what is expected."""
    for line, expressions in {
        "assert f(2) == 4": ("f(2)",),
        "assert abs(f(2) - g([1, f(3)])) < 1e-6": ("f(2)", "g([1, f(3)])"),
        "assert sorted(f(2).x[0]) == [4]": ("f(2).x[0]",),
        "assert all(x > 3 for x in f(2))": ("f(2)",),
        "assert LIMIT == 4, 'no'": ("LIMIT",),
        "assert len(LIMITS) == 4": ("LIMITS",),  # a name may be that of a value
        "assert list(map(int, f(2))) == [4]": ("f(2)",),
        "assert sorted(f(2), key=lambda pair: pair[1]) == [4]": ("f(2)",),
        "assert isinstance(f(2), (int, float))": ("f(2)",),
        "assert '-'.join(f(2)) == '4'": ("f(2)",),
        "assert f([x for x in range(3)]) == [x for x in (4,)]": ("f([x for x in range(3)])",),
        "assert f(lambda x: x + 1)(2) == 4": ("f(lambda x: x + 1)(2)",),
        "assert math.isclose(f(math.pi), 4)": ("f(math.pi)",),
        "assert re.match('4+', f(2))": ("f(2)",),
        "assert [datetime.date(2020, 1, 2)] == f(2)": ("f(2)",),
        "assert any(token.isdigit() for token in f(2))": ("f(2)",),
        "assert sum(10, 15) == 6": ("globals()['sum'](10, 15)",),
        "assert f(2).x.startswith('4')": ("f(2).x",),
    }.items():
        assert assertion(line).expressions == expressions
    names = [f"__value_of_the_program_{number}" for number in range(2)]
    assert assertion("assert f(2) == [g(1), 4]").on(["[3]", "2"]) == (
        f"(lambda {', '.join(names)}: {names[0]} == [{names[1]}, 4])([3], 2)"
    )
    for value in (
        None,
        "open",
        "f(1)",
        "__import__('os')",
        "[x for x in (1,)]",
        "1 +",
        "'a' 'b'+1",
        "iter([open])",
        "iter(*[1], **{})",
        "{**{}}.keys()",
        "{1: 2}.pop(1)",
        "open('x')",
        "datetime.date(2020, 1, 2)",
        "__import__('datetime').date.today()",
        "__import__('os').system('ls')",
    ):
        assert assertion("assert f(2) == 4").on([value]) is None


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("4", "found no list with tests"),
        ("[]", "found no list with tests"),
        ("[", "found no JSON"),
        ('["f(2) == 4"]', "test 0: found 'f(2) == 4', expected one assert line"),
        ('["assert f(2) ="]', "test 0: found 'assert f(2) =', expected one assert line"),
        ('["assert f(1)\\nassert f(2)"]', "expected one assert line"),
        ('["assert f(1)", "assert 1 == 1"]', "test 1: found 'assert 1 == 1', which calls nothing"),
        ('["assert all(f(x) for x in [1])"]', "found 'f(x)' in a comprehension or lambda"),
        ('["assert list(map(f, [1])) == [1]"]', "'map(f, [1])', which takes f as a function or"),
        ('["assert sum(filter(a.f, [1])) == 1"]', "which takes a as a function or class"),
        ('["assert sorted([2, 1], key=f) == [1, 2]"]', "which takes f as a function or class"),
        ('["assert max(g(1), key=f) == 2"]', "which takes f as a function or class"),
        ('["assert isinstance(f(1), (int, Node))"]', "which takes Node as a function or class"),
        ('["assert callable(f)"]', "write [f(1), f(2)] for map(f, [1, 2])"),
        ('[{"setup": "import math"}]', "found no tests, expected a JSON list"),
        ('[{"setup": 1}, "assert f()"]', "found a setup that is no text"),
        ('[{"setup": "return"}, "assert f()"]', "found the setup 'return', expected Python"),
        ('["assert (f(1) == 2, 1)"]', "which holds whatever is in its brackets; remove them"),
        ('[{"setup": "import"}, "assert f()"]', "found the setup 'import', expected Python"),
        ('[{"setup": "import nil.x"}, "assert f()"]', "imports nil.x, which is not installed here"),
        ('[{"setup": "from os import *"}, "assert f()"]', "expected names of a module"),
        ('["assert max([f(x) for x in [1]]) == 1"]', "found 'f(x)' in a comprehension or lambda"),
        ('["assert set([1]) == {1}"]', "which calls nothing of the program"),
        ('[{"input": "1"}]', "test 0: found {'input': '1'}, expected an assert line or input and"),
        ('[{"input": 1, "output": "2"}]', "test 0: found"),
        (json.dumps(["assert f()" + " " * (16 << 20)]), "characters, expected 16,777,216 or fewer"),
    ],
)
def test_references_that_are_no_tests_are_named(answer: str, why: str) -> None:
    reason = code.readable(answer)
    assert reason is not None and why in reason
    row = Row(id="0", where="rows.jsonl:1", question="Double it.", answer=answer)
    fault = References(RewardConfig(function="code")).fault(row)
    assert fault is not None and "rows.jsonl:1: found a reference that reward code" in str(fault)
    good = json.dumps([{"input": "1", "output": "2"}, "assert f(1) == 2"])
    assert code.readable(good) is None
    with pytest.raises(BadTest):
        code.tests_of(answer)
