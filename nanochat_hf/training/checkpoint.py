"""Checkpoints: written whole to a temporary folder, renamed, then pruned; a folder with the final name is complete."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from nanochat_hf.machine.accelerator import agree
from nanochat_hf.machine.weights import load_whole_weights, whole_weights

NAME = re.compile(r"checkpoint-(\d{6,})$")


def checkpoints(output_dir):
    """Whole checkpoints in `output_dir`, oldest first: [Path('…/checkpoint-000010'), …]."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if NAME.search(p.name) and (p / "trainer.json").is_file()]
    return sorted(found, key=lambda p: int(NAME.search(p.name)[1]))


def resolve(output_dir, resume):
    """`resume`: None → None; "auto" → the newest whole checkpoint or None; a folder → itself, ValueError if it is none."""
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    if not (Path(resume) / "trainer.json").is_file():
        raise ValueError(
            f"--resume {resume}: no trainer.json there, so no whole checkpoint; give a checkpoint-NNNNNN folder or auto"
        )
    return Path(resume)


def share_folder(accelerator, output_dir):
    """Make `output_dir`, on the main process; ValueError on all of them where one does not see it, as on machines that share no storage."""
    said = [None]
    if accelerator.is_main_process:
        try:
            prepare_folder(output_dir)
        except OSError as caught:
            said = [str(caught)]
    if broadcast_object_list(said)[0]:  # on all ranks: one that went on alone would wait for the main process
        raise OSError(said[0])
    if agree(accelerator, not Path(output_dir).is_dir()):
        raise ValueError(
            f"--output-dir {output_dir}: not all processes see it; name a folder on storage that all machines share"
        )


def refuse_others(output_dir, resumed):
    """ValueError where `output_dir` holds checkpoints that the run does not go on from (`resumed`: the one it does, or None): pruning by
    steps would keep them in place of the run's own, and --resume auto would take them."""
    found = checkpoints(output_dir)
    if not found or (resumed and found[-1].resolve() == Path(resumed).resolve()):
        return
    at = "goes on from another" if resumed else "starts anew"
    raise ValueError(
        f"--output-dir {output_dir}: holds {found[-1].name}, and this run {at}; continue that one with --resume auto, or give another "
        "--output-dir, or move the checkpoints there away"
    )


def save(trainer, output_dir, tokenizer, settings, keep=2, trackers=None):
    """Write `output_dir/checkpoint-{step}`, all ranks together; then prune to the newest `keep` (0 keeps all). Returns the folder.

    The optimizer's state is written whole, so that any number of processes can go on from it. OSError names the folder where the disk
    refuses; older checkpoints are untouched then.
    """
    accelerator, step = trainer.accelerator, trainer.state.step
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        _write(trainer, partial, tokenizer, settings, trackers or {})
        if accelerator.is_main_process:
            for path in partial.iterdir():
                _fsync(path)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            _fsync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final} could not be written ({error}); older checkpoints are whole: free space, then --resume auto"
        ) from None
    if accelerator.is_main_process:
        for old in checkpoints(output_dir)[:-keep] if keep else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _write(trainer, folder, tokenizer, settings, trackers):
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    accelerator.wait_for_everyone()
    # collectives where weights or state are split, so every rank asks
    weights, optimizer = whole_weights(trainer.raw_model), trainer.optimizer.optimizer.full_state_dict(rank0_only=True)
    stateful = hasattr(
        trainer.batches, "state_dict"
    )  # a loader of the user's own, prepared by Accelerate or not, may have no state
    own = {"data": trainer.batches.state_dict() if stateful else None, "rng": rng_state()}
    _torch_save(own, folder / f"rank{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        trainer.raw_model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        _torch_save({"optimizer": optimizer, "scaler": scaler}, folder / "optimizer.pt")
        state = {
            "state": trainer.state_dict(),
            "num_processes": accelerator.num_processes,
            "settings": settings,
            "trackers": trackers,
        }
        (folder / "trainer.json").write_text(json.dumps(state, indent=2, default=str))
    accelerator.wait_for_everyone()


def _torch_save(value, path):
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{path.name}: {str(error).splitlines()[0]}") from None


def trackers_of(folder):
    """What a checkpoint remembers of its trackers, {"wandb": run id}; {} for None."""
    return json.loads((Path(folder) / "trainer.json").read_text()).get("trackers", {}) if folder else {}


def settings_of(folder):
    """The settings of the run that wrote a checkpoint, {} where it has none."""
    return json.loads((Path(folder) / "trainer.json").read_text()).get("settings") or {}


def load(trainer, folder):
    """Restore weights, optimizer, data position, generators and counters: exactly on as many processes as wrote it.

    On another number the optimizer and the weights are the same, the data goes on where its own state can (else ValueError), and
    the generators start anew. ValueError names the file of a damaged or foreign checkpoint.
    """
    saved, weights, optimizer = _read(folder)
    accelerator = trainer.accelerator
    own = {name: (tuple(value.shape)) for name, value in trainer.raw_model.state_dict().items()}
    differing = sorted(
        n for n in own.keys() | weights.keys() if n not in own or n not in weights or own[n] != tuple(weights[n].shape)
    )
    if differing:
        raise ValueError(
            f"--resume {folder}: another architecture; {differing[0]} and {len(differing) - 1} more tensors differ"
        )
    load_whole_weights(trainer.raw_model, weights)
    trainer.optimizer.optimizer.load_state_dict(optimizer["optimizer"])
    if accelerator.scaler is not None and optimizer["scaler"]:
        accelerator.scaler.load_state_dict(optimizer["scaler"])
    same = saved["num_processes"] == accelerator.num_processes
    rank = _torch_load(folder / f"rank{accelerator.process_index if same else 0}.pt")
    if rank["data"] is None:
        accelerator.print(
            f"warning: {folder} has no position of the data, whose loader had no state_dict; the data begins anew"
        )
    else:
        trainer.batches.load_state_dict(rank["data"])
    trainer.load_state_dict(saved["state"])
    if same:
        set_rng_state(rank["rng"])


def _read(folder):
    from safetensors.torch import load_file

    try:
        saved = json.loads((folder / "trainer.json").read_text())
        weights = {}
        for part in sorted(folder.glob("*.safetensors")):
            weights |= load_file(part)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"--resume {folder}: damaged ({error}); give an older checkpoint") from None
    if not weights:
        raise ValueError(
            f"--resume {folder}: holds no model weights, so it is no checkpoint of this program; give another folder"
        )
    return saved, weights, _torch_load(folder / "optimizer.pt")


def _torch_load(path):
    try:
        # tensors and plain values only: checkpoints come from the Hub too, and a pickle may hold any code
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # unpickling garbage can raise anything
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(
            f"--resume {path}: damaged, missing or not ours ({''.join(reason)}); give an older checkpoint"
        ) from None


def rng_state():
    """States of Python's, numpy's and torch's generators, as tensors and plain values."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    name, keys, *rest = np.random.get_state()
    numpy = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    """Undo `rng_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare_folder(path):
    """Make the output folder and prove that it can be written to; returns its Path. OSError where it cannot."""
    folder = Path(path)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--output-dir {path}: cannot be written to ({error.strerror}); give a folder that can") from None
    return folder
