"""What the training scripts share: flags, wiring of model, optimizer, callbacks and trainer."""

import math
from dataclasses import dataclass, field

from nanochat_hf import checkpoint, runtime
from nanochat_hf.callbacks import Evaluate, Log, Save
from nanochat_hf.config import dump, resolved
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.scaling import flops_per_token, parameter_counts
from nanochat_hf.schedules import base_lr, muon_momentum
from nanochat_hf.tokenizer import token_bytes
from nanochat_hf.trainer import Trainer


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the data."""

    output_dir: str = field(metadata={"help": "folder for checkpoints, metrics and the final model"})
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps (default: see the script)"})
    device_batch_size: int = field(default=32, metadata={"help": "rows a process takes at once"})
    total_batch_size: int | None = field(default=None, metadata={"help": "tokens of an optimizer step (default: one micro-batch)"})
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16 (default: the launcher's)"})
    embedding_lr: float = field(default=0.3, metadata={"help": "lr of token and value embeddings (AdamW)"})
    unembedding_lr: float = field(default=0.004, metadata={"help": "lr of the head (AdamW)"})
    matrix_lr: float = field(default=0.02, metadata={"help": "lr of the matrices (Muon)"})
    scalar_lr: float = field(default=0.5, metadata={"help": "lr of the residual scalars (AdamW)"})
    weight_decay: float = field(default=0.0, metadata={"help": "cautious weight decay of the matrices"})
    init_lr_frac: float = field(default=1.0, metadata={"help": "factor on every lr"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    warmdown_ratio: float = field(default=0.2, metadata={"help": "last share of the run in which lr falls to 0"})
    max_grad_norm: float | None = field(default=None, metadata={"help": "clip the gradient to this norm (default: off)"})
    eval_every: int = field(default=150, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})
    eval_batches: int = field(default=8, metadata={"help": "micro-batches of validation data per process"})
    save_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only at the end"})
    keep: int = field(default=2, metadata={"help": "newest checkpoints to keep; 0: all"})
    resume: str | None = field(default=None, metadata={"help": "auto, or a checkpoint folder"})
    report_to: str = field(default="none", metadata={"help": "wandb, trackio, tensorboard or none"})
    run_name: str = field(default="nanochat_hf", metadata={"help": "project name for the tracker"})
    log_every: int = field(default=10, metadata={"help": "steps between log entries"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self):
        for name in ("device_batch_size", "max_seq_len", "log_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1".replace("_", "-"))
        if not 0 <= self.warmdown_ratio <= 1:
            raise ValueError(f"--warmdown-ratio {self.warmdown_ratio} must lie between 0 and 1")


def run(config, accelerator, model, tokenizer, batches, validation, num_steps, *, description, settings=None, lr_scale=1.0, decay=False):
    """Train `model` on `batches` for `num_steps`, evaluate, save; returns (final folder, Trainer, Evaluate), or None for the folder when stopped."""
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; use the tokenizer it was made with"
        )
    optimizer_config = OptimizerConfig(
        embedding_lr=config.embedding_lr, unembedding_lr=config.unembedding_lr, matrix_lr=config.matrix_lr, scalar_lr=config.scalar_lr,
        weight_decay=config.weight_decay, batch_lr_scale=lr_scale * config.init_lr_frac,
    )  # fmt: skip
    optimizer = MuonAdamW(build_param_groups(model, optimizer_config))

    def schedule(optimizer, step):
        progress, warmup = step / num_steps, config.warmup_steps / num_steps
        multiplier = base_lr(min(progress + 0.5 / num_steps, 1.0), warmup, config.warmdown_ratio, 0.0)
        apply_schedule(getattr(optimizer, "optimizer", optimizer), multiplier, muon_momentum(step), 1 - progress if decay else 1.0)
        return multiplier

    trainer = Trainer(
        accelerator, model, optimizer, batches, num_steps=num_steps, schedule=schedule, max_grad_norm=config.max_grad_norm,
        stop=runtime.StopSignal(accelerator),
    )  # fmt: skip
    resume = checkpoint.resolve(config.output_dir, config.resume)
    if resume:
        checkpoint.load(trainer, resume)
        accelerator.print(f"resumed from {resume} at step {trainer.state.step} of {num_steps}")
    settings = resolved(config) | (settings or {}) | {"num_steps": num_steps}
    if accelerator.is_main_process:
        dump(checkpoint.prepare_folder(config.output_dir) / "config.json", settings)
    flops, counts = flops_per_token(model, config.max_seq_len), parameter_counts(model)
    tokens = config.device_batch_size * config.max_seq_len * accelerator.num_processes * accelerator.gradient_accumulation_steps
    accelerator.print(
        f"{description}: {counts['total']:,} parameters, {flops:.3g} FLOPs per token, {num_steps} steps of {tokens:,} tokens "
        f"({accelerator.gradient_accumulation_steps} micro-batches on {accelerator.num_processes} processes), "
        f"device {accelerator.device}, mixed precision {accelerator.mixed_precision}, attention {model.config._attn_implementation}"
    )
    if config.report_to != "none":
        accelerator.init_trackers(config.run_name, config=settings)
    evaluate = Evaluate(validation, token_bytes(tokenizer), every=config.eval_every, output_dir=config.output_dir)
    log = Log(trainer, description=description, flops_per_token=flops, every=config.log_every, output_dir=config.output_dir)
    trainer.callbacks = [log, Save(config.output_dir, tokenizer, settings, every=config.save_every, keep=config.keep), evaluate]
    trainer.fit()
    if trainer.stopped:
        accelerator.print(f"stopped at step {trainer.state.step}; continue with --resume auto")
        return None, trainer, evaluate
    if math.isinf(evaluate.best):  # the run was already finished when resumed
        evaluate.run(trainer)
    if accelerator.is_main_process:
        checkpoint.export(model, tokenizer, f"{config.output_dir}/final")
        accelerator.print(
            f"minimum validation bpb {evaluate.best:.4f}; {trainer.state.seconds:.0f} s of training; model in {config.output_dir}/final"
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return f"{config.output_dir}/final", trainer, evaluate
