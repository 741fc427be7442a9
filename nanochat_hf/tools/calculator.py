"""The calculator that the model may call: arithmetic without powers, and 'word'.count('x').

An expression is parsed with `ast` and computed here; Python never evaluates it.
"""

import ast
import operator
import warnings
from collections.abc import Callable

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MAX_LENGTH = 200  # characters of an expression
MAX_SIZE = 10**18  # of any number, in between and at the end


def calculate(expression: str) -> str | None:
    """Compute an expression; None for anything that is not arithmetic, too big, or undefined.

    >>> calculate("12*(3+4)")
    '84'
    >>> calculate("'apple'.count('p')")
    '2'
    >>> calculate("2**8") is None
    True
    """
    if len(expression) > MAX_LENGTH:
        return None
    expression = expression.strip()
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")  # 1,000
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of "1and 2" on the console; the model wrote it, not the user
            tree = ast.parse(expression, mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as GSM8K writes it: 10/2=5
    return str(value)


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            result = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            result = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            result = _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            result = OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            result = text.count(part)
        case _:
            raise ValueError("not arithmetic")
    if not abs(result) <= MAX_SIZE:  # this way round it also refuses nan
        raise ValueError("too big")
    return result
