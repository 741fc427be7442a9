"""The layers of the house, read from the folders and the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanochat_hf"
# From top to bottom: an import goes down this list or stays in its folder, never up.
LAYERS = (
    *(
        "cli",
        "hub",
        "training",
        "rl",
        "evals",
        "serving",
        "generation",
        "interop",
        "packing",
        "data",
        "optim",
        "kernels",
        "tasks",
        "files",
        "machine",
        "scaling",
        "recipes",
    ),
    *("tools", "model", "tokenizer", "conversation", "messages", "config", "errors", "interrupts", "__about__"),
)
XLA = {"machine/xla.py"}
# errors.py meets the other processes at the launcher's store, where there may be no process group
DISTRIBUTED = {"optim", "machine", "errors.py"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def layer(path):
    """layer(…/nanochat_hf/data/formats.py) → "data"."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_file(name):
    """The file of a dotted name in the package, or None: "nanochat_hf.optim" → …/optim/__init__.py."""
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file in TREES), None)


def imported(path):
    """(line, dotted name) of each import in the file, inside functions too; relative names are resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*parts[: -node.level], *filter(None, [node.module]))) if node.level else node.module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def own_files(path):
    """(line, file of the package that is imported there)."""
    for line, name in imported(path):
        file = module_file(name) or module_file(name.rpartition(".")[0])
        if file and file != path:
            yield line, file


def test_every_folder_and_module_has_its_layer():
    assert {layer(path) for path in FILES} - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize(
    "path", [path for path in FILES if layer(path) != "__init__"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_down_or_stay_in_their_folder(path):
    for line, file in own_files(path):
        if layer(file) == "__init__":  # `from nanochat_hf import kernels`: the module itself follows
            continue
        assert LAYERS.index(layer(path)) <= LAYERS.index(layer(file)), (
            f"line {line} imports {file.relative_to(PACKAGE)}, which is above"
        )
    assert not [name for _, name in imported(path) if name.split(".")[0] in ("scripts", "tests")]


def circles(graph):
    """The strongly connected components of more than one node, by Tarjan's algorithm."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in graph.get(node, ()):
            if following not in index:
                visit(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": "b", "b": "a", "c": "a"}) == [{"a", "b"}]
    assert circles({"a": "b", "b": "c", "c": "a", "d": "d"}) == [{"a", "b", "c"}]
    assert circles({"a": "bc", "b": "c"}) == []


def test_no_file_imports_itself_by_way_of_others():
    graph = {path: {file for _, file in own_files(path)} for path in FILES}
    assert [sorted(str(path.relative_to(PACKAGE)) for path in circle) for circle in circles(graph)] == []


@pytest.mark.parametrize(("package", "homes"), [("torch_xla", XLA), ("torch.distributed", DISTRIBUTED)])
def test_packages_that_stay_at_home(package, homes):
    for path in FILES:
        place = path.relative_to(PACKAGE)
        if place.parts[0] in homes or str(place) in homes:
            continue
        lines = [line for line, name in imported(path) if f"{name}.".startswith(f"{package}.")]
        assert not lines, f"{place} imports {package} at line {lines[0]}"


def test_torch_xla_is_imported_inside_functions():
    """Where it is not installed, every module must still be importable."""
    tree = TREES[PACKAGE / "machine" / "xla.py"]
    inner = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        if isinstance(node, ast.Import | ast.ImportFrom) and any(name.split(".")[0] == "torch_xla" for name in names):
            assert id(node) in inner, f"imported at line {node.lineno}"


def test_no_test_imports_another_test():
    for path in (ROOT / "tests").rglob("test_*.py"):
        names = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [name for name in names if name.split(".")[-1].startswith("test_")], path
