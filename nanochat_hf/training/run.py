"""A training run: config, model, data and hooks → Run(…).fit() → RunResult."""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from nanochat_hf.config import dump
from nanochat_hf.interop.folder import export
from nanochat_hf.machine.accelerator import chose_float8
from nanochat_hf.machine.weights import whole_weights
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.scaling import flops_per_token
from nanochat_hf.tokenizer import token_bytes

from . import checkpoint
from .callbacks.evaluate import Evaluate
from .callbacks.garbage import CollectGarbage
from .callbacks.log import Log
from .callbacks.push import attach
from .callbacks.sample import Sample
from .callbacks.save import Save
from .config import TrainConfig
from .equipment import equip
from .plan import announce, lines_of, warn_of_memory
from .report import write_report
from .resuming import changed_settings, restore
from .schedules import Schedule
from .stopping import StopSignal
from .tracking import environment, read_metrics
from .trainer import Trainer

STOPPED = 143  # as of a process that SIGTERM ended


class RunStatus(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal; a checkpoint was written
    PLANNED = "planned"  # --plan-only: nothing was trained


@dataclass(frozen=True)
class RunResult:
    """What came of a run. `folder` holds the final model where the run finished and writes one; `bpb` is the validation's minimum."""

    status: RunStatus
    folder: Path | None = None
    step: int = 0
    bpb: float = math.nan

    @property
    def exit_code(self) -> int:
        """What the program leaves with."""
        return STOPPED if self.status is RunStatus.STOPPED else 0


@dataclass(frozen=True)
class Stage:
    """What a command adds to the shared flags.

    `settings` are its own flags, for config.json; `lr_scale` multiplies every learning rate; `decay_falls`: the weight decay falls to 0;
    `prompts` are (text shown, ids) that --sample-every answers.
    """

    name: str
    num_steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_scale: float = 1.0
    decay_falls: bool = False
    prompts: Sequence[tuple[str, list[int]]] = ()


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on. `train` is endless batches with a state, `lines` what the plan says of them."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Sequence[dict[str, torch.Tensor]]
    lines: Mapping[str, str] = field(default_factory=dict)

    def left_out(self) -> dict[str, Any]:
        """What the report says of rows that could not be used, as far as they have been read."""
        count, first = getattr(self.train, "bad", (0, ""))
        return {"bad rows left out": count, "the first of them": first} if count else {}


@dataclass(frozen=True)
class Hooks:
    """What else happens: more callbacks, a pusher of what is saved, and how --resume finds a checkpoint that is not on this disk."""

    callbacks: Sequence[Callable] = ()
    pusher: Any = None
    fetch: Callable[[str | None], str | None] = lambda name: name


class Run:
    """One training run. ValueError, before anything is trained, where model, data and flags do not fit together."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: NanochatForCausalLM,
        data: Data,
        stage: Stage,
        hooks: Hooks | None = None,
    ):
        if len(data.tokenizer) != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(data.tokenizer)} tokens, the model {model.config.vocab_size}; "
                "use the tokenizer it was made with"
            )
        self.config, self.accelerator, self.model, self.data = config, accelerator, model, data
        self.stage, self.hooks = stage, hooks or Hooks()
        self.schedule = Schedule(stage.num_steps, config.schedule, stage.decay_falls)
        self.output = config.run.output_dir if config.run.writes else None

    def fit(self) -> RunResult:
        """Print the plan, train (from the checkpoint that --resume names), evaluate, save and report."""
        config, accelerator, stage = self.config, self.accelerator, self.stage
        equipment = equip(config, accelerator, self.model, stage.num_steps)
        lines = lines_of(config, accelerator, self.model, equipment, stage.num_steps)
        announce(stage.name, lines | dict(self.data.lines), accelerator)
        warn_of_memory(config, accelerator, self.model)
        if config.run.plan_only:
            return RunResult(RunStatus.PLANNED)
        trainer = self._trainer()
        resumed = restore(config.run, trainer, self.data.tokenizer, self.output, self.hooks.fetch)
        settings = self._settings(equipment.compiled, resumed)
        self._track(settings, resumed)
        log, evaluate = self._attach(trainer, settings, resumed)
        push = attach(trainer, self.hooks.pusher if self.output else None, self.output)
        try:
            if config.evaluate.eval_every and not resumed:
                evaluate.run(trainer)
            trainer.fit()
            result = self._finish(trainer, evaluate, log, settings)
        finally:
            trainer.stop.release()
        push.finish(result.folder, step=result.step)
        return result

    def _trainer(self) -> Trainer:
        optim = self.config.optim
        return Trainer(
            self.accelerator,
            self.model,
            MuonAdamW(build_param_groups(self.model, optim.optimizer(self.stage.lr_scale))),
            self.data.train,
            num_steps=self.stage.num_steps,
            schedule=self.schedule,
            max_grad_norm=optim.max_grad_norm,
            stop=StopSignal(self.accelerator),
            norms_every=self.config.track.log_every,
        )

    def _settings(self, compiled, resumed) -> dict[str, Any]:
        # everything that was chosen, for config.json, trackers, checkpoints and the report
        accelerator, stage = self.accelerator, self.stage
        settings = self.config.settings() | dict(stage.settings)
        settings |= {"num_steps": stage.num_steps, "stage": stage.name, "compiled": compiled}
        if resumed:
            accelerator.print(*changed_settings(checkpoint.settings_of(resumed), settings), sep="", end="")
        settings |= environment(accelerator)
        if accelerator.device.type == "cpu":
            settings["cpu_threads"] = torch.get_num_threads()
        if chose_float8(self.config.compute.dtype):
            settings["mixed_precision"] += " with float8 products"
        if accelerator.is_main_process and self.output:
            dump(f"{self.output}/config.json", settings)
        return settings

    def _track(self, settings, resumed) -> None:
        if self.config.track.report_to == "none":
            return
        run_id = checkpoint.trackers_of(resumed).get("wandb")
        same_run = {"wandb": {"id": run_id, "resume": "allow"}} if run_id else {}
        self.accelerator.init_trackers(self.config.track.run_name, config=flat(settings), init_kwargs=same_run)

    def _attach(self, trainer, settings, resumed) -> tuple[Log, Evaluate]:
        # the callbacks, in the order in which they are called
        config, tokenizer, output = self.config, self.data.tokenizer, self.output
        flops = flops_per_token(self.model, config.run.max_seq_len)
        log = Log(trainer, self.stage.name, flops, config.track.log_every, output, config.optim.max_skipped)
        evaluate = Evaluate(config.evaluate, self.data.validation, token_bytes(tokenizer), tokenizer, output)
        if resumed and output and Path(output, "metrics.jsonl").is_file() and self.accelerator.is_main_process:
            evaluate.remember(read_metrics(f"{output}/metrics.jsonl"))
        # saved before anything that could fail: evaluation and samples come after
        trainer.callbacks = [log, *([Save(config.save, output, tokenizer, settings)] if output else []), evaluate]
        if self.stage.prompts and config.evaluate.sample_every:
            samples = Sample(tokenizer, self.stage.prompts, every=config.evaluate.sample_every, output_dir=output)
            trainer.callbacks.append(samples)
        trainer.callbacks += [*self.hooks.callbacks, CollectGarbage()]
        return log, evaluate

    def _finish(self, trainer, evaluate, log, settings) -> RunResult:
        # export, report, say goodbye
        accelerator, state = trainer.accelerator, trainer.state
        if trainer.stopped and state.step < trainer.num_steps:
            accelerator.print(f"stopped at step {state.step}; continue with --resume auto")
            accelerator.end_training()
            return RunResult(RunStatus.STOPPED, step=state.step, bpb=evaluate.best)
        if math.isnan(evaluate.last):  # the run was already finished when resumed
            evaluate.run(trainer)
        folder = Path(self.output, "final") if self.output else None
        weights = whole_weights(trainer.raw_model)
        if accelerator.is_main_process and folder:
            export(trainer.raw_model, self.data.tokenizer, folder, weights)
            title = f"{Path(self.output).name}: {self.stage.name}"
            write_report(self.output, title, settings, self._figures(trainer, evaluate, log))
        where = f"model in {folder}, report in {self.output}/report.md" if folder else "nothing written (dry run)"
        accelerator.print(f"minimum validation bpb {evaluate.best:.4f}; {state.seconds:.0f} s of training; {where}")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return RunResult(RunStatus.FINISHED, folder, state.step, evaluate.best)

    def _figures(self, trainer, evaluate, log) -> dict[str, Any]:
        # the table of results in report.md
        state = trainer.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds of training": state.seconds,
            "minimum validation bpb": evaluate.best,
            "last validation bpb": evaluate.last,
            "validation bpb before": evaluate.first,
            "steps without targets": state.skipped,
            "steps with non-finite gradients": trainer.optimizer.optimizer.skipped_steps + state.overflowed,
            **log.figures,
            **self.data.left_out(),
        }


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers, booleans and text as they are, the rest as text."""
    plain = int | float | str | bool
    return {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
