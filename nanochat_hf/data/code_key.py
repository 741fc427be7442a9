"""A digest of code, which changes when the code does: part of the key of a cache that holds what the code made."""

import hashlib
import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SIMPLE = (str, bytes, int, float, bool, type(None))


def code_key(functions: Iterable[Callable], modules: Iterable[types.ModuleType] = ()) -> str:
    """A digest that changes with what the functions do, and with the files of `modules`.

    Functions and constants of its module that a function uses count too. For functions, the place in the file and the
    name of the function do not matter.
    """
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    seen: set[int] = set()
    for function in functions:
        for part in _parts(function, seen):
            digest.update(part.encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterable[str]:
    """Texts that together say what a function does.

    Of a plain value it is the repr. Of any other object it is the name of its type, because its repr may hold an
    address, which differs from run to run.
    """
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    if inspect.ismethod(value):
        yield from _parts(vars(value.__self__) if hasattr(value.__self__, "__dict__") else None, seen)
        value = value.__func__
    if isinstance(value, types.FunctionType):
        if id(value) in seen:
            return
        seen.add(id(value))
        yield from _code_parts(value.__code__, value.__globals__, seen)
        for held in (value.__defaults__, value.__kwdefaults__, [_cell(cell) for cell in value.__closure__ or ()]):
            yield from _parts(held, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
            yield from _parts(item, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key)
            yield from _parts(item, seen)
    elif isinstance(value, SIMPLE):
        yield repr(value)
    elif hasattr(value, "pattern"):  # a regular expression
        yield f"{value.pattern!r} {value.flags}"
    elif callable(value) and hasattr(value, "func"):  # functools.partial
        yield from _parts([value.func, value.args, value.keywords], seen)
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _code_parts(code: types.CodeType, names: dict[str, Any], seen: set[int]) -> Iterable[str]:
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_parts(constant, names, seen)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
    for name in code.co_names:
        if name in names and not isinstance(names[name], types.ModuleType):
            yield from _parts(names[name], seen)
