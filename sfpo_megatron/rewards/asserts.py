"""An assert line in two halves: what the program says, and what is asked of it.

    assert abs(area(2) - 4) < 1e-6      area(2)  |  abs(VALUE - 4) < 1e-6

The first half is evaluated where the program runs, the second elsewhere, on plain values: the
program never sees what is expected, and nothing that it redefines (`abs`, `==`) has a part in it.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from types import BuiltinFunctionType

from sfpo_megatron.rewards.setups import PYTHON_S, BadTest, Setup

_FUNCTIONS: dict[str, tuple[int, ...]] = {
    "map": (0,),
    "filter": (0,),
    "callable": (0,),
    "isinstance": (1,),
    "issubclass": (0, 1),
}
"""Python's own functions, and which of their arguments are functions or classes."""
_SORTING = frozenset({"sorted", "min", "max", "sort"})
_VALUE = "__value_of_the_program_"
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_ASKING = {
    *("startswith", "endswith", "issubset", "issuperset", "isdisjoint", "__eq__", "__contains__"),
}
"""Methods of Python's values that are given what is expected, and say whether it is so."""
_DATES = ("date", "datetime", "time", "timedelta")
_CALLS = {
    *("iter", "range", "set", "frozenset", "float", "complex", "bytearray"),
    "__import__('collections').deque",
    "__import__('fractions').Fraction",
    "__import__('decimal').Decimal",
    *(f"__import__('datetime').{kind}" for kind in _DATES),
}
"""What sandbox/trials.py writes values with, besides literals."""
NO_SETUP = Setup()


@dataclass(kw_only=True, frozen=True, slots=True)
class Assertion:
    """An assert line."""

    expressions: tuple[str, ...]
    """What the program evaluates."""
    names: frozenset[str]
    """What these begin with, and what the setup needs: names of the program."""
    condition: str
    """The assert's condition, with the name `_VALUE N` in the place of expression N."""
    modules: tuple[str, ...]
    """Those of the standard library that the line speaks of."""
    setup: Setup

    def on(self, values: Sequence[str | None]) -> str | None:
        """The condition on these values, as Python; None where one is none."""
        texts = [value for value in values if value is not None and _is_value(value)]
        if len(texts) < len(self.expressions):
            return None
        names = ", ".join(f"{_VALUE}{number}" for number in range(len(texts)))
        return f"(lambda {names}: {self.condition})({', '.join(texts)})"


def assertion(line: str, setup: Setup = NO_SETUP) -> Assertion:
    """The assert line, taken apart; BadTest for anything else."""
    try:
        (statement,) = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTest(f"found {line!r}, expected one assert line ({error})") from None
    if not isinstance(statement, ast.Assert):
        raise BadTest(f"found {line!r}, expected one assert line")
    test = statement.test
    if isinstance(test, ast.Tuple) and test.elts:
        raise BadTest(f"found {line!r}, which holds whatever is in its brackets; remove them")
    modules = _modules(test) - setup.names
    split = _Split(PYTHON_S - setup.names | modules | setup.own_names, _assigned(test))
    condition = split.visit(test)
    if not split.expressions:
        split.take_namesake(test)
    if not split.expressions:
        raise BadTest(f"found {line!r}, which calls nothing of the program")
    return Assertion(
        expressions=tuple(split.expressions),
        names=frozenset(split.names - setup.names | setup.needs),
        condition=ast.unparse(condition),
        modules=tuple(sorted(modules)),
        setup=setup,
    )


