"""Every file in accelerate_configs/ is one that Accelerate reads, and selects what its name says."""

import importlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "accelerate_configs"
SELECTS = {
    "cpu": (DistributedType.NO, None, True),
    "single_gpu": (DistributedType.NO, "bf16", False),
    "mps": (DistributedType.NO, "no", False),
    "multi_gpu": (DistributedType.MULTI_GPU, "bf16", False),
    "multi_node": (DistributedType.MULTI_GPU, "bf16", False),
    "fsdp2": (DistributedType.FSDP, "bf16", False),
    "fp8": (DistributedType.NO, "fp8", False),
    "tpu": (DistributedType.XLA, "no", False),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_it_and_selects(path):
    config = load_config_from_file(str(path))
    kind, precision, cpu = SELECTS[path.stem]
    assert (config.distributed_type, config.mixed_precision, config.use_cpu) == (kind, precision, cpu)
    assert path.read_text().startswith("#"), "says what it is for"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "scripts.chat_sft"])
    assert arguments.training_script == "scripts.chat_sft" and arguments.module


def test_special_settings():
    fsdp = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_transformer_layer_cls_to_wrap"] == "NanochatDecoderLayer"
    assert load_config_from_file(str(FOLDER / "multi_node.yaml")).num_machines == 2
    assert not load_config_from_file(str(FOLDER / "fp8.yaml")).fp8_config, "no package of Accelerate's is asked for"


@pytest.mark.parametrize("script", ["base_train", "chat_sft"])
def test_the_tpu_launcher_finds_and_sends_the_function(script):
    """It imports the script, pickles its function for a process a chip, and calls it without arguments."""
    name = load_config_from_file(str(FOLDER / "tpu.yaml")).main_training_function
    function = getattr(importlib.import_module(f"scripts.{script}"), name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert all(p.default is not p.empty for p in inspect.signature(function).parameters.values())


def test_nothing_imports_torch_xla_where_it_is_absent():
    """Every module and script is imported, with torch_xla made unfindable whatever is installed."""
    root = FOLDER.parent
    modules = [path.relative_to(root).with_suffix("") for path in sorted((root / "scripts").glob("*.py"))]
    for path in sorted((root / "nanochat_hf").rglob("*.py")):
        if "kernels" not in path.parts:  # most of them need triton
            modules.append(path.relative_to(root).with_suffix(""))
    names = [".".join(path.parts) for path in modules if path.name != "__init__"]
    code = (
        "import sys, importlib; sys.modules['torch_xla'] = None\n"
        f"for name in {names}: importlib.import_module(name)\nprint(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
