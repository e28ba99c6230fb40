"""An assert line in two halves: what the program says, and what is asked of it.

    assert abs(area(2) - 4) < 1e-6      area(2)  |  abs(VALUE - 4) < 1e-6

The first half is evaluated where the program runs, the second elsewhere, on plain values: the
program never sees what is expected, and nothing that it redefines (`abs`, `==`) has a part in it.
"""

from __future__ import annotations

import ast
import builtins
import copy
from collections.abc import Sequence
from dataclasses import dataclass

_OURS = frozenset(dir(builtins)) | {"math"}
_FUNCTIONS: dict[str, tuple[int, ...]] = {
    "map": (0,),
    "filter": (0,),
    "callable": (0,),
    "isinstance": (1,),
    "issubclass": (0, 1),
}
"""Python's own functions, and which of their arguments are functions or classes."""
_SORTING = frozenset({"sorted", "min", "max", "sort"})
_VALUE = "value of the program "  # no identifier: a test cannot have it


class BadTest(ValueError):
    """A test that cannot be used: what was found, and what was expected."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Assertion:
    """An assert line."""

    expressions: tuple[str, ...]
    """What the program evaluates."""
    check: ast.expr
    """The assert's condition, with the name `_VALUE N` in the place of expression N."""

    def on(self, values: Sequence[str | None]) -> str | None:
        """The condition on these values, which are literals, as Python; None where one is none."""
        literals = [_literal(value) for value in values]
        present = [literal for literal in literals if literal is not None]
        if len(present) < len(self.expressions):
            return None
        return ast.unparse(_Filled(present).visit(copy.deepcopy(self.check)))


def assertion(line: str) -> Assertion:
    """The assert line, taken apart; BadTest for anything else."""
    try:
        (statement,) = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTest(f"found {line!r}, expected one assert line ({error})") from None
    if not isinstance(statement, ast.Assert):
        raise BadTest(f"found {line!r}, expected one assert line")
    bound = {
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(statement.test)
        if isinstance(node, ast.arg)
        or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load))
    }
    split = _Split(bound)
    check = split.visit(statement.test)
    assert isinstance(check, ast.expr)
    if not split.expressions:
        raise BadTest(f"found {line!r}, which calls nothing of the program")
    return Assertion(expressions=tuple(split.expressions), check=check)


class _Split(ast.NodeTransformer):
    """Takes out what begins with a name of the program."""

    def __init__(self, bound: set[str]) -> None:
        self._bound = bound
        self.expressions: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, ast.Call | ast.Attribute | ast.Subscript | ast.Name):
            return self.generic_visit(node)
        root = _root(node)
        if root is None or root in _OURS or root in self._bound:
            if isinstance(node, ast.Call):
                self._check_functions(node)
            return self.generic_visit(node)
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
        if names & self._bound:
            raise BadTest(
                f"found {ast.unparse(node)!r} in a comprehension or lambda, expected calls of the "
                "program with values that stand in the line; write one test for each"
            )
        self.expressions.append(ast.unparse(node))
        return ast.Name(id=f"{_VALUE}{len(self.expressions) - 1}", ctx=ast.Load())

    def _check_functions(self, call: ast.Call) -> None:
        """BadTest if Python's own function takes one of the program: only values leave it."""
        for argument in _functions(call):
            for one in ast.walk(argument):
                if isinstance(one, ast.Name) and one.id not in _OURS | self._bound:
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


class _Filled(ast.NodeTransformer):
    """Puts literals into the places."""

    def __init__(self, literals: Sequence[ast.expr]) -> None:
        self._literals = literals

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id.startswith(_VALUE):
            return self._literals[int(node.id.removeprefix(_VALUE))]
        return node


class _Infinite(ast.NodeTransformer):
    """Puts numbers for the names by which `repr` writes what no literal says."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def _root(node: ast.AST) -> str | None:
    """The name that `a.b(c)[d]` begins with."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        else:
            return None
    return node.id


def _is_iterable(node: ast.expr) -> bool:
    """Whether it is `iter(...)` or `range(...)`, as sandbox/trials.py writes them."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("iter", "range")
        and not node.keywords
    )


def _literal(value: str | None) -> ast.expr | None:
    """What the program has given, if it is a literal, an iterator over one or a range."""
    if value is None:
        return None
    try:
        found = _Infinite().visit(ast.parse(value, mode="eval").body)
        for part in found.args if _is_iterable(found) else [found]:
            ast.literal_eval(part)
        return found if isinstance(found, ast.expr) else None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
