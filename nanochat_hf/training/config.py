"""How to train: the flags that every training command shares, in parts that stand beside what they configure."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any

from nanochat_hf.config import at_least
from nanochat_hf.optim import MATRIX_OPTIMIZERS, OptimizerConfig

from .callbacks.evaluate import EvalConfig
from .callbacks.save import SaveConfig
from .schedules import ScheduleConfig
from .tracking import TrackConfig


@dataclass(frozen=True)
class RunConfig:
    """The run itself: where it writes, how far it goes and how large a step is."""

    _argument_group_name = "run"

    output_dir: str = field(metadata={"help": "folder for checkpoints, metrics, report and the final model"})
    resume: str | None = field(
        default=None, metadata={"help": "auto, a checkpoint folder, or org/name[@revision] of a pushed one"}
    )
    num_steps: int | None = field(default=None, metadata={"help": "optimizer steps (default: see the script)"})
    device_batch_size: int = field(default=32, metadata={"help": "rows a process takes at once"})
    total_batch_size: int | None = field(
        default=None, metadata={"help": "tokens of an optimizer step (default: one micro-batch)"}
    )
    max_seq_len: int = field(default=2048, metadata={"help": "positions of a row"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})
    dry_run: bool = field(default=False, metadata={"help": "train and log, but write no checkpoint and no model"})
    smoke_test: bool = field(
        default=False, metadata={"help": "5 steps of one row of 128 positions, nothing tracked or saved"}
    )
    plan_only: bool = field(default=False, metadata={"help": "print the plan of the run and stop"})

    def __post_init__(self) -> None:
        at_least(self, 1, "device_batch_size", "max_seq_len")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"--num-steps {self.num_steps} must be at least 1; leave it out for the whole horizon")

    @property
    def writes(self) -> bool:
        """Whether the run leaves anything in its folder."""
        return not (self.dry_run or self.plan_only)


@dataclass(frozen=True)
class ComputeConfig:
    """What computes, and in which precision."""

    _argument_group_name = "compute"

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16, float16, or float8: bfloat16 with float8 products in training "
            "(default: the launcher's; on a CPU the faster one, measured; bfloat16 on XLA)"
        },
    )
    attn: str = field(
        default="auto",
        metadata={
            "help": "auto, flex_attention, cudnn, pallas, sdpa, eager, flash_attention_2 to 4, "
            "or a flash kernel of the Hub"
        },
    )
    kernels: bool | None = field(default=None, metadata={"help": "fused Triton kernels in training (default: on CUDA)"})
    compile: bool | None = field(
        default=None,
        metadata={
            "help": "torch.compile the model (default: on CUDA; on a CPU where a C++ compiler and Python's headers "
            "are found and the run is long enough, see the plan)"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute layers in backward: less memory, about 30 %% slower"}
    )


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates, betas, weight decays, and what is done about gradients that are too large or not finite.

    The fields that OptimizerConfig has too are passed on to it.
    """

    _argument_group_name = "optimizer"

    embedding_lr: float = field(default=0.3, metadata={"help": "lr of token and value embeddings (AdamW)"})
    value_embeds_lr: float | None = field(
        default=None, metadata={"help": "lr of the value embeddings (default: --embedding-lr)"}
    )
    unembedding_lr: float = field(default=0.004, metadata={"help": "lr of the head (AdamW)"})
    matrix_lr: float = field(default=0.02, metadata={"help": "lr of the matrices (Muon)"})
    matrix_optimizer: str = field(
        default="muon", metadata={"help": "muon, or adamw: a baseline that wants about --matrix-lr 0.002"}
    )
    scalar_lr: float = field(default=0.5, metadata={"help": "lr of the residual scalars (AdamW)"})
    scalar_eps: float = field(
        default=1e-10, metadata={"help": "AdamW's epsilon for the residual scalars: 1e-5 ignores gradients of rounding"}
    )
    smear_lr: float = field(default=0.2, metadata={"help": "lr of smear and backout (AdamW)"})
    weight_decay: float = field(default=0.0, metadata={"help": "cautious weight decay of the matrices"})
    unembedding_decay: float = field(default=0.0, metadata={"help": "weight decay of the head"})
    embedding_decay: float = field(default=0.0, metadata={"help": "weight decay of the token embedding"})
    value_embeds_decay: float = field(default=0.0, metadata={"help": "weight decay of the value embeddings"})
    resid_decay: float = field(default=0.0, metadata={"help": "weight decay of the residual scalars"})
    unembedding_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2 of the head"})
    embedding_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2 of token and value embeddings"})
    muon_beta2: float = field(default=0.95, metadata={"help": "beta2 of Muon's variance reduction"})
    muon_margin: float = field(
        default=0.02, metadata={"help": "share by which Muon raises the norm before it orthogonalises"}
    )
    muon_eq: bool = field(default=False, metadata={"help": "equal rows before Muon orthogonalises (MuonEq), unfused"})
    muon_plus: bool = field(
        default=False, metadata={"help": "the norm of an orthogonal matrix after it (Muon+), unfused"}
    )
    init_lr_frac: float = field(default=1.0, metadata={"help": "factor on every lr"})
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "clip the gradient to this norm (default: off)"}
    )
    max_skipped: int = field(
        default=20, metadata={"help": "stop after so many steps in a row with non-finite gradients"}
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "max_skipped")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"--max-grad-norm {self.max_grad_norm} must be above 0; leave it out to clip nothing")
        if self.matrix_optimizer not in MATRIX_OPTIMIZERS:
            raise ValueError(
                f"--matrix-optimizer {self.matrix_optimizer} is unknown; choose from {', '.join(MATRIX_OPTIMIZERS)}"
            )

    def optimizer(self, lr_scale: float = 1.0) -> OptimizerConfig:
        """The optimizer's own configuration, with every learning rate times `lr_scale` and --init-lr-frac."""
        own = {part.name for part in dataclasses.fields(OptimizerConfig)}
        return OptimizerConfig(
            **{name: value for name, value in dataclasses.asdict(self).items() if name in own}, batch_lr_scale=lr_scale
        )


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the data: `TrainConfig(*parse([MyConfig, *PARTS])[1:-1])`."""

    run: RunConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @classmethod
    def of(cls, **flags: Any) -> "TrainConfig":
        """From flags by name, the rest by default: `TrainConfig.of(output_dir="runs/a", matrix_lr=0.01)`.

        TypeError for an unknown one.
        """
        parts: list[Any] = []
        for kind in PARTS:
            names = {part.name for part in dataclasses.fields(kind)}
            parts.append(kind(**{name: flags.pop(name) for name in list(flags) if name in names}))
        if flags:
            raise TypeError(f"no training flag is called {', '.join(flags)}")
        return cls(*parts)

    def parts(self) -> tuple[Any, ...]:
        """The parts, in the order of PARTS."""
        return tuple(getattr(self, part.name) for part in dataclasses.fields(self))

    def settings(self) -> dict[str, Any]:
        """{flag's name: value}, of all parts: what is printed, tracked and saved with every checkpoint."""
        return {name: value for part in self.parts() for name, value in dataclasses.asdict(part).items()}

    def smoked(self) -> "TrainConfig":
        """The configuration as --smoke-test changes it, where it was given: small, untracked, unsaved."""
        if not self.run.smoke_test:
            return self
        small = {"num_steps": 5, "device_batch_size": 1, "max_seq_len": 128, "total_batch_size": None}
        return replace(
            self,
            run=replace(self.run, **small, dry_run=True),
            schedule=replace(self.schedule, warmup_steps=0),
            evaluate=replace(self.evaluate, eval_every=0, eval_batches=1, sample_every=0),
            save=replace(self.save, save_every=0, save_minutes=0.0),
            track=replace(self.track, report_to="none", log_every=1),
        )


PARTS = (RunConfig, ComputeConfig, OptimConfig, ScheduleConfig, EvalConfig, SaveConfig, TrackConfig)