class _Split(ast.NodeTransformer):
    """Takes out what begins with a name of the program."""

    def __init__(self, own: Set[str], bound: Set[str]) -> None:
        """`own`: names that are not the program's; `bound`: that the line itself gives."""
        self._own = own
        self._bound = bound
        self.expressions: list[str] = []
        self.names: set[str] = set()

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _SCOPES):
            outer, self._bound = self._bound, self._bound | _parameters(node)
            node = self.generic_visit(node)
            self._bound = outer
            return node
        if not isinstance(node, ast.Call | ast.Attribute | ast.Subscript | ast.Name):
            return self.generic_visit(node)
        root = _root(_awaited(node) or node)
        if root is None or root in self._own or root in self._bound:
            if isinstance(node, ast.Call):
                self._check_functions(node)
            return self.generic_visit(node)
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        if names & self._bound:
            raise BadTest(
                f"found {ast.unparse(node)!r} in a comprehension or lambda, expected calls of the "
                "program with values that stand in the line; write one test for each"
            )
        return self._taken(ast.unparse(node), root)

    def take_namesake(self, test: ast.expr) -> None:
        """Take the program's own `sum` out of `assert sum(10, 15) == 6`: a call of what it has not
        defined gives nothing."""
        if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Call):
            return
        name = ast.unparse(test.left.func)
        if isinstance(getattr(builtins, name, None), BuiltinFunctionType):
            called = f"globals()[{name!r}]{ast.unparse(test.left).removeprefix(name)}"
            test.left = self._taken(called, name)

    def _taken(self, expression: str, root: str) -> ast.Name:
        self.expressions.append(expression)
        self.names.add(root)
        return ast.Name(id=f"{_VALUE}{len(self.expressions) - 1}", ctx=ast.Load())

    def _check_functions(self, call: ast.Call) -> None:
        """BadTest if Python's own function takes one of the program: only values leave it."""
        for argument in _functions(call):
            nodes = list(ast.walk(argument))
            given = set[str]().union(
                *(_parameters(one) for one in nodes if isinstance(one, _SCOPES))
            )
            for one in nodes:
                if isinstance(one, ast.Name) and one.id not in self._own | self._bound | given:
                    raise BadTest(
                        f"found {ast.unparse(call)!r}, which takes {one.id} as a function or class "
                        "of the program, expected its values; write [f(1), f(2)] for map(f, [1, 2])"
                    )


def _functions(call: ast.Call) -> list[ast.expr]:
    """What a call takes that is no value but a function or class."""
    function = call.func
    name = str(getattr(function, "id", None) or getattr(function, "attr", ""))
    places = _FUNCTIONS.get(name, ()) if isinstance(function, ast.Name) else ()
    given = [call.args[place] for place in places if place < len(call.args)]
    keys = call.keywords if name in _SORTING else []
    return given + [one.value for one in keys if one.arg == "key"]


def _modules(test: ast.expr) -> set[str]:
    """Modules of the standard library, where an attribute of one is asked for."""
    parts = (node.value for node in ast.walk(test) if isinstance(node, ast.Attribute))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return names & sys.stdlib_module_names


def _assigned(test: ast.expr) -> set[str]:
    """Names given by `:=`."""
    found = (node.target for node in ast.walk(test) if isinstance(node, ast.NamedExpr))
    return {target.id for target in found}


def _parameters(scope: ast.AST) -> set[str]:
    """Names that a lambda or a comprehension gives."""
    if isinstance(scope, ast.Lambda):
        return {node.arg for node in ast.walk(scope.args) if isinstance(node, ast.arg)}
    targets = [
        one.target for one in ast.iter_child_nodes(scope) if isinstance(one, ast.comprehension)
    ]
    nodes = (node for target in targets for node in ast.walk(target))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def _awaited(node: ast.AST) -> ast.expr | None:
    """What `asyncio.run` takes: a coroutine is no value, and is run where the program is."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return node.args[0] if ast.unparse(node.func) == "asyncio.run" else None
    return None


def _root(node: ast.AST) -> str | None:
    """The name that `a.b(c)[d]` begins with; None of what asks for more than a value."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute | ast.Subscript) and (
            getattr(node, "attr", "") not in _ASKING
        ):
            node = node.value
        else:
            return None
    return node.id


def _is_value(text: str) -> bool:
    """Whether it is what sandbox/trials.py writes of a value, and nothing that could do more."""
    try:
        return _is_plain(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False


def _is_plain(node: ast.expr | None) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return True
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return all(map(_is_plain, parts))
        case ast.Dict(keys=keys, values=parts):
            return all(map(_is_plain, [*keys, *parts]))
        case ast.Call(func=ast.Attribute(value=ast.Dict() as dict_, attr=view), args=[]):
            return view in ("keys", "values", "items") and not node.keywords and _is_plain(dict_)
        case ast.Call(func=function, args=parts, keywords=[]):
            return ast.unparse(function) in _CALLS and all(map(_is_plain, parts))
    return False
