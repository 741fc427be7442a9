"""Reinforcement learning on a chat model's own answers.

accelerate launch -m scripts.chat_rl --model runs/sft/final --tasks gsm8k --output-dir runs/rl
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from nanochat_hf.config import parse, user_errors
from nanochat_hf.hub.push import HubConfig, HubPusher, fetch_checkpoint, fetch_model
from nanochat_hf.rl.questions import Questions
from nanochat_hf.tokenizer import load_tokenizer
from nanochat_hf.training.callbacks.reinforced import Reinforced
from nanochat_hf.training.config import TrainConfig
from nanochat_hf.training.finetuning import load_model, warn_beyond_base
from nanochat_hf.training.opening import opened
from nanochat_hf.training.reinforcing import RLRun, held_out_tasks, reference_answers, rollouts, sources_of
from nanochat_hf.training.rl_flags import RL_PARTS, ObjectiveConfig, RLConfig, RLTaskEval
from nanochat_hf.training.run import Data, Hooks, Run, Stage


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, build, fit."""
    rl, objective, *parts, tasks, hub, lists = parse(
        [RLConfig, ObjectiveConfig, *RL_PARTS, RLTaskEval, HubConfig],
        argv,
        lists=("train_data", "eval_data"),
        description=__doc__,
    )
    flags = RLRun.of(rl, objective, TrainConfig(*parts).smoked())
    sources = sources_of(flags.rl, lists.get("train_data"))
    run = flags.train.run
    start, pusher = fetch_model(rl.model), HubPusher.from_config(hub, idle=not run.writes)
    tokenizer, model = load_tokenizer(start), load_model(start, rl.model)
    questions = Questions.load(sources, tokenizer, flags.longest_prompt, run.seed)
    flags = flags.for_prompts(questions.longest)
    asked = lists.get("eval_data") or held_out_tasks(sources)
    if run.smoke_test or not (asked or tasks.task_eval):
        tasks = replace(tasks, task_every=0)
    output = run.output_dir if run.writes else None
    more = tasks.callbacks(tokenizer, asked, output)

    with opened(flags.train, model.config.hidden_size, fetch_checkpoint) as open_run:
        accelerator = open_run.accelerator
        batches = rollouts(flags, accelerator, tokenizer, model, questions)
        held_out = reference_answers(flags.train, accelerator, tokenizer, sources)
        data = Data(tokenizer, batches, held_out, flags.lines(questions))
        warn_beyond_base(flags.train, accelerator, model, start)
        stage = Stage("rl", flags.steps(len(questions)), settings=flags.settings(sources) | asdict(tasks))
        measures = Reinforced(batches, flags.train.track.log_every, output)
        hooks = Hooks([measures, *more], pusher, measures, batches.metrics.observe)
        result = Run(flags.train, open_run, model, data, stage, hooks).fit()
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
