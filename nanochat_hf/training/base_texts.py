"""The text of a base run: which documents train, which are held out, and both in full rows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from nanochat_hf.data.loading import count_rows, is_remote, load_source
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.recipes import RECIPES

from .callbacks.evaluate import divided
from .config import TrainConfig
from .equipment import step_tokens
from .pretraining import LAST, BaseConfig
from .run import Data

HELD_OUT = 1000  # documents, where no validation data is named
LISTS = ("train_data", "validation_data")


@dataclass(frozen=True)
class TextSources:
    """Text to train on and text to validate with; several give documents in proportion to their weight."""

    train: list[SourceConfig]
    validation: list[SourceConfig]

    def settings(self) -> dict[str, Any]:
        """For config.json, under the names of a recipe's lists."""
        return {key: [asdict(source) for source in getattr(self, key.removesuffix("_data"))] for key in LISTS}


def text_sources(base: BaseConfig, lists: Mapping[str, Any]) -> tuple[BaseConfig, TextSources | None]:
    """The data sets that a recipe lists, {} for none: `base` reads them as a stream where one lies on the Hub.

    --data wins over the list. Without validation_data each source's own documents are held out, as of --data.
    """
    train, validation = (SourceConfig.from_recipe_list(lists.get(key), key) for key in LISTS)
    if base.data is not None and base.data != RECIPES.get(base.recipe or "", {}).get("data"):
        train = []
    if not train:
        if validation:
            raise ValueError("validation_data needs train_data; give both, or --validation")
        return base, None
    if base.streaming is None:
        base = replace(base, streaming=any(map(is_remote, train)))
    if base.validation and base.validation != LAST:
        validation = [SourceConfig(path=base.validation)]
    if validation:
        return base, TextSources(train, validation)
    pairs = [hold_out(source, bool(base.streaming), base.validation == LAST) for source in train]
    return base, TextSources([own for own, _ in pairs], [held for _, held in pairs])


def hold_out(source: SourceConfig, streaming: bool, last: bool = False) -> tuple[SourceConfig, SourceConfig]:
    """The parts of a source for training and for validation: its first documents, a twentieth or `HELD_OUT`.

    `last`: validation takes the last file instead, and training all others.
    """
    if last:
        return replace(source, files=":-1"), replace(source, files="-1:")
    if streaming:  # a long stream is not counted to its end
        rows = count_rows(source, 2 * HELD_OUT)
        rows = 20 * HELD_OUT if rows >= 2 * HELD_OUT else rows
    else:
        rows = len(load_source(source))
    count = max(1, min(HELD_OUT, rows // 20))
    if count >= rows:
        raise ValueError(f"{source.label}: of {rows} documents none can be held out; give --validation")
    return replace(source, start=source.start + count, rows=source.rows and source.rows - count), replace(
        source, rows=count
    )


def one_source(base: BaseConfig) -> TextSources:
    """What --data and --validation name."""
    source = SourceConfig(path=base.data, split=base.split)
    if base.validation and base.validation != LAST:
        return TextSources([source], [replace(source, path=base.validation)])
    train, held_out = hold_out(source, bool(base.streaming), base.validation == LAST)
    return TextSources([train], [held_out])


class Packing(TypedDict):
    """How text becomes rows, in training and in validation, as TextBatches takes it."""

    rows: int
    positions: int
    text_column: str
    bad_rows: str


def text_data(
    base: BaseConfig,
    config: TrainConfig,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerFast,
    sources: TextSources | None = None,
) -> Data:
    """Full rows of text to train on, and held-out ones; `base` and `config` as `resolved` returns them.

    `sources`: those of a recipe's list, in the place of --data and --validation.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    sources = sources or one_source(base)
    shape: Packing = {
        "rows": config.run.device_batch_size,
        "positions": config.run.max_seq_len,
        "text_column": base.text_column,
        "bad_rows": base.bad_rows,
    }
    batches = TextBatches(
        sources.train,
        tokenizer,
        **shape,
        rank=rank,
        world_size=processes,
        seed=config.run.seed,
        mode=base.packing,
        streaming=bool(base.streaming),
        num_workers=base.num_workers or 0,
    )
    cropped = batches.outlook(step_tokens(config, accelerator))
    lost = f"{cropped:.0%} of a step's tokens cropped away (--packing keep loses none)"
    # every process packs the same held-out documents and takes its rows, so that each document counts once
    own = {(source.path, source.task) for source in sources.train}
    streaming = bool(base.streaming) and all((source.path, source.task) in own for source in sources.validation)
    measured = TextBatches(sources.validation, tokenizer, **shape, streaming=streaming)
    validation = measured.once(config.evaluate.eval_batches * processes)
    shares = sum(source.copies for source in sources.train)
    named = [f"{source.label} {source.copies / shares:.0%}" for source in sources.train]
    told = sources.train[0].label if len(named) == 1 else ", ".join(named)
    told += f", packing {base.packing}: {lost if base.packing == 'crop' else 'no token lost'}"
    lines = {"data": told} | ({"left out": batches.report.left_out} if batches.report.left_out else {})
    if measured.once_report.total("bad"):
        lines["left out of validation"] = measured.once_report.left_out
    return Data(tokenizer, batches, divided(validation, rank, processes), lines)
