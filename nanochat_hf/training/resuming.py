"""Going on from a checkpoint: which one, and what the run does otherwise than the one that wrote it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from nanochat_hf.tokenizer import load_tokenizer

from . import checkpoint
from .tracking import say

if TYPE_CHECKING:
    from .trainer import Trainer

# Settings that may differ after a resume without a word.
FREE = {
    "output_dir",
    "resume",
    "report_to",
    "run_name",
    "keep",
    "keep_best",
    "save_every",
    "save_minutes",
    "eval_every",
    "log_every",
    "sample_every",
    "dry_run",
    "num_proc",
    "model",
    "compile",
    "dtype",  # mixed_precision says what came of it
    "git_revision",
    "device_name",
}
# Settings whose values the optimizer's saved state carries, so that the flag has no say any more.
IN_OPTIMIZER = {
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "value_embeds_lr",
    "smear_lr",
    "scalar_eps",
    "weight_decay",
    "decay_rule",
    "unembedding_decay",
    "embedding_decay",
    "value_embeds_decay",
    "resid_decay",
    "unembedding_beta2",
    "embedding_beta2",
    "muon_beta2",
    "muon_margin",
    "muon_eq",
    "muon_plus",
    "init_lr_frac",
    "scale_lr_to_batch",
}


def restore(trainer: "Trainer", tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Bring the trainer to the checkpoint in `folder`.

    ValueError where it cannot be used, or the run cannot go on from it.
    """
    same_tokenizer(tokenizer, folder)
    same_optimizer(trainer, checkpoint.settings_of(folder))
    checkpoint.load(trainer, folder)
    if trainer.state.step > trainer.num_steps:
        raise ValueError(
            f"--num-steps {trainer.num_steps} is below the {trainer.state.step} steps of {folder}; "
            "give at least as many, or an older checkpoint"
        )
    trainer.accelerator.print(f"resumed from {folder} at step {trainer.state.step} of {trainer.num_steps}")


def choose(accelerator: Accelerator, output_dir: str, resume: str | None, set_aside: bool = False) -> Path | None:
    """The checkpoint that `resume` means, one for all processes, whose files are whole: None → None, a folder → itself.

    "auto" is the newest whole one of `output_dir`, None where there is none. Damaged ones are told, and with
    `set_aside` they are renamed, so that they neither count for pruning nor are taken another time. ValueError where
    all are damaged, or the folder is no whole checkpoint.
    """
    answer: list[str | None] = [None, None]  # text, since the broadcast of XLA takes no other objects
    if accelerator.is_main_process:  # reads every byte, so one process does it for all
        try:
            chosen = _newest_whole(accelerator, output_dir, set_aside) if resume == "auto" else _named(resume)
            answer[0] = None if chosen is None else str(chosen)
        except ValueError as error:
            answer[1] = str(error)
    folder, said = broadcast_object_list(answer)
    if said:
        raise ValueError(said)
    if resume and not folder:
        accelerator.print(f"no checkpoint in {output_dir} to resume from: the run starts anew")
    return None if folder is None else Path(folder)


def _named(resume):
    if resume is None:
        return None
    if not (Path(resume) / "trainer.json").is_file():
        raise ValueError(
            f"--resume {resume}: no trainer.json there, so no whole checkpoint; give a checkpoint-NNNNNN folder or auto"
        )
    wrong = checkpoint.whole(Path(resume))
    if wrong:
        raise ValueError(f"--resume {resume}: damaged or not ours ({wrong}); give another checkpoint, or auto")
    return Path(resume)


def _newest_whole(accelerator, output_dir, set_aside):
    damaged = []
    for folder in reversed(checkpoint.checkpoints(output_dir)):
        wrong = checkpoint.whole(folder)
        if wrong is None:
            return folder
        damaged.append(folder.name)
        aside = folder.with_name(f"{folder.name}.damaged")
        if set_aside:
            os.rename(folder, _free(aside))
        moved = f"; it is now {aside.name}" if set_aside else ""
        say(accelerator, f"warning: {folder} is damaged ({wrong}): going on from the one before it{moved}")
    if damaged:
        raise ValueError(
            f"--resume auto: no checkpoint in {output_dir} is whole ({', '.join(damaged)}); start anew without --resume"
        )
    return None


