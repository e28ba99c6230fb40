r"""The entries of a matrix as texts, also of one with a factor before it or a transposed one."""

from __future__ import annotations

import re

from sfpo_megatron.rewards.quantities import Value, value_of

MAX_DETERMINANT = 6

_MATRIX = re.compile(
    r"(?P<factor>[^=<>;&]*?)[(\[]?\s*\\begin\{matrix\}(?P<rows>.*)\\end\{matrix\}\s*[)\]]?"
    r"(?P<turned>\^\{?\s*(?:T|\\top)\s*\}?)?",
    re.DOTALL,
)
_TUPLE = re.compile(r"\((?P<row>[^()]*,[^()]*)\)\^\{?\s*(?:T|\\top)\s*\}?")
_DETERMINANT = re.compile(r"\\begin\{vmatrix\}(.*)\\end\{vmatrix\}", re.DOTALL)


def entries(text: str) -> list[list[str]] | None:
    """The rows of the matrix that the whole of `text` is; None if it is none."""
    if turned := _TUPLE.fullmatch(text):
        return [[entry] for entry in turned["row"].split(",")]
    found = _MATRIX.fullmatch(text) if r"\begin{matrix}" in text else None
    if found is None or r"\begin" in found["rows"]:
        return None
    rows = _rows(found["rows"])
    if factor := found["factor"].strip().removesuffix(r"\cdot").strip():
        factor = factor + "1" if factor in ("-", "+") else factor
        if value_of(factor) is None:
            return None
        rows = [[f"({factor})*({entry})" for entry in row] for row in rows]
    if found["turned"] and len({len(row) for row in rows}) == 1:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return rows


def determinant(text: str) -> Value | None:
    """The value of a `vmatrix`; None if `text` is none."""
    found = _DETERMINANT.fullmatch(text)
    if found is None:
        return None
    rows = [[value_of(entry.strip()) for entry in row] for row in _rows(found[1])]
    if len(rows) > MAX_DETERMINANT or any(len(row) != len(rows) for row in rows):
        return None
    import sympy

    exact = [[sympy.sympify(one.exact) for one in row if one is not None] for row in rows]
    if any(len(row) != len(rows) for row in exact):
        return None
    return Value(exact=sympy.Matrix(exact).det(method="berkowitz"))


def _rows(text: str) -> list[list[str]]:
    return [row.split("&") for row in re.split(r"\\\\", text) if row.strip()]
