"""Arithmetic on what a model wrote. The text is parsed, and its tree walked; nothing of it is ever evaluated as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from runner.tools.protocol import ToolError

MAX_CHARACTERS = 200
MAX_BITS = 512  # of a whole number, results included
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    name = "calculator"
    description = "Evaluates an arithmetic expression with + - * / // % ** and brackets."
    parameters: dict[str, dict[str, Any]] = {"expression": {"type": "string"}}

    def call(self, **arguments: Any) -> str:
        return calculate(arguments["expression"])


def calculate(expression: object) -> str:
    """The value of an expression as a text. ToolError for anything but numbers, operators and brackets, and for what has no
    value or one of more than MAX_BITS bits."""
    if not isinstance(expression, str) or not expression.strip():
        raise ToolError("the expression is no text")
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"the expression has more than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip().replace(",", ""), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError("this is no arithmetic expression") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _bounded(_UNARY[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(second) * max(1.0, math.log2(abs(first) + 1)) > MAX_BITS:
                raise OverflowError
            return _bounded(_BINARY[type(op)](first, second))
    raise ToolError("only numbers, + - * / // % ** and brackets are known")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise OverflowError
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    assert isinstance(value, int | float)
    return value
