"""The tool `calculator`: one expression, exactly where its numbers are rational.

Nothing of the text is run as program code, and what would be huge is refused.
"""

from __future__ import annotations

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import TypeAlias

from sfpo_megatron.tools import ToolError

Number: TypeAlias = Fraction | float

MAX_CHARS = 1000
MAX_BITS = 10_000
"""Size of the largest number."""
MAX_FACTORIAL = 1000
MAX_DIGITS = 1000
"""That a number is rounded to."""
_SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "π": "pi"})
_CONSTANTS: Mapping[str, Number] = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses, and functions such as sqrt(2).
    """
    text = str(expression).translate(_SIGNS).strip()
    if len(text) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    try:
        return _shown(_value(ast.parse(text, mode="eval").body, text))
    except (SyntaxError, UnicodeEncodeError):
        raise ToolError(f"{text!r} is not an arithmetic expression") from None
    except RecursionError:
        raise ToolError("the expression is nested too deeply") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the value is too large") from None


def _value(node: ast.expr, text: str) -> Number:
    match node:
        case ast.Constant(value=bool() | complex()):
            pass
        case ast.Constant(value=int(value)):
            return _small(Fraction(value))
        case ast.Constant(value=float()):
            return _written(ast.get_source_segment(text, node) or "")
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, text))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _small(_BINARY[type(op)](_value(left, text), _value(right, text)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _called(name, [_value(argument, text) for argument in arguments])
    raise ToolError(f"{ast.unparse(node)!r} is nothing that the calculator knows")


def _written(literal: str) -> Number:
    """The number that is written: 0.1 is a tenth, and 1e400 no infinity."""
    try:
        value = Decimal(literal)
    except InvalidOperation:  # an exponent that even this does not take
        raise OverflowError from None
    if value and abs(value.adjusted()) > MAX_BITS:
        raise OverflowError
    return _small(Fraction(value))


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if bits > 1 and bits * abs(exponent.numerator) > MAX_BITS:
            raise OverflowError
        return Fraction(base**exponent.numerator)
    if base < 0:
        raise ToolError("a root of a negative number")
    return float(base) ** float(exponent)


def _root(value: Number) -> Number:
    if value < 0:
        raise ToolError("a root of a negative number")
    if isinstance(value, Fraction):
        top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
        if (top * top, bottom * bottom) == (value.numerator, value.denominator):
            return Fraction(top, bottom)
    return math.sqrt(value)


def _factorial(value: Number) -> Number:
    if value != int(value) or not 0 <= value <= MAX_FACTORIAL:
        raise ToolError(f"a factorial of what is no whole number from 0 to {MAX_FACTORIAL}")
    return Fraction(math.factorial(int(value)))


def _rounded(value: Number, digits: Number = Fraction(0)) -> Number:
    if not -MAX_DIGITS <= digits <= MAX_DIGITS:
        raise ToolError(f"rounding to more than {MAX_DIGITS} digits")
    return round(Fraction(value), int(digits))


_UNARY: Mapping[type, Callable[[Number], Number]] = {
    ast.UAdd: lambda value: value,
    ast.USub: lambda value: -value,
}
_BINARY: Mapping[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "sqrt": _root,
    "factorial": _factorial,
    "abs": abs,
    "min": min,
    "max": max,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "round": _rounded,
    **{name: getattr(math, name) for name in ("exp", "log", "log2", "log10")},
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan")},
}


def _called(name: str, arguments: list[Number]) -> Number:
    try:
        return _small(_FUNCTIONS[name](*arguments))
    except ToolError:
        raise
    except TypeError:
        raise ToolError(f"{name} with {len(arguments)} arguments") from None
    except ValueError:
        raise ToolError(f"{name} of a number that it has no value for") from None


def _small(value: Number) -> Number:
    if isinstance(value, Fraction):
        if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
            raise OverflowError
    elif not math.isfinite(value):
        raise OverflowError
    return value


def _shown(value: Number) -> str:
    """A whole number with all its digits, else a decimal with those of a float; past the largest
    and the smallest of those with as many."""
    if not isinstance(value, Fraction):
        return repr(value)
    if value.denominator == 1:
        return str(value.numerator)
    with suppress(OverflowError):
        if shown := float(value):
            return repr(shown)
    digits = Context(prec=sys.float_info.dig + 2)
    return str(digits.divide(Decimal(value.numerator), Decimal(value.denominator)))
