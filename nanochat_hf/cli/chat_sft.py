"""Fine-tune on conversations: accelerate launch -m scripts.chat_sft --model DIR --data chats.jsonl --output-dir runs/sft"""

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.conversation import render_prompt
from nanochat_hf.data.documents import OVERLONG
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.reports import check_policy
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint, fetch_model
from nanochat_hf.machine.accelerator import process_count
from nanochat_hf.tasks.base import pair
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.config import TrainConfig, smoke
from nanochat_hf.training.run import accelerate, data_workers, divided, run

PROMPTS = ("Why is the sky blue?", "Spell the word: elephant", "How many r are in strawberry?", "What is 12*7?")


@dataclass(frozen=True)
class SFTConfig:
    """Which model, on which conversations. A recipe (--config) may list several data sets as train_data and validation_data."""

    model: str = field(
        metadata={
            "help": "folder or Hub name (org/name[@revision]) of the model to start from; newest: the base run under runs/ that ended last"
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

    def __post_init__(self):
        check_policy(self.bad_rows)
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"--epochs {self.epochs} must be above 0; 0.5 is half of the data")


@user_errors
def main(argv=None):
    sft, config, hub, lists = parse(
        [SFTConfig, TrainConfig, HubConfig], argv, lists=("train_data", "validation_data"), description=__doc__
    )
    config = smoke(config)
    disable_progress_bar()  # the run has its own
    if sft.model == "newest":
        sft = replace(sft, model=newest_base())
    train = [SourceConfig.from_recipe(entry) for entry in lists.get("train_data", [])]
    if sft.data:
        train = [SourceConfig(path=sft.data)]
    if not train:
        raise ValueError("no training data; give --data or a recipe with train_data")
    if sft.streaming and not config.num_steps:
        raise ValueError("--streaming has no epoch's end to count steps by; give --num-steps")
    held_out = (
        [SourceConfig(path=sft.validation)]
        if sft.validation
        else [SourceConfig.from_recipe(e) for e in lists.get("validation_data", [])]
    )
    start, pusher = fetch_model(sft.model), HubPusher.from_config(hub, idle=config.dry_run or config.plan_only)
    tokenizer = load_tokenizer(start)
    try:
        model = NanochatForCausalLM.from_pretrained(start)
        model.pad_tables(64)  # matrix kernels like it; what is exported has no padding
    except OSError as error:
        raise ValueError(f"--model {sft.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    processes = process_count()
    accumulation = scaling.accumulation_steps(
        config.total_batch_size, config.device_batch_size, config.max_seq_len, processes
    )
    accelerator = accelerate(config, accumulation, model.config.hidden_size)
    shape = dict(
        rows=config.device_batch_size,
        positions=config.max_seq_len,
        rank=accelerator.process_index,
        world_size=processes,
        isolate=sft.isolate,
        train_on_all_tokens=sft.train_on_all_tokens,
        overlong=sft.overlong,
        bad_rows=sft.bad_rows,
    )
    told = dict(progress=accelerator.is_main_process, num_proc=sft.num_proc)
    if sft.streaming:
        batches = StreamedConversations(
            train, tokenizer, **shape, seed=config.seed, num_workers=data_workers(sft.num_workers)
        )
        data = f"{len(train)} streams, packed window by window"
    else:
        batches = SFTBatches(train, tokenizer, **shape, **told, seed=config.seed, num_workers=sft.num_workers or 0)
        data = (
            f"{len(batches.documents):,} conversations in {batches.num_rows:,} rows, padding {batches.padding_share:.2%}, "
            f"{batches.truncated} truncated, {batches.untrained} without a target left out"
        )
    if batches.bad[0]:
        data += f", {batches.bad[0]:,} bad rows left out (the first: {batches.bad[1]})"
    on = (
        ", ".join(source.label for source in held_out)
        or "the training data itself; --validation names held-out conversations"
    )
    plan = {"data": data, "validation": on, "start": sft.model}
    # whatever is trained on, validation counts the assistant's tokens of conversations that stand alone, so that runs compare
    measured = shape | {"train_on_all_tokens": False, "isolate": True, "rank": 0, "world_size": 1}
    if sft.streaming and not held_out:  # the training data must not be read whole for it
        validation = StreamedConversations(train, tokenizer, **measured, seed=config.seed + 1, prefetch=0).take(
            config.eval_batches
        )
    else:
        validation = SFTBatches(
            held_out or train, tokenizer, **measured, **told, seed=config.seed + 1, prefetch=0
        ).once(config.eval_batches)
    validation = divided(validation, accelerator.process_index, processes)
    warn_beyond_base(config, accelerator, model, start)
    num_steps = config.num_steps or max(1, round(sft.epochs * batches.steps_per_epoch(accumulation)))
    settings = asdict(sft) | {
        "train_data": [asdict(s) for s in train],
        "validation_data": [asdict(s) for s in held_out],
    }
    prompts = [(text, render_prompt(tokenizer, pair(text, ""))) for text in PROMPTS]
    folder, _, _ = run(
        config,
        accelerator,
        model,
        tokenizer,
        batches,
        validation,
        num_steps,
        description="sft",
        settings=settings,
        prompts=prompts,
        plan=plan,
        pusher=pusher,
        fetch=fetch_checkpoint,
        figures=lambda: (
            {"bad rows left out": batches.bad[0], "the first of them": batches.bad[1]} if batches.bad[0] else {}
        ),
    )
    sys.exit(143 if folder is None else 0)


def warn_beyond_base(config, accelerator, model, start):
    """Say where the shape of the batches goes beyond what the base model in folder `start` was made with."""
    base_rows = trained_rows(start)
    if base_rows and config.device_batch_size > base_rows:
        accelerator.print(
            f"warning: --device-batch-size {config.device_batch_size} exceeds the base run's {base_rows}; watch the memory"
        )
    if config.max_seq_len > model.config.max_position_embeddings:
        accelerator.print(
            f"warning: --max-seq-len {config.max_seq_len} exceeds the {model.config.max_position_embeddings} positions the model was made for; "
            f"what it learns beyond them is lost on programs that stop there: --max-seq-len {model.config.max_position_embeddings} is safe"
        )


def trained_rows(model):
    """Rows a process took at once in the run that made the folder `model`; None where that is not known."""
    settings = Path(model).parent / "config.json"
    return json.loads(settings.read_text()).get("device_batch_size") if settings.is_file() else None


def newest_base(root="runs"):
    """The final folder of the base run under `root` that ended last; ValueError where there is none."""
    finals = []
    for final in Path(root).glob("**/final"):
        settings = final.parent / "config.json"
        if settings.is_file() and str(json.loads(settings.read_text()).get("stage", "")).startswith("base"):
            finals.append(final)
    if not finals:
        raise ValueError(f"--model newest: no finished base run under {root}/; give the folder of a model")
    return str(max(finals, key=lambda folder: folder.stat().st_mtime))


if __name__ == "__main__":
    main()
