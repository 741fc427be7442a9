"""The layers of the house, read from the imports."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nanochat_hf"
LAYERS = [
    "model tokenizer formats conversation packing schedules config calculator sandbox_jail once bad_rows __about__",
    "scaling optim tasks data collate generation sandbox runtime stopping compiling attention kernels streaming sources identity texts tokenised loading windows machine",
    "evals rollouts tracking report checkpoint hub hub_folder hub_dataset model_card model_card_text interop",
    "trainer callbacks callback_core callback_push",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def imports(path):
    """Names of the package's own modules that the file imports."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanochat_hf."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert not (module or "").startswith("scripts"), f"{path} imports scripts"


def test_modules_import_from_their_own_layer_or_below():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LEVEL, f"{own} has no layer"
        for name in imports(path):
            if name != own:
                assert LEVEL[name] <= LEVEL[own], f"{path.name} (layer {LEVEL[own]}) imports {name} (layer {LEVEL[name]})"


def test_model_imports_only_itself_and_xla_stays_in_runtime():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "model":
            assert not set(imports(path))
        tree = ast.parse(path.read_text())
        inner = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom) and any(name.split(".")[0] == "torch_xla" for name in names):
                assert path.name == "runtime.py" and id(node) in inner, f"{path} imports torch_xla at line {node.lineno}"
