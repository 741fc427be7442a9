"""A training run, once it is open: config, model, data and hooks → Run(…).fit() → RunResult."""

import enum
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from nanochat_hf.data.batches import Batches
from nanochat_hf.errors import say_error
from nanochat_hf.machine.accelerator import chose_float8
from nanochat_hf.machine.durable import write_whole
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.scaling import flops_per_token
from nanochat_hf.tokenizer import token_bytes

from . import checkpoint
from .callbacks.average import Average
from .callbacks.base import Callback, Measurement
from .callbacks.evaluate import Evaluate
from .callbacks.garbage import CollectGarbage
from .callbacks.log import Log, Measures
from .callbacks.push import Pusher, attach
from .callbacks.sample import Sample
from .callbacks.save import Save
from .config import TrainConfig
from .equipment import equip
from .exporting import export_model
from .integrity import Diverged
from .opening import Opened
from .plan import announce, lines_of, warn_of_memory
from .report import write_report
from .resuming import changed_settings, in_force, restore
from .schedules import Schedule
from .stopping import StopSignal
from .together import on_main
from .trackers import describe
from .tracking import environment
from .trainer import Trainer

STOPPED = 143  # as of a process that SIGTERM ended


class RunStatus(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal; a checkpoint was written
    PLANNED = "planned"  # --plan-only: nothing was trained
    DIVERGED = "diverged"  # weights are not finite: nothing was exported


@dataclass(frozen=True)
class RunResult:
    """What came of a run. `folder` holds the final model where the run finished and writes one.

    `bpb` is the validation's minimum.
    """

    status: RunStatus
    folder: Path | None = None
    step: int = 0
    bpb: float = math.nan

    @property
    def exit_code(self) -> int:
        """What the program leaves with."""
        return {RunStatus.STOPPED: STOPPED, RunStatus.DIVERGED: 1}.get(self.status, 0)


@dataclass(frozen=True)
class Stage:
    """What a command adds to the shared flags.

    `settings` are its own flags, for config.json; `lr_scale` multiplies every learning rate; `prompts` are (text shown,
    ids) that --sample-every answers; `lines` are the plan's, beside those of every run.
    """

    name: str
    num_steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    lr_scale: float = 1.0
    prompts: Sequence[tuple[str, list[int]]] = ()
    lines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured on.

    `train` is endless batches with a state, `lines` what the plan says of them.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Batches
    validation: Sequence[dict[str, torch.Tensor]]
    lines: Mapping[str, str] = field(default_factory=dict)

    def left_out(self) -> dict[str, Any]:
        """What the report says of rows that could not be used, as far as they have been read."""
        report = self.train.report
        count = report.total("bad")
        return {"bad rows left out": count, "the first of them": report.first_bad} if count else {}


@dataclass(frozen=True)
class Hooks:
    """What else happens: more callbacks, a pusher of what is saved, more numbers, and who looks at batches.

    `observe`: called with each micro-batch and the model's output, see Trainer.
    """

    callbacks: Sequence[Callable] = ()
    pusher: Pusher | None = None
    measures: Measures | None = None
    observe: Callable[..., object] | None = None


class Run:
    """One training run. ValueError, before anything is trained, where model, data and flags do not fit together."""

    def __init__(
        self,
        config: TrainConfig,
        opened: Opened,
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
        self.config, self.model, self.data = config, model, data
        self.accelerator, self.resumed = opened.accelerator, opened.checkpoint
        self.stage, self.hooks = stage, hooks or Hooks()
        self.schedule = Schedule(stage.num_steps, config.schedule)
        self.output = config.run.output_dir if config.run.writes else None
        self.average: Average | None = None

    def fit(self) -> RunResult:
        """Print the plan, train (from the checkpoint that --resume names), evaluate, save and report."""
        config, accelerator, stage = self.config, self.accelerator, self.stage
        equipment = equip(config, accelerator, self.model, stage.num_steps)
        lines = lines_of(config, accelerator, self.model, equipment, stage.num_steps)
        announce(stage.name, dict(stage.lines) | lines | dict(self.data.lines), accelerator)
        warn_of_memory(config, accelerator, self.model)
        if config.run.plan_only:
            return RunResult(RunStatus.PLANNED)
        stop = StopSignal(accelerator)
        trainer = self._trainer(stop)
        try:
            if self.resumed:
                restore(trainer, self.data.tokenizer, self.resumed)
            settings = self._settings(equipment.compiled)
            describe(accelerator, settings)
            log, evaluate = self._attach(trainer, settings)
            push = attach(trainer, self.hooks.pusher if self.output else None, self.output)
            self._measure_first(trainer)
            trainer.fit()
            result = self._finish(trainer, evaluate, log, settings)
        except Diverged as error:
            return self._diverged(trainer, error)
        finally:
            stop.release()
        push.finish(result.folder, step=result.step)
        return result

    def _trainer(self, stop) -> Trainer:
        optim = self.config.optim
        return Trainer(
            self.accelerator,
            self.model,
            MuonAdamW(build_param_groups(self.model, optim.optimizer(self.stage.lr_scale))),
            self.data.train,
            num_steps=self.stage.num_steps,
            schedule=self.schedule,
            max_grad_norm=optim.max_grad_norm,
            stop=stop,
            norms_every=self.config.track.log_every,
            observe=self.hooks.observe,
        )

    def _settings(self, compiled) -> dict[str, Any]:
        # everything that is in force, for config.json, trackers, checkpoints and the report
        accelerator, stage = self.accelerator, self.stage
        settings = self.config.settings() | dict(stage.settings)
        settings |= {"num_steps": stage.num_steps, "stage": stage.name, "compiled": compiled}
        settings |= environment(accelerator)
        if accelerator.device.type == "cpu":
            settings["cpu_threads"] = torch.get_num_threads()
        if chose_float8(self.config.compute.dtype):
            settings["mixed_precision"] += " with float8 products"
        if self.resumed:
            saved = checkpoint.settings_of(self.resumed)
            accelerator.print(*(f"{line}\n" for line in changed_settings(saved, settings)), sep="", end="")
            settings = in_force(saved, settings)
        if self.output:
            written = json.dumps(settings, indent=2, default=str) + "\n"
            on_main(accelerator, lambda: write_whole(f"{self.output}/config.json", written))
        return settings

    def _attach(self, trainer, settings) -> tuple[Log, Evaluate]:
        # the callbacks, in the order in which they are called, as they were in the checkpoint
        config, tokenizer, output = self.config, self.data.tokenizer, self.output
        flops = flops_per_token(self.model, config.run.max_seq_len)
        log = Log(
            trainer,
            self.stage.name,
            flops,
            config.track.log_every,
            output,
            max_skipped=config.optim.max_skipped,
            measures=self.hooks.measures,
        )
        evaluate = Evaluate(config.evaluate, self.data.validation, token_bytes(tokenizer), tokenizer, output)
        # saved before anything that could fail: evaluation and samples come after
        averaging = config.evaluate.ema
        self.average = Average(averaging, config.evaluate.ema_share, trainer.num_steps) if averaging else None
        callbacks: list[Callable] = [log, *([self.average] if self.average else [])]
        if output:
            callbacks.append(Save(config.save, output, tokenizer, settings))
        callbacks.append(evaluate)
        if self.stage.prompts and config.evaluate.sample_every:
            callbacks.append(Sample(tokenizer, self.stage.prompts, config.evaluate.sample_every, output))
        trainer.callbacks = [*callbacks, *self.hooks.callbacks, CollectGarbage()]
        for callback in trainer.callbacks:
            if self.resumed and isinstance(callback, Callback) and callback.name in trainer.restored:
                checkpoint.resume_callback(callback, trainer, self.resumed)
        return log, evaluate

    def _measure_first(self, trainer) -> None:
        # before training; or, after a resume, what was due at the checkpoint's step, which was saved before it was
        # measured
        for callback in trainer.callbacks:
            if not isinstance(callback, Measurement):
                continue
            if callback.due(trainer, trainer.state.step) if self.resumed else callback.at_start:
                callback.measure(trainer)

    def _finish(self, trainer, evaluate, log, settings) -> RunResult:
        # export, report, say goodbye
        accelerator, state = trainer.accelerator, trainer.state
        if trainer.stopped and state.step < trainer.num_steps:
            accelerator.print(f"stopped at step {state.step}; continue with --resume auto")
            accelerator.end_training()
            return RunResult(RunStatus.STOPPED, step=state.step, bpb=evaluate.minimum)
        averaged, better = self._averaged(trainer, evaluate)
        figures, folder, where = self._figures(trainer, evaluate, log), None, "nothing written (dry run)"
        figures |= averaged
        if self.output:
            output = Path(self.output)
            folder, title = output / "final", f"{output.name}: {self.stage.name}"
            with better:
                export_model(trainer, self.data.tokenizer, folder)
            on_main(accelerator, lambda: write_report(output, title, settings, figures))
            where = f"model in {folder}, report in {output}/report.md"
        accelerator.print(f"minimum validation bpb {evaluate.minimum:.4f}; {state.seconds:.0f} s of training; {where}")
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return RunResult(RunStatus.FINISHED, folder, state.step, evaluate.minimum)

    def _averaged(self, trainer, evaluate) -> tuple[dict[str, float], AbstractContextManager[None]]:
        # the averaged weights' figure, and a context that puts them in the model's place if they are better
        if self.average is None or not self.average.average:
            return {}, nullcontext()
        with self.average.in_place(trainer):
            bpb = evaluate.bpb(trainer)
        trainer.accelerator.log({"val/ema_bpb": bpb}, step=trainer.state.step)
        better = bpb < evaluate.last
        trainer.accelerator.print(
            f"averaged weights {bpb:.4f} bpb, the last ones {evaluate.last:.4f}: the "
            f"{'averaged' if better else 'last'} are exported"
        )
        figures = {"validation bpb of the averaged weights": bpb}
        return figures, self.average.in_place(trainer) if better else nullcontext()

    def _diverged(self, trainer, error) -> RunResult:
        # every process learned it at the same point
        if self.hooks.pusher:
            self.hooks.pusher.finish()
        self.accelerator.end_training()
        say_error(f"error: {error}")
        return RunResult(RunStatus.DIVERGED, step=trainer.state.step)

    def _figures(self, trainer, evaluate, log) -> dict[str, Any]:
        # the table of results in report.md
        state = trainer.state
        return {
            "steps": state.step,
            "tokens": state.tokens,
            "seconds of training": state.seconds,
            "minimum validation bpb": evaluate.minimum,
            "last validation bpb": evaluate.last,
            "validation bpb before": evaluate.first,
            "steps without targets": state.skipped,
            "steps with non-finite gradients": trainer.optimizer.optimizer.skipped_steps + state.overflowed,
            **log.figures,
            **(self.hooks.measures.figures() if self.hooks.measures else {}),
            **self.data.left_out(),
        }
