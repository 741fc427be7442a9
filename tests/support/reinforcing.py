"""scripts.chat_rl on a tiny model, with a reward of the tests' own."""

import json

import pytest

from tests.support.processes import Run
from tests.support.training import here, save_model

STEPS = 6
REWARD = '''
"""A reward in which most answers differ a little, and that leaves room for answers that do not end."""


def small(conversation, completion):
    """Minus the share of characters that come late among the digits: never above 0."""
    return -sum(c in "56789" for c in completion) / max(1, len(completion))
'''


@pytest.fixture(scope="session")
def rl_start(tmp_path_factory):
    """A folder with a tiny chat model, questions.yaml and own_reward.py, which no test writes to."""
    return make_start(tmp_path_factory.mktemp("rl_start"))


def make_start(folder):
    """Write them. The model has learned, for a second, that answers are digits and end."""
    rows = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 3 + 1)}]
        for i in range(100)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own_reward.py").write_text(REWARD)
    (folder / "questions.yaml").write_text(f"train_data:\n  - {{path: {folder / 'chats.jsonl'}}}\n")
    save_model(folder / "model")
    assert here(folder, folder / "sft", num_steps=40, save_every=0, log_every=40) == 0
    return folder


def rl_flags(start, output, world=1, **changed):
    """Flags of a small run whose step does not depend on the number of processes."""
    settings = {
        "config": start / "questions.yaml",
        "model": start / "sft" / "final",
        "reward": "own_reward:small",
        "output_dir": output,
        "num_steps": STEPS,
        "questions": 3,
        "num_samples": 4,
        "max_new_tokens": 12,
        "max_seq_len": 64,
        "device_batch_size": 4 // world,
        "init_lr_frac": 0.1,
        "eval_every": 0,
        "eval_batches": 1,
        "task_every": 0,
        "save_every": 1,
        "keep": 0,
        "log_every": 1,
        "dtype": "float32",
        "attn": "sdpa",
    } | changed
    return [
        part for name, value in settings.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)
    ]


def reinforce(start, output, log, world=1, **changed):
    """A Run of scripts.chat_rl with `rl_flags`."""
    return Run("scripts.chat_rl", rl_flags(start, output, world, **changed), log, world, folder=start)


def reinforce_here(start, output, **changed):
    """The exit code of scripts.chat_rl with `rl_flags`, in this process."""
    from nanochat_hf.cli import chat_rl

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(start))
        with pytest.raises(SystemExit) as ended:
            chat_rl.main([str(part) for part in rl_flags(start, output, **({"compile": False} | changed))])
    return ended.value.code
