"""The chat: ids kept over turns, tool calls stored as parts, commands, and what Ctrl-C stops."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli.chat_cli import answer, command, main
from nanochat_hf.conversation import render_prompt
from nanochat_hf.generation import Chat, Engine, show
from nanochat_hf.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat sat on the mat and counted 12 letters: naïve café 🙂 3*4"] * 3, 290)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=256)
    return NanochatForCausalLM(NanochatConfig(vocab_size=290, **sizes)).eval()


class Scripted(Engine):
    """An engine whose stream is a list of ids; keeps the prompts it got."""

    def __init__(self, model, tokenizer, answers):
        super().__init__(model, tokenizer)
        self.answers, self.prompts = list(answers), []

    def stream(self, prompt, **settings):
        self.prompts.append(prompt)
        yield from self.answers.pop(0)


def ids(tokenizer, *pieces):
    out = []
    for piece in pieces:
        out += (
            [tokenizer.convert_tokens_to_ids(piece)]
            if piece.startswith("<|")
            else tokenizer.encode(piece, add_special_tokens=False)
        )
    return out


CALL = ("so ", "<|python_start|>", "3*4", "<|python_end|>", "<|output_start|>", "12", "<|output_end|>", " cats")


def test_the_second_turn_continues_the_ids_of_a_tool_call(model, tokenizer):
    engine = Scripted(model, tokenizer, [ids(tokenizer, *CALL), ids(tokenizer, "ok")])
    chat = Chat(engine, system="be brief")
    assert "".join(show(chat.ask("3*4?"))) == "so [3*4 → 12] cats"
    "".join(show(chat.ask("sure?")))
    parts = chat.messages[2]["content"]
    assert [(p["type"], p["text"]) for p in parts] == [
        ("text", "so "),
        ("python", "3*4"),
        ("python_output", "12"),
        ("text", " cats"),
    ]
    assert engine.prompts[1] == render_prompt(tokenizer, {"messages": chat.messages[:4]})


def test_ids_are_kept_where_rendering_the_text_again_would_change_them(model, tokenizer):
    letters = [i for c in "cat" for i in ids(tokenizer, c)]  # not how the tokenizer writes it
    assert letters != ids(tokenizer, "cat")
    engine = Scripted(model, tokenizer, [letters, ids(tokenizer, "ok")])
    chat = Chat(engine)
    for question in ("a", "b"):
        list(chat.ask(question))
    assert engine.prompts[1][len(engine.prompts[0]) :][:3] == letters


def test_characters_of_several_tokens_come_whole(model, tokenizer):
    text = "naïve 🙂 日"
    chat = Chat(Scripted(model, tokenizer, [ids(tokenizer, text)]))
    pieces = [piece for _, piece in chat.ask("a")]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(("length", "kept"), [(3, "so "), (4, "so "), (len(CALL), None)])
def test_a_stopped_answer_keeps_what_is_whole(model, tokenizer, length, kept):
    answer = ids(tokenizer, *CALL)
    start = answer.index(tokenizer.convert_tokens_to_ids("<|python_start|>"))
    stop = {3: start + 2, 4: answer.index(tokenizer.convert_tokens_to_ids("<|output_start|>")) + 1}.get(
        length, len(answer)
    )

    class Interrupted(Scripted):
        def stream(self, prompt, **settings):
            yield from answer[:stop]
            raise KeyboardInterrupt

    chat = Chat(Interrupted(model, tokenizer, []))
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("a"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    if kept is None:
        assert [p["type"] for p in chat.messages[1]["content"]] == ["text", "python", "python_output", "text"]
    else:
        assert chat.messages[1]["content"] == kept
    assert chat.ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant_end|>")


def test_commands(model, tokenizer, tmp_path, capsys):
    chat = Chat(Scripted(model, tokenizer, [ids(tokenizer, *CALL)]))
    command(chat, f"/save {tmp_path / 'none.jsonl'}")
    assert not (tmp_path / "none.jsonl").exists()
    list(chat.ask("hi"))
    command(chat, f"/save {tmp_path / 'chat.jsonl'}")
    saved = json.loads((tmp_path / "chat.jsonl").read_text())
    assert saved["messages"] == chat.messages and saved["messages"][1]["content"][1] == {
        "type": "python",
        "text": "3*4",
    }
    command(chat, "/system speak plainly")
    assert chat.messages == [{"role": "system", "content": "speak plainly"}] and chat.ids == []
    command(chat, "/clear")
    assert chat.messages == [{"role": "system", "content": "speak plainly"}]
    command(chat, "/help")
    command(chat, "/dance")
    out = capsys.readouterr().out
    assert "/save FILE" in out and "/dance is unknown" in out


def test_a_full_conversation_says_so(model, tokenizer):
    with pytest.raises(ValueError, match="model sees 256.*?/clear"):
        list(Chat(Scripted(model, tokenizer, [])).ask("cat " * 300))


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_program_answers_goes_on_after_errors_and_leaves_at_the_end(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'cat ' * 300}\nhi\n/help\n/save /nowhere/at/all\n\n"))
    main(["--model", str(folder), "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert "the model sees 256" in out and "/system TEXT" in out and "No such file" in out and out.count("> ") == 6


@pytest.fixture(scope="module")
def endless(tokenizer, tmp_path_factory):
    """A model that says "!" for ever."""
    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=1_000_000, sliding_window=64
    )
    model = NanochatForCausalLM(NanochatConfig(vocab_size=290, **sizes))
    torch.nn.init.zeros_(model.lm_head.weight)
    path = tmp_path_factory.mktemp("endless")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *argv):
        self.master, slave = pty.openpty()
        streams = dict(stdin=slave, stdout=slave, stderr=slave)
        self.process = subprocess.Popen([sys.executable, "-m", *map(str, argv)], start_new_session=True, **streams)
        os.close(slave)
        self.text = ""

    def until(self, wanted, seconds=60, interrupting=False):
        """Read until `wanted` was printed; what came before it is forgotten.

        `interrupting`: press Ctrl-C, and again where nothing follows, because Python misses a Ctrl-C that comes after
        readline's prompt and before it waits.
        """
        end, pressed = time.monotonic() + seconds, float("-inf")
        while wanted not in self.text:
            if interrupting and time.monotonic() > pressed + 3:
                self.process.send_signal(signal.SIGINT)
                pressed = time.monotonic()
            assert time.monotonic() < end and self.process.poll() is None, f"no {wanted!r} in {self.text[-500:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode(errors="replace")
        self.text = self.text.partition(wanted)[2]

    def type(self, line):
        os.write(self.master, f"{line}\n".encode())


def test_ctrl_c_stops_the_answer_and_not_the_program(endless, tmp_path):
    terminal = Terminal("scripts.chat_cli", "--model", endless, "--max-new-tokens", 500_000)
    try:
        terminal.until("> ")
        terminal.type("hi")
        terminal.until("!!!!!!!!")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("(stopped)")
        terminal.until("> ")
        terminal.until("leaves)", interrupting=True)  # where nothing is to be stopped
        terminal.type(f"/save {tmp_path / 'chat.jsonl'}")
        terminal.until("(saved to")
        terminal.type("/quit")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
    said = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert said[0] == {"role": "user", "content": "hi"} and set(said[1]["content"]) == {"!"}, (
        "what was said stays in the conversation"
    )


def test_one_question_is_answered_and_that_is_all(endless, capsys):
    main(["--model", str(endless), "-p", "hi", "--max-new-tokens", "5"])
    assert capsys.readouterr().out == "!!!!!\n"


def test_a_model_cannot_steer_the_terminal(model, tokenizer, capsys):
    chat = Chat(Scripted(model, tokenizer, [ids(tokenizer, "a\x1b[2Jb\nc")]))
    answer(chat, "hi", colour=False)
    assert capsys.readouterr().out == "a\ufffd[2Jb\nc\n"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("none", "no such folder"),
        ("/none/at/all", "no such folder"),
        ("RUN", "did you mean RUN/final"),
        ("RUN/empty", "no config.json"),
    ],
)
def test_wrong_paths_say_what_would_be_right(path, reason, tmp_path, capsys):
    (tmp_path / "final").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["--model", path.replace("RUN", str(tmp_path)), "-p", "hi"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and reason.replace("RUN", str(tmp_path)) in error and error.count("\n") == 1


def test_one_answer_shows_control_characters_as_the_dialogue_does(endless, monkeypatch, capsys):
    pieces = [("text", "a\x1b[2J\tb\n"), ("python", "1\x07"), ("python_output", "\x9b1\x7f")]
    monkeypatch.setattr(Chat, "ask", lambda *_: iter(pieces))
    main(["--model", str(endless), "-p", "hi"])
    assert capsys.readouterr().out == "a\ufffd[2J\tb\n[1\ufffd → \ufffd1\ufffd]\n"


@pytest.mark.parametrize(
    ("flag", "value"), [("--temperature", "-1"), ("--top-k", "-5"), ("--top-p", "2"), ("--max-new-tokens", "0")]
)
def test_wrong_settings_end_before_the_model_is_loaded(capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        main(["--model", "no such model", f"{flag}={value}"])
    assert stop.value.code == 2 and f"{flag[2:].replace('-', '_')}={value}" in capsys.readouterr().err
