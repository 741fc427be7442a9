"""Pretrain a base model: accelerate launch -m scripts.base_train --depth 12 --tokenizer DIR --data 'text/*.parquet' --output-dir runs/base"""

import sys
from dataclasses import asdict, dataclass, field, replace

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.sources import SourceConfig, load_source, load_stream
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.data.texts import is_remote
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint
from nanochat_hf.machine.accelerator import process_count
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.callbacks.core import CoreConfig
from nanochat_hf.training.config import TrainConfig, smoke
from nanochat_hf.training.run import accelerate, data_workers, run

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
HELD_OUT = 1000  # documents, where no validation data is named


@dataclass(frozen=True)
class BaseConfig:
    """Which model, on which text."""

    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    data: str = field(
        default="karpathy/fineweb-edu-100b-shuffle",
        metadata={"help": "a Hub name, a folder, a file, or a pattern of files with text"},
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "validation text, as --data (default: the first documents, a twentieth or 1000, are held out)"
        },
    )
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    packing: str = field(
        default="crop", metadata={"help": "crop: cut documents that do not fit; keep: put their rest into a later row"}
    )
    streaming: bool | None = field(
        default=None, metadata={"help": "read as a stream, without downloading first (default: the Hub's data, yes)"}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "processes that tokenise and pack; 0: a thread (default: 4 on CUDA, else 0)"}
    )
    depth: int = field(default=12, metadata={"help": "layers; everything else follows from it"})
    aspect_ratio: int = field(default=64, metadata={"help": "width per layer"})
    head_dim: int = field(default=128, metadata={"help": "width of an attention head"})
    window_pattern: str = field(
        default="SSSL", metadata={"help": "attention windows, tiled over the layers: S half, L whole"}
    )
    scale_lr_to_batch: bool = field(
        default=True,
        metadata={
            "help": "lrs × √(tokens of a step / 2^19), near which the rule was found; false: as they are, for toy batches"
        },
    )
    target_flops: float | None = field(
        default=None, metadata={"help": "horizon in FLOPs, where --num-steps is not given"}
    )
    target_param_data_ratio: float = field(
        default=10.5, metadata={"help": "horizon in tokens per matrix and head parameter, else"}
    )


@dataclass(frozen=True)
class BaseTrainConfig(TrainConfig):
    """How to pretrain: what differs from fine-tuning's defaults."""

    weight_decay: float = field(
        default=0.2,
        metadata={
            "help": "cautious weight decay of the matrices at depth 12: × (12/depth)² (Muon), falls linearly to 0"
        },
    )
    warmdown_ratio: float = field(default=0.5, metadata={"help": "last share of the run in which lr falls to 0"})
    eval_every: int = field(default=250, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})
    sample_every: int = field(
        default=2000, metadata={"help": "steps between the seven prompts, also answered at the end; 0: none"}
    )


@user_errors
def main(argv=None):
    base, config, core, hub, _ = parse([BaseConfig, BaseTrainConfig, CoreConfig, HubConfig], argv, description=__doc__)
    config, base = smoke(config), replace(base, num_workers=data_workers(base.num_workers))
    pusher = HubPusher.from_config(hub, idle=config.dry_run or config.plan_only)
    tokenizer = load_tokenizer(base.tokenizer)
    more = [] if config.smoke_test else core.callbacks(tokenizer, None if config.dry_run else config.output_dir)
    model_config = scaling.model_config(
        base.depth,
        len(tokenizer),
        config.max_seq_len,
        aspect_ratio=base.aspect_ratio,
        head_dim=base.head_dim,
        window_pattern=base.window_pattern,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processes = process_count()
    accumulation = scaling.accumulation_steps(
        config.total_batch_size, config.device_batch_size, config.max_seq_len, processes
    )
    accelerator = accelerate(config, accumulation, model_config.hidden_size)
    tokens = accumulation * processes * config.device_batch_size * config.max_seq_len
    num_steps = horizon(base, config, model_config, tokens)
    shape = dict(
        rows=config.device_batch_size,
        positions=config.max_seq_len,
        rank=accelerator.process_index,
        world_size=processes,
        text_column=base.text_column,
    )
    base, source, held_out = sources(base, processes)
    batches = TextBatches(
        source,
        tokenizer,
        **shape,
        seed=config.seed,
        mode=base.packing,
        streaming=base.streaming,
        num_workers=base.num_workers,
    )
    cropped = batches.outlook(tokens)
    lost = (
        f"{cropped:.0%} of a step's tokens cropped away (--packing keep loses none)"
        if base.packing == "crop"
        else "no token lost"
    )
    plan = {"data": f"{base.data}, packing {base.packing}: {lost}"}
    # held-out rows are taken by the same split as training leaves them out, so with as many workers
    validation = TextBatches(
        held_out,
        tokenizer,
        **shape,
        seed=config.seed + 1,
        streaming=base.streaming and not base.validation,
        prefetch=0,
        num_workers=0 if base.validation else base.num_workers,
    ).take(config.eval_batches)
    model = NanochatForCausalLM(model_config)
    if config.matrix_optimizer == "muon":  # the rule is Muon's; another optimizer takes the weight decay as it is given
        config = replace(config, weight_decay=scaling.base_weight_decay(base.depth, config.weight_decay))
    folder, _, _ = run(
        config,
        accelerator,
        model,
        tokenizer,
        batches,
        validation,
        num_steps,
        description=f"base d{base.depth}",
        decay=True,
        pusher=pusher,
        fetch=fetch_checkpoint,
        plan=plan,
        lr_scale=scaling.batch_lr_scale(tokens) if base.scale_lr_to_batch else 1.0,
        settings=asdict(base) | asdict(core),
        callbacks=more,
        prompts=[
            (text, [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]) for text in PROMPTS
        ],
    )
    sys.exit(143 if folder is None else 0)


def sources(base, processes):
    """(base with `streaming` decided, training source, validation source): without --validation the first documents are held out."""
    source = SourceConfig(path=base.data, split=base.split)
    base = replace(base, streaming=is_remote(source) if base.streaming is None else base.streaming)
    if base.validation:
        return base, source, replace(source, path=base.validation)
    if base.streaming:  # a long stream is not counted to its end
        rows = sum(1 for _ in load_stream(source).take(2 * HELD_OUT))
        rows = 20 * HELD_OUT if rows >= 2 * HELD_OUT else rows
    else:
        rows = len(load_source(source, check=False))
    count = max(processes * max(1, base.num_workers), min(HELD_OUT, rows // 20))
    if count >= rows:
        raise ValueError(
            f"{base.data}: of {rows} documents none can be held out for {processes} processes; give --validation"
        )
    return base, replace(source, start=count), replace(source, rows=count)


def horizon(base, config, model_config, tokens):
    """Optimizer steps of the run, from sizes alone: ValueError before a weight is made or a document read."""
    model = scaling.skeleton(model_config)
    counts = scaling.parameter_counts(model)
    return scaling.training_horizon(
        counts["matrix"] + counts["head"],
        scaling.flops_per_token(model, config.max_seq_len),
        tokens,
        num_steps=config.num_steps,
        target_flops=base.target_flops,
        ratio=base.target_param_data_ratio,
    )


if __name__ == "__main__":
    main()
