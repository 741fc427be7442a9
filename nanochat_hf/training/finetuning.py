"""What fine-tuning adds to a run: its flags, the model it starts from, and packed conversations."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.data.batches import Batches
from nanochat_hf.data.overlong import OVERLONG
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.reports import check_policy
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations

from .callbacks.evaluate import divided
from .config import TrainConfig
from .equipment import data_workers
from .run import Data


@dataclass(frozen=True)
class SFTConfig:
    """Which model, on which conversations.

    A recipe (--config) may list several data sets as train_data and validation_data.
    """

    _argument_group_name = "model and conversations"

    model: str = field(
        metadata={
            "help": "folder or Hub name (org/name[@revision]) of the model to start from; "
            "newest: the base run under runs/ that ended last"
        }
    )
    data: str | None = field(default=None, metadata={"help": "conversations: a Hub name or a file (jsonl, parquet, …)"})
    validation: str | None = field(
        default=None, metadata={"help": "held-out conversations (default: the training data)"}
    )
    train_on_all_tokens: bool = field(
        default=False, metadata={"help": "learn the user's tokens too, as the reference does"}
    )
    isolate: bool = field(default=True, metadata={"help": "packed conversations cannot attend to each other"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the data, where --num-steps is not given"})
    overlong: str = field(
        default="truncate", metadata={"help": f"conversations longer than a row: {', '.join(OVERLONG)}"}
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "rows that are no conversation: error, or skip, which leaves out and counts up to half of them"
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the training data as streams, unplanned; needs --num-steps"}
    )
    num_workers: int | None = field(
        default=None,
        metadata={"help": "processes that make batches; 0: a thread (default: 4 for --streaming on CUDA, else 0)"},
    )
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenise (default: one)"})

    def __post_init__(self) -> None:
        check_policy(self.bad_rows)
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"--epochs {self.epochs} must be above 0; 0.5 is half of the data")


@dataclass(frozen=True)
class Sources:
    """Data sets to train on and to validate with; without the latter validation takes the training data."""

    train: list[SourceConfig]
    validation: list[SourceConfig]

    def settings(self) -> dict[str, Any]:
        """For config.json."""
        return {
            "train_data": [asdict(source) for source in self.train],
            "validation_data": [asdict(source) for source in self.validation],
        }


def sources_of(sft: SFTConfig, lists: dict[str, list], num_steps: int | None) -> Sources:
    """From --data and --validation, else from the recipe's lists.

    ValueError where nothing is named, or a stream has no end to train to.
    """
    train, validation = (
        SourceConfig.from_recipe_list(lists.get(key), key) for key in ("train_data", "validation_data")
    )
    sources = Sources(
        [SourceConfig(path=sft.data)] if sft.data else train,
        [SourceConfig(path=sft.validation)] if sft.validation else validation,
    )
    if not sources.train:
        raise ValueError("no training data; give --data or a recipe with train_data")
    if sft.streaming and not num_steps:
        raise ValueError("--streaming has no epoch's end to count steps by; give --num-steps")
    return sources


class Packing(TypedDict):
    """How conversations become batches, as SFTBatches and StreamedConversations take it."""

    rows: int
    positions: int
    rank: int
    world_size: int
    isolate: bool
    train_on_all_tokens: bool
    overlong: str
    bad_rows: str


class Tokenising(TypedDict):
    """How SFTBatches tokenises: with a progress bar or without, by how many processes."""

    progress: bool
    num_proc: int | None


def conversation_data(
    sft: SFTConfig,
    config: TrainConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerFast,
    sources: Sources,
) -> Data:
    """Packed conversations: planned for whole epochs, or streamed."""
    shape: Packing = {
        "rows": config.run.device_batch_size,
        "positions": config.run.max_seq_len,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "isolate": sft.isolate,
        "train_on_all_tokens": sft.train_on_all_tokens,
        "overlong": sft.overlong,
        "bad_rows": sft.bad_rows,
    }
    told: Tokenising = {"progress": accelerator.is_main_process, "num_proc": sft.num_proc}
    seed = config.run.seed
    if sft.streaming:
        workers = data_workers(sft.num_workers)
        batches: SFTBatches | StreamedConversations = StreamedConversations(
            sources.train, tokenizer, **shape, seed=seed, num_workers=workers
        )
        data = f"{len(sources.train)} streams, packed window by window"
    else:
        workers = sft.num_workers or 0
        batches = SFTBatches(sources.train, tokenizer, **shape, **told, seed=seed, num_workers=workers)
        data = (
            f"{len(batches.documents):,} conversations in {batches.num_rows:,} rows, "
            f"padding {batches.padding_share:.2%}, {batches.truncated} truncated, "
            f"{batches.untrained} without a target left out"
        )
    # so that runs compare, validation always counts the assistant's tokens of conversations that stand alone
    alone: Packing = {**shape, "train_on_all_tokens": False, "isolate": True, "rank": 0, "world_size": 1}
    count = config.evaluate.eval_batches
    if sft.streaming and not sources.validation:  # the training data must not be read whole for it
        measured: SFTBatches | StreamedConversations = StreamedConversations(
            sources.train, tokenizer, **alone, seed=seed + 1, prefetch=0
        )
        held_out = measured.take(count)
    else:
        chosen = sources.validation or sources.train
        measured = SFTBatches(chosen, tokenizer, **alone, **told, seed=seed + 1, prefetch=0)
        held_out = measured.once(count)
    on = ", ".join(source.label for source in sources.validation)
    lines = {
        "data": data,
        "validation": on or "the training data itself; --validation names held-out conversations",
        "start": sft.model,
    }
    if batches.report.left_out:
        lines["left out"] = batches.report.left_out
    if sources.validation and measured.report.left_out:
        lines["left out of validation"] = measured.report.left_out
    if isinstance(batches, SFTBatches):
        accumulation = accelerator.gradient_accumulation_steps
        steps = horizon(sft, config, batches, accumulation)
        lines["passes"] = f"{batches.passes(steps, accumulation):.2f} over the data in {steps:,} steps"
    own = divided(held_out, accelerator.process_index, accelerator.num_processes)
    return Data(tokenizer, batches, own, lines)


def horizon(sft: SFTConfig, config: TrainConfig, batches: Batches, accumulation: int) -> int:
    """Steps of the run: --num-steps, else --epochs over the planned rows."""
    if config.run.num_steps:
        return config.run.num_steps
    assert isinstance(batches, SFTBatches)  # `sources_of` refuses a stream without --num-steps
    return batches.steps(sft.epochs, accumulation)


def with_newest(sft: SFTConfig) -> SFTConfig:
    """`sft` with --model newest as the folder that it means."""
    return replace(sft, model=newest_base()) if sft.model == "newest" else sft


def newest_base(root: str = "runs") -> str:
    """The final folder of the base run under `root` that ended last; ValueError where there is none."""
    finals = []
    for final in Path(root).glob("**/final"):
        settings = final.parent / "config.json"
        if settings.is_file() and str(json.loads(settings.read_text()).get("stage", "")).startswith("base"):
            finals.append(final)
    if not finals:
        raise ValueError(f"--model newest: no finished base run under {root}/; give the folder of a model")
    return str(max(finals, key=lambda folder: folder.stat().st_mtime))


def load_model(start: str, name: str) -> NanochatForCausalLM:
    """The model in the folder `start`, which --model `name` led to; ValueError where it cannot be loaded."""
    disable_progress_bar()  # the run has its own
    try:
        model = NanochatForCausalLM.from_pretrained(start)
        model.pad_tables(64)  # matrix kernels like it; what is exported has no padding
        return model
    except OSError as error:
        raise ValueError(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})") from None


def warn_beyond_base(config: TrainConfig, accelerator: Accelerator, model: NanochatForCausalLM, start: str) -> None:
    """Say where the shape of the batches goes beyond what the base model in folder `start` was made with."""
    rows, positions, base_rows = config.run.device_batch_size, config.run.max_seq_len, trained_rows(start)
    if base_rows and rows > base_rows:
        accelerator.print(f"warning: --device-batch-size {rows} exceeds the base run's {base_rows}; watch the memory")
    most = model.config.max_position_embeddings
    if positions > most:
        accelerator.print(
            f"warning: --max-seq-len {positions} exceeds the {most} positions the model was made for; "
            f"what it learns beyond them is lost on programs that stop there: --max-seq-len {most} is safe"
        )


def trained_rows(model: str) -> int | None:
    """Rows a process took at once in the run that made the folder `model`; None where that is not known."""
    settings = Path(model).parent / "config.json"
    return json.loads(settings.read_text()).get("device_batch_size") if settings.is_file() else None
