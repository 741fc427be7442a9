"""Real signals in every loop of reading, planning and tokenising: one line, the exit code, and whole caches."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each loop is entered, says so from a row in its middle, and is interrupted there; the rest of its rows wait
CHILD = """
import contextlib, json, os, sys, time
from pathlib import Path
import datasets.config

folder = Path(sys.argv[1])
datasets.config.HF_DATASETS_CACHE = folder / "cache"
import nanochat_hf.data.conversations as conversations
import nanochat_hf.data.texts as texts
from nanochat_hf.config import user_errors
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import StreamedConversations, TextBatches
from nanochat_hf.data.workers import check_stopped
from nanochat_hf.data import tokenising, windows
from nanochat_hf.tokenizer import train_tokenizer

tokenizer = train_tokenizer(["ab"], 265)
row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
(folder / "chats.jsonl").write_text((json.dumps(row) + "\\n") * 2000)
(folder / "texts.jsonl").write_text('{"text": "abc"}\\n' * 2000)
waiting = True


def slow(function):
    def called(raw, *rest):
        if waiting and str(raw.place).endswith("701"):  # in each process that shares the rows
            os.write(1, b"ready\\n")
            for _ in range(3000):
                check_stopped()
                time.sleep(0.01)
        return function(raw, *rest)
    return called


tokenising.convert = windows.convert = slow(conversations.convert)
texts.text_of = slow(texts.text_of)
chats, plain = (SourceConfig(path=str(folder / name)) for name in ("chats.jsonl", "texts.jsonl"))
shape = {"rows": 1, "positions": 31, "prefetch": 0}
LOOPS = {
    "planned": lambda: SFTBatches([chats], tokenizer, **shape),
    "planned by two": lambda: SFTBatches([chats], tokenizer, num_proc=2, **shape),
    "streamed": lambda: StreamedConversations([chats], tokenizer, **shape).take(2000),
    "streamed ahead": lambda: StreamedConversations([chats], tokenizer, **shape | {"prefetch": 2}).take(2000),
    "text": lambda: TextBatches(plain, tokenizer, **shape).take(2000),
    "text once": lambda: TextBatches(plain, tokenizer, streaming=True, **shape).once(2000),
    "tokenizer": lambda: train_tokenizer(texts.Texts(plain, streaming=True), 265),
}
for name, loop in LOOPS.items():
    with contextlib.suppress(SystemExit):
        try:
            user_errors(loop)()
            print("END", name, 0, flush=True)
        except SystemExit as error:
            print("END", name, error.code, flush=True)
waiting = False
print("whole", len(LOOPS["planned"]().documents), len(LOOPS["planned by two"]().documents), flush=True)
"""


@pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_every_loop_in_one_line(tmp_path, number, code, told):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    said = []
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            if line == "ready\n" and said.count("ready") > sum("END" in text for text in said):
                os.killpg(process.pid, number)  # as a terminal's Ctrl-C, to the helpers too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    ends = [line for line in said if line.startswith("END")]
    assert len(ends) == 7 and all(line.endswith(f" {code}") for line in ends), "\n".join(said)
    assert set(said) - set(ends) - {"ready", told, ""} == {"whole 2000 2000"}, "\n".join(said)
