"""Every public function of the package says what it takes and returns."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nanochat_hf"


def open_ends(tree: ast.Module) -> list[str]:
    """Each public function that lacks a type, with the parameters that do; a Triton kernel takes pointers and sizes."""
    found = []
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        owner, names = parents[node], [node.name]
        while not isinstance(owner, ast.Module):
            names.append(getattr(owner, "name", "_"))  # within a function's branches: private
            owner = parents[owner]
        nested = isinstance(parents[node], ast.FunctionDef | ast.AsyncFunctionDef)
        if nested or any(name.startswith("_") and not name.endswith("__") for name in names):
            continue
        if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        every = node.args
        parameters = [*every.posonlyargs, *every.args, *every.kwonlyargs, every.vararg, every.kwarg]
        lacking = [p.arg for p in parameters if p and p.annotation is None and p.arg not in ("self", "cls", "ctx")]
        if node.returns is None and not node.name.endswith("__"):  # its protocol says what a magic method returns
            lacking.append("return")
        if lacking:
            found.append(f"{'.'.join(reversed(names))} (line {node.lineno}): {', '.join(lacking)}")
    return found


def test_functions_without_types_are_found():
    tree = ast.parse("class A:\n def f(self, x, *, y: int): pass\n def _g(self, x): pass\ndef h(x: int) -> int: pass")
    assert open_ends(tree) == ["A.f (line 2): x, return"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_typed(path):
    assert open_ends(ast.parse(path.read_text())) == []