def _free(path):
    # a name that nothing has yet: path, path-2, …
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def refuse_others(output_dir: str, resumed: Path | None) -> None:
    """ValueError where `output_dir` holds checkpoints that the run does not go on from.

    `resumed`: the one from which it does, or None.

    Pruning by steps would keep them in place of the run's own, and --resume auto would take them.
    """
    last = checkpoint.newest(output_dir)
    if not last or (resumed and last.resolve() == resumed.resolve()):
        return
    at = "goes on from another" if resumed else "starts anew"
    raise ValueError(
        f"--output-dir {output_dir}: holds {last.name}, and this run {at}; "
        "continue that one with --resume auto, or give another --output-dir, or move the checkpoints there away"
    )


def measured_before(output_dir: str, resume: str | None) -> tuple[str | None, int | None]:
    """(dtype, threads) that were measured and chosen when the checkpoint to resume from was written.

    (None, None) for other runs.

    Known of checkpoints of this machine's folders alone; one on the Hub was most likely written on another machine.
    """
    folders = [Path(resume)] if resume and Path(resume).is_dir() else []
    if resume == "auto":
        folders = checkpoint.checkpoints(output_dir)[::-1]
    for folder in folders:
        try:
            settings = checkpoint.settings_of(folder)
        except ValueError:  # damaged: `choose` says so
            continue
        threads = settings.get("cpu_threads")
        if not isinstance(threads, int) or threads < 1:
            return None, None
        return {"no": "float32", "bf16": "bfloat16"}.get(settings.get("mixed_precision")), threads
    return None, None


def changed_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """A warning for each setting in which a resumed run differs from its checkpoint's.

    >>> changed_settings({"seed": 1, "keep": 2}, {"seed": 3, "keep": 4})
    ['warning: resumed with seed 3, the checkpoint has 1']
    """
    own = json.loads(json.dumps(own, default=str))
    free = {*FREE, *(name for name in own if name.endswith("_version") or name == "python")}
    differing = [name for name, value in own.items() if name in saved and saved[name] != value and name not in free]
    kept = "; the checkpoint's optimizer holds that, so the flag does nothing"
    said = {name: f"warning: resumed with {name} {own[name]}, the checkpoint has {saved[name]}" for name in differing}
    return [line + (kept if name in IN_OPTIMIZER else "") for name, line in said.items()]


def in_force(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` settings, with the checkpoint's values where the flags do nothing.

    >>> in_force({"matrix_lr": 0.1, "seed": 1}, {"matrix_lr": 0.2, "seed": 2})
    {'matrix_lr': 0.1, 'seed': 2}
    """
    return dict(own) | {name: saved[name] for name in IN_OPTIMIZER if name in saved and name in own}


def same_optimizer(trainer: "Trainer", saved: Mapping[str, Any]) -> None:
    """ValueError where the matrices were trained by another optimizer, whose state does not fit."""
    groups = trainer.optimizer.optimizer.param_groups
    own = next((group["kind"] for group in groups if group["name"].startswith("matrix")), None)
    theirs = saved.get("matrix_optimizer", own)
    if own and theirs != own:
        raise ValueError(f"--matrix-optimizer {own}: the checkpoint was trained with {theirs}; resume with that")


def same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """ValueError where a checkpoint was trained with another vocabulary.

    Tables that are padded to the same size would hide it.
    """
    saved = load_tokenizer(folder)
    if saved.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: its tokenizer's vocabulary ({len(saved)} tokens) is not that of this run's ({len(tokenizer)}); "
            f"give --tokenizer {folder}"
        )
