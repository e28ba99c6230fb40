"""What the assert lines of a row take for granted: imports, helpers, objects that they speak of.

All of it runs behind the program. What needs nothing of the program runs also where conditions are
asked, and its names mean that there: `np.allclose(f(2), [4])` is no word of the program's.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from symtable import SymbolTable, symtable

PYTHON_S = frozenset(dir(builtins))
"""Names of Python itself."""


class BadTest(ValueError):
    """A test that cannot be used: what was found, and what was expected."""


@dataclass(kw_only=True, frozen=True, slots=True)
class Setup:
    """A row's setup."""

    code: str = ""
    """The whole."""
    own: str = ""
    """What needs nothing of the program."""
    own_names: frozenset[str] = frozenset()
    """Names that this binds."""
    names: frozenset[str] = frozenset()
    """Names that the whole binds."""
    modules: tuple[str, ...] = ()
    """What it imports, and what is before the program."""
    needs: frozenset[str] = frozenset()
    """Names of the program that it reads."""
    before: str = ""
    """What runs before the program, in its namespace."""


def setup(code: str, before: str = "") -> Setup:
    """The code, taken apart; BadTest for what cannot be run here."""
    statements = _statements(code)
    names, own_names, needs = set[str](), set[str](), set[str]()
    own: list[ast.stmt] = []
    modules = (*_imported(statements), *_imported(_statements(before), takes_all=True))
    for statement in statements:
        table = symtable(ast.unparse(statement), "<setup>", "exec")
        bound = set(_bound(table))
        read = set(_read(table)) - bound
        needs |= read - names - PYTHON_S
        names |= bound
        if read <= PYTHON_S | own_names:
            own.append(statement)
            own_names |= bound
        else:
            own_names -= bound
    return Setup(
        code=code,
        own="\n".join(map(ast.unparse, own)),
        own_names=frozenset(own_names),
        names=frozenset(names),
        modules=modules,
        needs=frozenset(needs),
        before=before,
    )


def _statements(code: str) -> list[ast.stmt]:
    try:
        statements = ast.parse(code).body
        compile(code, "<setup>", "exec")  # a `return` outside of functions too
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTest(f"found the setup {code!r}, expected Python ({error})") from None
    return statements


def _imported(statements: Iterable[ast.stmt], *, takes_all: bool = False) -> tuple[str, ...]:
    """The modules; `takes_all`: `from m import *` is no fault, as the names are the program's."""
    found = list[str]()
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            if statement.level or (statement.names[0].name == "*" and not takes_all):
                raise BadTest(
                    f"found {ast.unparse(statement)!r} in a setup, expected names of a module"
                )
            found.append(str(statement.module))
        elif isinstance(statement, ast.Import):
            found += (alias.name for alias in statement.names)
    for module in found:
        if find_spec(module.partition(".")[0]) is None:
            raise BadTest(f"found a setup that imports {module}, which is not installed here")
    return tuple(found)


def _bound(table: SymbolTable) -> Iterator[str]:
    """Names that it gives the module: not a function's own, such as its arguments."""
    is_module = table.get_type() == "module"
    for symbol in table.get_symbols():
        if (symbol.is_assigned() or symbol.is_imported()) and (is_module or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _bound(inner)


def _read(table: SymbolTable) -> Iterator[str]:
    """Names of the module, or of Python, that it reads."""
    is_module = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (is_module or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _read(inner)
