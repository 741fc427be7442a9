"""Checkpoints: written whole beside the others, sealed with checksums, swapped in, then pruned.

A folder with the final name is complete.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from nanochat_hf.machine.accelerator import agree
from nanochat_hf.machine.durable import partial_of, publish
from nanochat_hf.machine.weights import load_whole_weights, whole_weights

from .callbacks.base import Callback
from .generators import rng_state, set_rng_state
from .integrity import Diverged, damage, first_not_finite, seal
from .saved import Facts, blamed, check_optimizer, read_facts, read_plain, read_weights
from .together import on_main, together

if TYPE_CHECKING:
    from .trainer import Trainer

NAME = re.compile(r"checkpoint-(\d{6,})$")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in `output_dir`, oldest first: [Path('…/checkpoint-000010'), …]."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if NAME.search(p.name) and (p / "trainer.json").is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name: 10 for run/checkpoint-000010."""
    found = NAME.search(folder.name)
    return int(found[1]) if found else -1


def newest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint in `output_dir`, None where there is none."""
    found = checkpoints(output_dir)
    return found[-1] if found else None


def whole(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None where nothing is.

    Each is as its checksum says, and trainer.json can be used.
    """
    wrong = damage(folder)
    if wrong is None:
        try:
            read_facts(folder)
        except ValueError as error:  # "--resume …/trainer.json: damaged or not ours (it has no step); give an older …"
            wrong = f"trainer.json: {str(error).partition('(')[2].rpartition(')')[0]}"
    return wrong


def save(
    trainer: "Trainer",
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    keep: int = 2,
    trackers: Mapping[str, str] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{step}`, all ranks together; then prune to the newest `keep` (0 keeps all).

    Returns the folder. The optimizer's state is written whole, so that any number of processes can go on from it.
    OSError, on all ranks, names the folder where the disk refuses; Diverged where a weight is not finite. Older
    checkpoints are untouched then.
    """
    accelerator, step = trainer.accelerator, trainer.state.step
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    partial = partial_of(final)
    refuse_not_finite(trainer, output_dir)
    facts = Facts(
        trainer.state_dict(), accelerator.num_processes, dict(settings), dict(trackers or {}), states(trainer)
    )
    try:
        on_main(accelerator, lambda: _begin(partial))
        _write(trainer, partial, tokenizer, facts)
        on_main(accelerator, lambda: (seal(partial), publish(partial, final)))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final} could not be written ({error}); older checkpoints are whole: free space, then --resume auto"
        ) from None
    if accelerator.is_main_process and keep:
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _begin(partial):
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write(trainer, folder, tokenizer, facts):
    accelerator = trainer.accelerator
    # collectives where weights or state are split, so every rank asks
    weights, optimizer = whole_weights(trainer.raw_model), trainer.optimizer.optimizer.full_state_dict(rank0_only=True)
    # a loader of the user's own, prepared by Accelerate or not, may have no state
    kept = {c.name: c.weights(trainer) for c in trainer.callbacks if isinstance(c, Callback) and c.name}
    data = trainer.batches.state_dict() if hasattr(trainer.batches, "state_dict") else None

    def own():
        torch.save({"data": data, "rng": rng_state()}, folder / f"rank{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            trainer.raw_model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            torch.save({"optimizer": optimizer, "scaler": scaler}, folder / "optimizer.pt")
            for name, tensors in kept.items():
                if tensors:
                    torch.save(tensors, folder / f"{name}.pt")
            (folder / "trainer.json").write_text(json.dumps(asdict(facts), indent=2, default=str))

    together(accelerator, own)


def states(trainer: "Trainer") -> dict[str, dict[str, Any]]:
    """{name: state} of the callbacks that have one."""
    found = {}
    for callback in trainer.callbacks:
        if isinstance(callback, Callback) and callback.name:
            found[callback.name] = callback.state_dict()
    return found


def resume_callback(callback: Callback, trainer: "Trainer", folder: Path) -> None:
    """Give a callback what the checkpoint in `folder` keeps of it; ValueError names the file where that is damaged."""
    with blamed(folder / "trainer.json"):
        callback.load_state_dict(trainer.restored[str(callback.name)])
    path = folder / f"{callback.name}.pt"
    if path.is_file():
        weights = read_plain(path)
        with blamed(path):
            callback.load_weights(trainer, weights)


def refuse_not_finite(trainer: "Trainer", output_dir: str | Path) -> None:
    """Diverged, on all ranks, where a weight is NaN or infinite; it names the checkpoint to go back to."""
    bad = first_not_finite(trainer.raw_model.named_parameters())
    if not agree(trainer.accelerator, bad is not None):
        return
    last = newest(output_dir)
    remedy = f"go on from {last} with --resume auto" if last else "there is no checkpoint to go on from: start anew"
    raise Diverged(
        f"step {trainer.state.step}: {bad or 'a weight of another process'} is not finite, "
        f"so nothing is saved or exported; {remedy}, with lower learning rates"
    )


def trackers_of(folder: Path | None) -> dict[str, str]:
    """What a checkpoint remembers of its trackers, {"wandb": run id}; {} for None."""
    return read_facts(Path(folder)).trackers if folder else {}


def settings_of(folder: str | Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, {} where it has none."""
    return read_facts(Path(folder)).settings


def load(trainer: "Trainer", folder: Path) -> None:
    """Restore weights, optimizer, data position, generators, counters and the callbacks' states.

    On as many processes as wrote it the run goes on exactly. On another number the optimizer and the weights are the
    same, the data goes on where its own state can (else ValueError), and the generators start anew. ValueError names
    the file of a damaged or foreign checkpoint. The callbacks' states wait in `trainer.restored` for those that are
    attached later.
    """
    accelerator, optimizer = trainer.accelerator, trainer.optimizer.optimizer
    facts = read_facts(folder)
    weights = read_weights(folder, trainer.raw_model.state_dict())
    saved = read_plain(folder / "optimizer.pt", "optimizer", "scaler")
    same = facts.num_processes == accelerator.num_processes
    rank = read_plain(folder / f"rank{accelerator.process_index if same else 0}.pt", "data", "rng")
    check_optimizer(folder / "optimizer.pt", saved["optimizer"], optimizer.param_groups)
    load_whole_weights(trainer.raw_model, weights)
    with blamed(folder / "optimizer.pt"):
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
    if rank["data"] is None:
        accelerator.print(
            f"warning: {folder} has no position of the data, whose loader had no state_dict; the data begins anew"
        )
    else:
        _load_data(trainer, rank["data"], folder)
    trainer.load_state_dict(facts.state)
    trainer.restored = facts.callbacks
    if same:
        with blamed(folder / f"rank{accelerator.process_index}.pt"):
            set_rng_state(rank["rng"])


def _load_data(trainer, state, folder):
    try:
        trainer.batches.load_state_dict(state)
    except ValueError:  # the data's own words: it is other data, or was split otherwise
        raise
    except Exception as error:
        raise ValueError(
            f"--resume {folder}: the position of the data is damaged or not ours ({type(error).__name__}: {error}); "
            "give an older checkpoint"
        ) from None
