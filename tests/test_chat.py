"""The chat: ids kept over turns, tool calls stored as parts, commands, stopping, and the page."""

import json
import socket
import subprocess
import sys
import threading

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.conversation import render_prompt
from nanochat_hf.generation import Engine
from nanochat_hf.tokenizer import train_tokenizer
from scripts.chat_cli import Chat, command, main, show


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
        out += [tokenizer.convert_tokens_to_ids(piece)] if piece.startswith("<|") else tokenizer.encode(piece, add_special_tokens=False)
    return out


CALL = ("so ", "<|python_start|>", "3*4", "<|python_end|>", "<|output_start|>", "12", "<|output_end|>", " cats")


def test_the_second_turn_continues_the_ids_of_a_tool_call(model, tokenizer):
    engine = Scripted(model, tokenizer, [ids(tokenizer, *CALL), ids(tokenizer, "ok")])
    chat = Chat(engine, system="be brief")
    assert "".join(show(chat.ask("3*4?"))) == "so [3*4 = 12] cats"
    "".join(show(chat.ask("sure?")))
    parts = chat.messages[2]["content"]
    assert [(p["type"], p["text"]) for p in parts] == [("text", "so "), ("python", "3*4"), ("python_output", "12"), ("text", " cats")]
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
    stop = {3: start + 2, 4: answer.index(tokenizer.convert_tokens_to_ids("<|output_start|>")) + 1}.get(length, len(answer))

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
    assert saved["messages"] == chat.messages and saved["messages"][1]["content"][1] == {"type": "python", "text": "3*4"}
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


def test_program_answers_goes_on_after_errors_and_leaves_at_the_end(folder):
    run = [sys.executable, "-m", "scripts.chat_cli", "--model", str(folder), "--max-new-tokens", "4"]
    out = subprocess.run(run, input=f"{'cat ' * 300}\nhi\n/help\n/save /nowhere/at/all\n", capture_output=True, text=True)
    assert out.returncode == 0 and "the model sees 256" in out.stdout and "/system TEXT" in out.stdout and "No such file" in out.stdout
    assert "Traceback" not in out.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(folder, monkeypatch, capsys):
    lines = iter(["hi", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    calls, original = [], Engine.stream

    def stream(self, prompt, **settings):
        calls.append(prompt)
        yield from original(self, prompt, **(settings | {"max_new_tokens": 2}))
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", stream)
    main(["--model", str(folder)])
    assert "(stopped)" in capsys.readouterr().out and len(calls) == 2 and calls[1][: len(calls[0])] == calls[0]


@pytest.mark.parametrize(("flag", "value"), [("--temperature", "-1"), ("--top-k", "-5"), ("--top-p", "2"), ("--max-new-tokens", "0")])
def test_wrong_settings_end_before_the_model_is_loaded(capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        main(["--model", "no such model", f"{flag}={value}"])
    assert stop.value.code == 2 and f"{flag[2:].replace('-', '_')}={value}" in capsys.readouterr().err


def test_page_streams_answers_over_http(folder):
    pytest.importorskip("gradio", reason="gradio (the extra web) is not installed")
    client = pytest.importorskip("gradio_client")
    from scripts.chat_web import build_page

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = build_page(["--model", str(folder), "--max-new-tokens", "6"])[0]
    threading.Thread(target=lambda: page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)).run()
    try:
        job = client.Client(f"http://127.0.0.1:{port}", verbose=False).submit("hi", api_name="/chat")
        assert isinstance(job.result(timeout=60), str)
    finally:
        page.close()
