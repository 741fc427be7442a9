"""What pretraining adds to a run: its flags, and the sizes and rules that follow from the depth."""

from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerFast

from nanochat_hf import scaling
from nanochat_hf.data.loading import is_remote
from nanochat_hf.data.reports import check_policy
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.model import NanochatConfig
from nanochat_hf.recipes import RECIPES

from .architecture import ArchitectureConfig
from .callbacks.evaluate import EvalConfig
from .config import PARTS, OptimConfig, TrainConfig
from .equipment import data_workers
from .schedules import DECAY_SHAPES, ScheduleConfig

TEXT = "karpathy/climbmix-400b-shuffle"  # its last file is for validation


LAST = "last"  # --validation: the last file of the data
DECAY_RULES = ("depth", "data", "given")


@dataclass(frozen=True)
class BaseConfig(ArchitectureConfig):
    """Which model, on which text."""

    _argument_group_name = "model and text"

    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    data: str | None = field(
        default=None,
        metadata={
            "help": "a Hub name, a folder, a file, or a pattern of files with text "
            f"(default: {TEXT}; a recipe file may list several as train_data)"
        },
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "validation text, as --data, or last: the last file of --data, which is then not trained on "
            "(default: last for nanochat's own data, else the first documents, a twentieth or 1000, are held out)"
        },
    )
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    packing: str = field(
        default="crop", metadata={"help": "crop: cut documents that do not fit; keep: put their rest into a later row"}
    )
    bad_rows: str = field(
        default="error",
        metadata={"help": "rows without text: error, or skip, which leaves out and counts up to half of them"},
    )
    streaming: bool | None = field(
        default=None, metadata={"help": "read as a stream, without downloading first (default: the Hub's data, yes)"}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "processes that tokenise and pack; 0: a thread (default: 4 on CUDA, else 0)"}
    )
    depth: int = field(default=12, metadata={"help": "layers; everything else follows from it"})
    scale_lr_to_batch: bool = field(
        default=True,
        metadata={
            "help": "lrs × √(tokens of a step / 2^19), near which the rule was found; "
            "false: as they are, for toy batches"
        },
    )
    target_flops: float | None = field(
        default=None, metadata={"help": "horizon in FLOPs, where --num-steps is not given"}
    )
    target_param_data_ratio: float = field(
        default=10.5, metadata={"help": "horizon in tokens per matrix and head parameter, else"}
    )
    auto_batch: bool = field(
        default=False,
        metadata={
            "help": "tokens of a step by the run's length, where --total-batch-size is not given: "
            "2^19 at depth 12, × (tokens / those of depth 12)^0.383, to a power of two"
        },
    )
    decay_rule: str = field(
        default="depth",
        metadata={
            "help": "how --weight-decay scales, which is that of depth 12 (Muon): depth, × (12/depth)²; data, "
            "× √(tokens of a step / 2^19) × tokens of depth 12 / those of the run; given, not at all"
        },
    )

    def __post_init__(self) -> None:
        check_policy(self.bad_rows)
        if self.decay_rule not in DECAY_RULES:
            raise ValueError(f"--decay-rule {self.decay_rule} is unknown; choose from {', '.join(DECAY_RULES)}")


@dataclass(frozen=True)
class BaseOptim(OptimConfig):
    """Pretraining decays the matrices."""

    weight_decay: float = field(
        default=0.2,
        metadata={"help": "cautious weight decay of the matrices at depth 12, see --decay-rule and --decay-shape"},
    )


@dataclass(frozen=True)
class BaseSchedule(ScheduleConfig):
    """Pretraining lowers its rates over half of the run."""

    warmdown_ratio: float = field(default=0.5, metadata={"help": "last share of the run in which lr falls"})
    decay_shape: str = field(
        default="linear", metadata={"help": f"the matrices' weight decay over the run: {', '.join(DECAY_SHAPES)}"}
    )


@dataclass(frozen=True)
class BaseEval(EvalConfig):
    """Pretraining runs are long: less often, and with samples."""

    eval_every: int = field(default=250, metadata={"help": "steps between evaluations of bpb; 0: only at the end"})
    sample_every: int = field(
        default=2000, metadata={"help": "steps between the seven prompts, also answered at the end; 0: none"}
    )


_OWN = {OptimConfig: BaseOptim, ScheduleConfig: BaseSchedule, EvalConfig: BaseEval}
BASE_PARTS = tuple(_OWN.get(part, part) for part in PARTS)


def model_config(base: BaseConfig, tokenizer: PreTrainedTokenizerFast, positions: int) -> NanochatConfig:
    """The model that follows from --depth, for rows of `positions` tokens."""
    return scaling.model_config(
        base.depth,
        len(tokenizer),
        positions,
        **base.architecture,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def ratio_tokens(base: BaseConfig, tokenizer: PreTrainedTokenizerFast, positions: int) -> tuple[int, float]:
    """Tokens that --target-param-data-ratio asks for, at --depth and at depth 12 with the same flags."""
    own, at_12 = (
        base.target_param_data_ratio
        * scaling.counted_parameters(model_config(replace(base, depth=depth), tokenizer, positions))
        for depth in (base.depth, 12)
    )
    return int(own), at_12


def horizon(base: BaseConfig, config: TrainConfig, model: NanochatConfig, tokens: int) -> int:
    """Steps of the run at `tokens` a step, from sizes alone: ValueError before a weight is made or a document read."""
    skeleton = scaling.skeleton(model)
    counts = scaling.parameter_counts(skeleton)
    return scaling.training_horizon(
        counts["matrix"] + counts["head"],
        scaling.flops_per_token(skeleton, config.run.max_seq_len),
        tokens,
        num_steps=config.run.num_steps,
        target_flops=base.target_flops,
        ratio=base.target_param_data_ratio,
    )


def resolved(
    base: BaseConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[BaseConfig, TrainConfig]:
    """Both with what they leave open decided: streaming, data workers, and the tokens of a step."""
    path = base.data or TEXT
    last = base.validation is None and path in {recipe["data"] for recipe in RECIPES.values()}
    base = replace(base, data=path, validation=LAST if last else base.validation)
    streaming = is_remote(SourceConfig(path=path)) if base.streaming is None else base.streaming
    base = replace(base, streaming=streaming, num_workers=data_workers(base.num_workers))
    if base.auto_batch and config.run.total_batch_size is None and not config.run.smoke_test:
        batch = scaling.auto_batch(*ratio_tokens(base, tokenizer, config.run.max_seq_len))
        config = replace(config, run=replace(config.run, total_batch_size=batch))
    return base, config


def with_decay(
    base: BaseConfig, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, step_tokens: int
) -> TrainConfig:
    """`config` with the weight decay of this depth and batch.

    The rules are Muon's; another optimizer takes the decay as it is given.
    """
    given = config.optim.weight_decay
    if config.optim.matrix_optimizer != "muon" or base.decay_rule == "given":
        return config
    if base.decay_rule == "depth":
        decay = scaling.base_weight_decay(base.depth, given)
    else:
        own, at_12 = ratio_tokens(base, tokenizer, config.run.max_seq_len)
        decay = scaling.decay_by_data(given, step_tokens, own, at_12)
    return replace(config, optim=replace(config.optim, weight_decay=decay))
