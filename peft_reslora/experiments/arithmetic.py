"""The number that an answer means: an equation is computed, of a text the last number counts."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_EQUATION = re.compile(r"[\d\s.()+\-*/]{1,200}")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def value_of(text: str) -> float | None:
    """`( 76 - 25 )` is 51, `... so she has #### 1,024` is 1024; None where there is no number."""
    text = text.strip()
    if _EQUATION.fullmatch(text) and (value := _computed(text)) is not None:
        return value
    found = _NUMBER.findall(text.rpartition("####")[2])
    return float(found[-1].replace(",", "")) if found else None


def _computed(equation: str) -> float | None:
    try:
        return _value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: Any) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    raise ValueError("no arithmetic")


def same_number(text: str, wanted: float) -> bool:
    """Whether a text means this number, to a thousandth of its size."""
    value = value_of(text)
    return value is not None and math.isclose(value, wanted, rel_tol=1e-3, abs_tol=1e-3)


def plain_numbers(text: str) -> str:
    """Whole numbers without their `.0`, as people write them."""
    return re.sub(r"(?<![\d.])(\d+)\.0(?!\d)", r"\1", text)


def unmask(text: str, values: Sequence[str]) -> str:
    """MAWPS' `number0` and `N_00` replaced by the values of that row."""
    return re.sub(r"\b(?:number|N_0)(\d+)\b", lambda m: values[int(m[1])] if int(m[1]) < len(values) else m[0], text)


def infix(prefix: str) -> str:
    """`- + 1 2 3` as `( ( 1 + 2 ) - 3 )`.

    Raises:
        ValueError: if operators and numbers do not add up to one expression.
    """
    stack: list[str] = []
    for token in reversed(prefix.split()):
        if token in "+-*/" and len(stack) >= 2:
            stack.append(f"( {stack.pop()} {token} {stack.pop()} )")
        else:
            stack.append(token)
    if len(stack) != 1 or stack[0] in "+-*/":
        raise ValueError(f"{prefix!r} is no equation in prefix notation.")
    return stack[0]
