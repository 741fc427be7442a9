"""Going on from a checkpoint: which one, and what the run does otherwise than the one that wrote it."""

import json
from pathlib import Path

from nanochat_hf.tokenizer import load_tokenizer

from . import checkpoint

# Flags that may differ after a resume without a word, and those whose values an optimizer's state carries.
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
}
IN_OPTIMIZER = {
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "weight_decay",
    "init_lr_frac",
    "scale_lr_to_batch",
}


def restore(run, trainer, tokenizer, output, fetch=None):
    """Bring the trainer to the checkpoint that --resume names, if there is one; returns its folder, None for a run from the start.

    `output`: the folder that will be written to, None for a dry run. `fetch`: what --resume says → what `checkpoint.resolve` takes, for names
    on the Hub. ValueError or OSError where either cannot be used.
    """
    if output:
        checkpoint.share_folder(trainer.accelerator, output)
    resume = checkpoint.resolve(run.output_dir, fetch(run.resume) if fetch else run.resume)
    if output:
        checkpoint.refuse_others(output, resume)
    if resume:
        same_tokenizer(tokenizer, resume)
        checkpoint.load(trainer, resume)
        trainer.accelerator.print(f"resumed from {resume} at step {trainer.state.step} of {trainer.num_steps}")
    elif run.resume:
        trainer.accelerator.print(f"no checkpoint in {run.output_dir} to resume from: the run starts anew")
    return resume


def measured_before(output_dir, resume):
    """(dtype, threads) that were measured and chosen when the checkpoint to resume from was written; (None, None) for other runs.

    Known of checkpoints of this machine's folders alone; one on the Hub was most likely written on another machine.
    """
    if resume is None or resume != "auto" and not Path(resume).is_dir():
        return None, None
    folder = checkpoint.resolve(output_dir, resume)
    settings = checkpoint.settings_of(folder) if folder else {}
    threads = settings.get("cpu_threads")
    dtype = {"no": "float32", "bf16": "bfloat16"}.get(settings.get("mixed_precision")) if threads else None
    return dtype, threads


def changed_settings(saved, own):
    """Lines, each with its end, that name what a resumed run does otherwise than its checkpoint's."""
    own = json.loads(json.dumps(own, default=str))
    differing = [name for name, value in own.items() if name in saved and saved[name] != value and name not in FREE]
    kept = "; the checkpoint's optimizer holds that, so the flag does nothing"
    return [
        f"warning: resumed with {n} {own[n]}, the checkpoint has {saved[n]}{kept if n in IN_OPTIMIZER else ''}\n"
        for n in differing
    ]


def same_tokenizer(tokenizer, folder):
    """ValueError where a checkpoint was trained with another vocabulary, which tables padded to the same size would hide."""
    saved = load_tokenizer(folder)
    if saved.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: its tokenizer's vocabulary ({len(saved)} tokens) is not that of this run's ({len(tokenizer)}); give --tokenizer {folder}"
        )
