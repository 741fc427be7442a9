"""Pretrain a base model.

accelerate launch -m scripts.base_train --depth 12 --tokenizer DIR --data 'text/*.parquet' --output-dir runs/base
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint
from nanochat_hf.recipes import RECIPES
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.architecture import recipe_line
from nanochat_hf.training.base_texts import LISTS, text_data, text_sources
from nanochat_hf.training.callbacks.core import CoreConfig
from nanochat_hf.training.config import TrainConfig
from nanochat_hf.training.equipment import step_tokens
from nanochat_hf.training.opening import opened
from nanochat_hf.training.pretraining import (
    BASE_PARTS,
    BaseConfig,
    horizon,
    model_config,
    resolved,
    with_decay,
)
from nanochat_hf.training.run import Hooks, Run, Stage

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, fit."""
    base, *parts, core, hub, lists = parse(
        [BaseConfig, *BASE_PARTS, CoreConfig, HubConfig], argv, lists=LISTS, description=__doc__, presets=RECIPES
    )
    config, recipe = TrainConfig(*parts).smoked(), recipe_line(base.recipe, base, *parts)
    pusher = HubPusher.from_config(hub, idle=not config.run.writes)
    tokenizer = load_tokenizer(base.tokenizer)
    base, sources = text_sources(base, lists)
    base, config = resolved(base, config, tokenizer)
    output = config.run.output_dir if config.run.writes else None
    more = [] if config.run.smoke_test else core.callbacks(tokenizer, output)

    sizes = model_config(base, tokenizer, config.run.max_seq_len)
    with opened(config, sizes.hidden_size, fetch_checkpoint) as run:
        tokens = step_tokens(config, run.accelerator)
        num_steps, config = horizon(base, config, sizes, tokens), with_decay(base, config, tokenizer, tokens)
        data = text_data(base, config, run.accelerator, tokenizer, sources)
        stage = Stage(
            f"base d{base.depth}",
            num_steps,
            settings=asdict(base) | asdict(core) | (sources.settings() if sources else {}),
            lr_scale=scaling.batch_lr_scale(tokens) if base.scale_lr_to_batch else 1.0,
            lines=recipe,
            prompts=[
                (text, [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]) for text in PROMPTS
            ],
        )
        hooks = Hooks(more, pusher)
        result = Run(config, run, NanochatForCausalLM(sizes), data, stage, hooks).fit()
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
