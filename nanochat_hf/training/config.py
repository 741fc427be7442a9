"""How to train: the flags that every training command shares."""

from dataclasses import dataclass, field, replace

from nanochat_hf.optim import MATRIX_OPTIMIZERS


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the data."""

    output_dir: str = field(metadata={"help": "folder for checkpoints, metrics, report and the final model"})
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps (default: see the script)"})
    device_batch_size: int = field(default=32, metadata={"help": "rows a process takes at once"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens of an optimizer step (default: one micro-batch)"}
    )
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16, float16, or float8: bfloat16 with float8 products in training (default: the launcher's; on a CPU the faster one, measured; bfloat16 on XLA)"
        },
    )
    attn: str = field(
        default="auto",
        metadata={
            "help": "auto, flex_attention, cudnn, pallas, sdpa, eager, flash_attention_2 to 4, or a flash kernel of the Hub"
        },
    )
    kernels: bool | None = field(default=None, metadata={"help": "fused Triton kernels in training (default: on CUDA)"})
    compile: bool | None = field(
        default=None,
        metadata={
            "help": "torch.compile the model (default: on CUDA; on a CPU where a C++ compiler and Python's headers are found and the run is long enough, see the plan)"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute layers in backward: less memory, about 30 %% slower"}
    )
    embedding_lr: float = field(default=0.3, metadata={"help": "lr of token and value embeddings (AdamW)"})
    unembedding_lr: float = field(default=0.004, metadata={"help": "lr of the head (AdamW)"})
    matrix_lr: float = field(default=0.02, metadata={"help": "lr of the matrices (Muon)"})
    matrix_optimizer: str = field(
        default="muon", metadata={"help": "muon, or adamw: a baseline that wants about --matrix-lr 0.002"}
    )
    scalar_lr: float = field(default=0.5, metadata={"help": "lr of the residual scalars (AdamW)"})
    weight_decay: float = field(default=0.0, metadata={"help": "cautious weight decay of the matrices"})
    init_lr_frac: float = field(default=1.0, metadata={"help": "factor on every lr"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up"})
    warmdown_ratio: float = field(default=0.2, metadata={"help": "last share of the run in which lr falls to 0"})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "clip the gradient to this norm (default: off)"}
    )
    max_skipped: int = field(
        default=20, metadata={"help": "stop after so many steps in a row with non-finite gradients"}
    )
    eval_every: int = field(default=150, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})
    eval_batches: int = field(
        default=8,
        metadata={
            "help": "micro-batches of validation data: of each process in base training, of all of them together in fine-tuning, where no row counts twice"
        },
    )
    keep_best: bool = field(
        default=False, metadata={"help": "export the model of the lowest validation bpb to OUTPUT_DIR/best"}
    )
    sample_every: int = field(default=0, metadata={"help": "steps between answers to fixed prompts; 0: none"})
    save_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0: only at the end"})
    save_minutes: float = field(default=0.0, metadata={"help": "minutes between checkpoints; 0: off"})
    keep: int = field(default=2, metadata={"help": "newest checkpoints to keep; 0: all"})
    resume: str | None = field(
        default=None, metadata={"help": "auto, a checkpoint folder, or org/name[@revision] of a pushed one"}
    )
    report_to: str = field(default="none", metadata={"help": "wandb, trackio, tensorboard or none"})
    run_name: str = field(default="nanochat_hf", metadata={"help": "project name for the tracker"})
    log_every: int = field(default=10, metadata={"help": "steps between log entries"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})
    dry_run: bool = field(default=False, metadata={"help": "train and log, but write no checkpoint and no model"})
    smoke_test: bool = field(
        default=False, metadata={"help": "5 steps of one row of 128 positions, nothing tracked or saved"}
    )
    plan_only: bool = field(default=False, metadata={"help": "print the plan of the run and stop"})

    def __post_init__(self):
        for name in ("device_batch_size", "max_seq_len", "log_every", "eval_batches", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1".replace("_", "-"))
        for name in ("eval_every", "sample_every", "save_every", "save_minutes", "keep", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0; 0 is off".replace("_", "-"))
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"--num-steps {self.num_steps} must be at least 1; leave it out for the whole horizon")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"--max-grad-norm {self.max_grad_norm} must be above 0; leave it out to clip nothing")
        if not 0 <= self.warmdown_ratio <= 1:
            raise ValueError(f"--warmdown-ratio {self.warmdown_ratio} must lie between 0 and 1")
        if self.matrix_optimizer not in MATRIX_OPTIMIZERS:
            raise ValueError(
                f"--matrix-optimizer {self.matrix_optimizer} is unknown; choose from {', '.join(MATRIX_OPTIMIZERS)}"
            )
        if self.report_to not in ("wandb", "trackio", "tensorboard", "none"):
            raise ValueError(f"--report-to {self.report_to} is unknown; choose wandb, trackio, tensorboard or none")


def smoke(config):
    """The configuration as --smoke-test changes it: small, untracked, unsaved."""
    if not config.smoke_test:
        return config
    return replace(
        config,
        num_steps=5,
        device_batch_size=1,
        max_seq_len=128,
        total_batch_size=None,
        eval_every=0,
        eval_batches=1,
        sample_every=0,
        warmup_steps=0,
        save_every=0,
        save_minutes=0.0,
        report_to="none",
        dry_run=True,
        log_every=1,
    )
