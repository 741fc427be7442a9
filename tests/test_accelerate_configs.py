"""Every file in accelerate_configs/ is one that Accelerate reads, and selects what its name says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
SELECTS = {
    "cpu": (DistributedType.NO, "bf16", True), "single_gpu": (DistributedType.NO, "bf16", False), "mps": (DistributedType.NO, "no", False),
    "multi_gpu": (DistributedType.MULTI_GPU, "bf16", False), "multi_node": (DistributedType.MULTI_GPU, "bf16", False),
    "fsdp2": (DistributedType.FSDP, "bf16", False), "fp8": (DistributedType.NO, "fp8", False), "tpu": (DistributedType.XLA, "no", False),
}  # fmt: skip


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
    assert load_config_from_file(str(FOLDER / "fp8.yaml")).fp8_config["backend"] == "AO"
