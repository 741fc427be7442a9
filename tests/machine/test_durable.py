"""Folders and files that are whole or as they were, wherever writing ends."""

import os

import pytest
import torch
from safetensors import SafetensorError

from nanochat_hf.machine import durable
from nanochat_hf.machine.durable import clear_leftovers, disk_error, whole_folder, write_whole


def fill(folder, text):
    with whole_folder(folder) as partial:
        (partial / "a").write_text(text)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # a file system that cannot swap two names
        monkeypatch.setattr(durable, "_exchange", lambda first, second: False)
    fill(tmp_path / "best", "1")
    fill(tmp_path / "best", "2")
    assert contents(tmp_path) == ["best", "best/a"] and (tmp_path / "best" / "a").read_text() == "2"
    with pytest.raises(KeyError), whole_folder(tmp_path / "best") as partial:
        (partial / "b").write_text("half")
        raise KeyError
    assert contents(tmp_path) == ["best", "best/a"] and (tmp_path / "best" / "a").read_text() == "2"


class Killed(BaseException):
    """A kill: nothing that follows is run, but for what the test runs itself."""


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment", range(4))
def test_after_a_kill_at_any_rename_there_is_one_whole_folder(tmp_path, monkeypatch, moment, exchanges):
    fill(tmp_path / "best", "1")
    calls = []

    def dying(name, real):
        def call(*args, **more):
            calls.append(name)
            if len(calls) > moment:
                raise Killed
            return real(*args, **more)

        return call

    with monkeypatch.context() as patch:
        exchange = durable._exchange if exchanges else lambda first, second: False
        patch.setattr(durable, "_exchange", dying("exchange", exchange))
        patch.setattr(os, "rename", dying("rename", os.rename))
        partial = durable.partial_of(tmp_path / "best")
        partial.mkdir()
        (partial / "a").write_text("2")
        try:
            durable.publish(partial, tmp_path / "best")
        except Killed:
            pass
        else:
            assert len(calls) <= moment
    told = clear_leftovers(tmp_path)
    assert contents(tmp_path) == ["best", "best/a"] and (tmp_path / "best" / "a").read_text() in "12"
    assert clear_leftovers(tmp_path) == [] and all("\n" not in sentence for sentence in told)


def test_leftovers_go_and_all_else_stays(tmp_path):
    for name in (".checkpoint-000007.partial", ".final.partial", ".hub-stage", ".git", "checkpoint-000006"):
        (tmp_path / name).mkdir()
    (tmp_path / ".config.json.partial").write_text("{")
    assert len(clear_leftovers(tmp_path, also=(".hub-stage",))) == 4
    assert contents(tmp_path) == [".git", "checkpoint-000006"]


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "1")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.json", "2")
    assert contents(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "1"


def test_a_full_disk_is_known_in_every_librarys_words(tmp_path):
    with pytest.raises(RuntimeError) as torchs:
        torch.save({}, tmp_path / "no" / "folder")
    assert disk_error(OSError()) and disk_error(SafetensorError("x"))
    assert disk_error(Exception("No space left on device (os error 28)"))  # tokenizers
    assert disk_error(
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")
    )
    assert not disk_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and torchs is not None
