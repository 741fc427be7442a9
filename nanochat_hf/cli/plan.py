"""What a base run takes, before it starts: memory, time and money.

python -m nanochat_hf.cli.plan --depth 12 --gpus 8 --gpu h100; with --depth 4,8,12,20,26 a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_hf import scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.model import NanochatConfig, NanochatForCausalLM
from nanochat_hf.recipes import RECIPES
from nanochat_hf.training.architecture import ArchitectureConfig, recipe_line

# GiB as the driver reports them or the vendor's data sheet says
MEMORY = {
    "b200": 179,
    "h200": 140,
    "h100": 79,
    "h800": 79,
    "a100": 79,
    "a800": 79,
    "l40s": 45,
    "l4": 22,
    "4090": 24,
    "3090": 24,
}


@dataclass(frozen=True)
class PlanConfig(ArchitectureConfig):
    """Which run to plan, and on what."""

    depth: str = field(default="12", metadata={"help": "layers, or several, 4,8,12, for a table"})
    gpus: int = field(default=8, metadata={"help": "GPUs"})
    gpu: str = field(default="h100", metadata={"help": f"their kind: {', '.join(MEMORY)}"})
    mfu: float = field(default=scaling.PLANNED_MFU, metadata={"help": "share of the peak FLOP/s that training reaches"})
    price: float = field(default=2.5, metadata={"help": "of a GPU for an hour, in your currency"})
    vocab_size: int = field(default=32768, metadata={"help": "tokens of the tokenizer"})
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    device_batch_size: int = field(default=32, metadata={"help": "rows a GPU takes at once"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens of an optimizer step (default: one micro-batch of all GPUs)"}
    )
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps"})
    target_flops: float | None = field(
        default=None, metadata={"help": "horizon in FLOPs, where --num-steps is not given"}
    )
    target_param_data_ratio: float = field(
        default=10.5, metadata={"help": "horizon in tokens per matrix and head parameter, else"}
    )
    auto_batch: bool = field(
        default=False, metadata={"help": "tokens of a step by the run's length, where --total-batch-size is not given"}
    )

    def sizes(self, depth: int) -> NanochatConfig:
        """The model of this depth."""
        return scaling.model_config(depth, self.vocab_size, self.max_seq_len, **self.architecture)

    def step_tokens(self, depth: int) -> int:
        """Tokens of an optimizer step at this depth."""
        if self.auto_batch and self.total_batch_size is None:
            return scaling.auto_batch(*(scaling.counted_parameters(self.sizes(size)) for size in (depth, 12)))
        return self.total_batch_size or self.gpus * self.device_batch_size * self.max_seq_len

    def __post_init__(self) -> None:
        if self.gpu.lower() not in MEMORY:
            raise ValueError(f"--gpu {self.gpu} is unknown; choose from {', '.join(MEMORY)}")
        for name in ("gpus", "device_batch_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1".replace("_", "-"))
        if not all(part.strip().isdigit() for part in self.depth.split(",")):
            raise ValueError(f"--depth {self.depth} must be whole numbers with commas between; try 4,8,12")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of one depth, or a table of several."""
    config, _ = parse([PlanConfig], argv, description=__doc__, presets=RECIPES)
    depths = [int(part) for part in config.depth.split(",")]
    if len(depths) == 1:
        run, model = figures(config, depths[0])
        room = MEMORY[config.gpu.lower()]
        tokens = config.step_tokens(depths[0])
        lines = recipe_line(config.recipe, config) | scaling.describe(
            model, config.device_batch_size, config.max_seq_len, config.gpus, tokens, run["steps"]
        )
        lines["time"] = (
            f"about {scaling.shown_hours(run['hours'])} on {config.gpus} × {config.gpu.upper()} at {config.mfu:.0%} MFU"
        )
        lines["cost"] = f"about {run['cost']:,.2f} at {config.price:g} a GPU-hour"
        print(f"base d{depths[0]}:", *(f"  {name:<11} {text}" for name, text in lines.items()), sep="\n")
        if run["GiB"] > room:
            print(
                f"warning: {run['GiB']:.0f} GiB do not fit {room} GiB; "
                f"lower --device-batch-size to {fitting(config, model)}"
            )
    else:
        print(
            f"{config.gpus} × {config.gpu.upper()}, {config.mfu:.0%} MFU, {config.price:g} a GPU-hour, "
            f"{config.device_batch_size} rows; * does not fit"
        )
        table([figures(config, depth)[0] for depth in depths], MEMORY[config.gpu.lower()])


def figures(config: PlanConfig, depth: int) -> tuple[dict[str, Any], NanochatForCausalLM]:
    """The figures of one depth by column, and its model, which has no memory."""
    model, step_tokens = scaling.skeleton(config.sizes(depth)), config.step_tokens(depth)
    scaling.accumulation_steps(step_tokens, config.device_batch_size, config.max_seq_len, config.gpus)
    counts, flops = scaling.parameter_counts(model), scaling.flops_per_token(model, config.max_seq_len)
    steps = scaling.training_horizon(
        counts["matrix"] + counts["head"],
        flops,
        step_tokens,
        num_steps=config.num_steps,
        target_flops=config.target_flops,
        ratio=config.target_param_data_ratio,
    )
    tokens = steps * step_tokens
    peak = scaling.peak_of(config.gpu)
    if peak is None:
        raise ValueError(f"--gpu {config.gpu}: its FLOP/s are unknown; choose from {', '.join(MEMORY)}")
    hours = scaling.training_hours(flops * tokens, peak, config.gpus, config.mfu)
    memory = scaling.memory_per_gpu(model, config.device_batch_size, config.max_seq_len, config.gpus)["total"]
    return {
        "depth": depth,
        "parameters": counts["total"],
        "tokens": tokens,
        "steps": steps,
        "FLOPs": flops * tokens,
        "GiB": memory,
        "hours": hours,
        "cost": hours * config.gpus * config.price,
    }, model


def fitting(config: PlanConfig, model: NanochatForCausalLM) -> int:
    """The most rows, a power of two, that fit the GPU; 0 if not even one does."""
    rows = [2**i for i in range(10)]
    room = MEMORY[config.gpu.lower()]
    return max(
        (n for n in rows if scaling.memory_per_gpu(model, n, config.max_seq_len, config.gpus)["total"] <= room),
        default=0,
    )


def table(runs: Sequence[Mapping[str, Any]], room: float) -> None:
    """Print a line for each depth; `room` is the GPU's memory in GiB."""
    print(
        "| depth | parameters | tokens | steps | FLOPs | GiB a GPU | time | cost |\n|---|---|---|---|---|---|---|---|"
    )
    for run in runs:
        print(
            f"| {run['depth']} | {run['parameters'] / 1e6:,.1f} M | {run['tokens'] / 1e9:,.2f} B | {run['steps']:,} "
            f"| {run['FLOPs']:.2e} | {run['GiB']:.1f}{'*' if run['GiB'] > room else ''} "
            f"| {scaling.shown_hours(run['hours'])} | {run['cost']:,.2f} |"
        )


if __name__ == "__main__":
    main()
