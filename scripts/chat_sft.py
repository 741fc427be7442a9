"""Fine-tune on conversations: accelerate launch -m scripts.chat_sft --model DIR --data chats.jsonl --output-dir runs/sft"""

import sys
from dataclasses import asdict, dataclass, field

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.data import SFTBatches, SourceConfig
from nanochat_hf.runtime import build_accelerator
from nanochat_hf.tokenizer import load_tokenizer
from scripts.training import TrainConfig, run


@dataclass(frozen=True)
class SFTConfig:
    """Which model, on which conversations. A recipe (--config) may list several data sets as train_data and validation_data."""

    model: str = field(metadata={"help": "folder or Hub name of the model to start from"})
    data: str | None = field(default=None, metadata={"help": "conversations: a Hub name or a file (jsonl, parquet, …)"})
    validation: str | None = field(default=None, metadata={"help": "held-out conversations (default: the training data)"})
    train_on_all_tokens: bool = field(default=False, metadata={"help": "learn the user's tokens too, as the reference does"})
    isolate: bool = field(default=True, metadata={"help": "packed conversations cannot attend to each other"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the data, where --num-steps is not given"})


@user_errors
def main(argv=None):
    sft, config, lists = parse([SFTConfig, TrainConfig], argv, lists=("train_data", "validation_data"), description=__doc__)
    train = [SourceConfig.from_recipe(entry) for entry in lists.get("train_data", [])]
    if sft.data:
        train = [SourceConfig(path=sft.data)]
    if not train:
        raise ValueError("no training data; give --data or a recipe with train_data")
    held_out = (
        [SourceConfig(path=sft.validation)] if sft.validation else [SourceConfig.from_recipe(e) for e in lists.get("validation_data", [])]
    )
    tokenizer = load_tokenizer(sft.model)
    try:
        model = NanochatForCausalLM.from_pretrained(sft.model)
    except OSError as error:
        raise ValueError(f"--model {sft.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    processes = build_accelerator(1, dtype=config.dtype).num_processes
    accumulation = scaling.accumulation_steps(config.total_batch_size, config.device_batch_size, config.max_seq_len, processes)
    accelerator = build_accelerator(
        accumulation,
        dtype=config.dtype,
        trackers=None if config.report_to == "none" else config.report_to,
        output_dir=config.output_dir,
        seed=config.seed,
    )
    shape = dict(
        rows=config.device_batch_size, positions=config.max_seq_len, rank=accelerator.process_index, world_size=processes,
        isolate=sft.isolate, train_on_all_tokens=sft.train_on_all_tokens, progress=accelerator.is_main_process,
    )  # fmt: skip
    batches = SFTBatches(train, tokenizer, **shape, seed=config.seed)
    accelerator.print(
        f"{len(batches.documents):,} conversations in {batches.num_rows:,} rows, padding {batches.padding_share:.2%}, "
        f"{batches.truncated} truncated, {batches.untrained} without a target left out"
    )
    validation_batches = iter(SFTBatches(held_out or train, tokenizer, **shape, seed=config.seed + 1))
    validation = [next(validation_batches) for _ in range(config.eval_batches)]
    num_steps = config.num_steps or max(1, round(sft.epochs * batches.steps_per_epoch(accumulation)))
    settings = asdict(sft) | {"train_data": [asdict(s) for s in train], "validation_data": [asdict(s) for s in held_out]}
    folder, _, _ = run(config, accelerator, model, tokenizer, batches, validation, num_steps, description="sft", settings=settings)
    sys.exit(0 if folder else 143)


if __name__ == "__main__":
    main()
