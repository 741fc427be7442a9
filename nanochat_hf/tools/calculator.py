"""The tool the model may call: arithmetic without powers, and 'word'.count('x'). Parsed with ast, never evaluated by Python."""

import ast
import operator
import warnings

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
MAX_LENGTH, MAX_SIZE = 200, 10**18


def calculate(expression):
    """calculate("12*(3+4)") → "84"; calculate("'apple'.count('p')") → "2"; None for anything else, too big or undefined."""
    if len(expression) > MAX_LENGTH:
        return None
    expression = expression.strip()
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "1and 2": the model wrote it, nobody at the console did
            tree = ast.parse(expression, mode="eval")
        value = _value(tree.body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as GSM8K's marks write it: 10/2=5
    return str(value)


def _value(node):
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
    if not abs(result) <= MAX_SIZE:  # also refuses nan
        raise ValueError("too big")
    return result
