"""Fine-tune on conversations.

accelerate launch -m scripts.chat_sft --model DIR --data chats.jsonl --output-dir runs/sft
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from nanochat_hf.config import parse, user_errors
from nanochat_hf.conversation import render_prompt
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint, fetch_model
from nanochat_hf.tasks.base import pair
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.callbacks.tasks import TaskEvalConfig
from nanochat_hf.training.config import PARTS, TrainConfig
from nanochat_hf.training.finetuning import (
    SFTConfig,
    conversation_data,
    horizon,
    load_model,
    sources_of,
    warn_beyond_base,
    with_newest,
)
from nanochat_hf.training.opening import opened
from nanochat_hf.training.run import Hooks, Run, Stage

PROMPTS = ("Why is the sky blue?", "Spell the word: elephant", "How many r are in strawberry?", "What is 12*7?")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, fit."""
    sft, *parts, tasks, hub, lists = parse(
        [SFTConfig, *PARTS, TaskEvalConfig, HubConfig],
        argv,
        lists=("train_data", "validation_data", "eval_data"),
        description=__doc__,
    )
    sft, config = with_newest(sft), TrainConfig(*parts).smoked()
    sources = sources_of(sft, lists, config.run.num_steps)
    start, pusher = fetch_model(sft.model), HubPusher.from_config(hub, idle=not config.run.writes)
    tokenizer, model = load_tokenizer(start), load_model(start, sft.model)
    output = config.run.output_dir if config.run.writes else None
    more = [] if config.run.smoke_test else tasks.callbacks(tokenizer, lists.get("eval_data") or [], output)

    with opened(config, model.config.hidden_size, fetch_checkpoint) as run:
        data = conversation_data(sft, config, run.accelerator, tokenizer, sources)
        warn_beyond_base(config, run.accelerator, model, start)
        stage = Stage(
            "sft",
            horizon(sft, config, data.train, run.accelerator.gradient_accumulation_steps),
            settings=asdict(sft) | asdict(tasks) | sources.settings(),
            prompts=[(text, render_prompt(tokenizer, pair(text, ""))) for text in PROMPTS],
        )
        result = Run(config, run, model, data, stage, Hooks(more, pusher)).fit()
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
