"""Pretrain a base model: accelerate launch -m scripts.base_train --depth 12 --tokenizer DIR --data 'text/*.parquet' --output-dir runs/base"""

import sys
from dataclasses import asdict, dataclass, field, replace

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.callback_core import CoreConfig
from nanochat_hf.config import parse, user_errors
from nanochat_hf.data import SourceConfig, TextBatches
from nanochat_hf.hub import HubConfig, HubPusher
from nanochat_hf.runtime import build_accelerator
from nanochat_hf.tokenizer import load_tokenizer
from scripts.training import TrainConfig, accelerate, run, smoke

PROMPTS = (
    "The capital of France is", "The chemical symbol of gold is", "If yesterday was Friday, then tomorrow will be", "The opposite of hot is",
    "The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is",
)  # fmt: skip


@dataclass(frozen=True)
class BaseConfig:
    """Which model, on which text."""

    data: str = field(metadata={"help": "a Hub name, a file, or a pattern of files with text"})
    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    validation: str | None = field(default=None, metadata={"help": "validation text, as --data (default: other rows of the training text)"})
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    packing: str = field(default="crop", metadata={"help": "crop: cut documents that do not fit; keep: put their rest into a later row"})
    streaming: bool = field(default=False, metadata={"help": "read the training text as a stream, without downloading it first"})
    num_workers: int = field(default=0, metadata={"help": "processes that tokenise and pack; 0: a thread"})
    depth: int = field(default=12, metadata={"help": "layers; everything else follows from it"})
    aspect_ratio: int = field(default=64, metadata={"help": "width per layer"})
    head_dim: int = field(default=128, metadata={"help": "width of an attention head"})
    window_pattern: str = field(default="SSSL", metadata={"help": "attention windows, tiled over the layers: S half, L whole"})
    target_flops: float | None = field(default=None, metadata={"help": "horizon in FLOPs, where --num-steps is not given"})
    target_param_data_ratio: float = field(default=10.5, metadata={"help": "horizon in tokens per matrix and head parameter, else"})


@user_errors
def main(argv=None):
    base, config, core, hub, _ = parse([BaseConfig, TrainConfig, CoreConfig, HubConfig], argv, description=__doc__)
    config = smoke(config)
    pusher = HubPusher.from_config(hub, idle=config.dry_run or config.plan_only)
    tokenizer = load_tokenizer(base.tokenizer)
    more = [] if config.smoke_test else core.callbacks(tokenizer, None if config.dry_run else config.output_dir)
    model_config = scaling.model_config(
        base.depth, len(tokenizer), config.max_seq_len, aspect_ratio=base.aspect_ratio, head_dim=base.head_dim, window_pattern=base.window_pattern,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    processes = build_accelerator(1, dtype=config.dtype).num_processes
    accumulation = scaling.accumulation_steps(config.total_batch_size, config.device_batch_size, config.max_seq_len, processes)
    accelerator = accelerate(config, accumulation)
    tokens = accumulation * processes * config.device_batch_size * config.max_seq_len
    model = NanochatForCausalLM(model_config)
    counts = scaling.parameter_counts(model)
    num_steps = scaling.training_horizon(
        counts["matrix"] + counts["head"], scaling.flops_per_token(model, config.max_seq_len), tokens,
        num_steps=config.num_steps, target_flops=base.target_flops, ratio=base.target_param_data_ratio,
    )  # fmt: skip
    shape = dict(
        rows=config.device_batch_size,
        positions=config.max_seq_len,
        rank=accelerator.process_index,
        world_size=processes,
        text_column=base.text_column,
    )
    source = SourceConfig(path=base.data, split=base.split)
    batches = TextBatches(source, tokenizer, **shape, seed=config.seed, mode=base.packing, streaming=base.streaming, num_workers=base.num_workers)
    held_out = replace(source, path=base.validation or base.data)
    validation = TextBatches(
        held_out, tokenizer, **shape, seed=config.seed + 1, streaming=base.streaming and not base.validation, prefetch=0
    ).take(config.eval_batches)
    decay = replace(config, weight_decay=scaling.base_weight_decay(base.depth, config.weight_decay)) if config.weight_decay else config
    folder, _, _ = run(
        decay, accelerator, model, tokenizer, batches, validation, num_steps, description=f"base d{base.depth}", decay=True, pusher=pusher,
        lr_scale=scaling.batch_lr_scale(tokens) if config.total_batch_size else 1.0, settings=asdict(base) | asdict(core),
        callbacks=more,
        prompts=[(text, [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]) for text in PROMPTS],
    )  # fmt: skip
    sys.exit(143 if folder is None else 0)


if __name__ == "__main__":
    main()
