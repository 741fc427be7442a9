"""The chat page: conversations taken up by their texts, over HTTP, and in a headless browser where there is one."""

import shutil
import socket

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli.chat_web import Answers, Page, build_page
from nanochat_hf.conversation import render
from nanochat_hf.generation import Chat, Engine
from nanochat_hf.tokenizer import train_tokenizer

CALL = ["so ", "<|python_start|>", "3*4", "<|python_end|>", "<|output_start|>", "12", "<|output_end|>", " cats"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The cat sat on the mat and counted 12 letters: naïve café 🙂 3*4"] * 3, 290)


def endless():
    """A model that says "!" for ever."""
    sizes = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=100_000, sliding_window=64
    )
    model = NanochatForCausalLM(NanochatConfig(vocab_size=290, **sizes)).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


class Scripted(Engine):
    """An engine whose stream is a list of ids; keeps prompts and seeds."""

    def __init__(self, tokenizer, answer):
        super().__init__(endless(), tokenizer)
        self.answer, self.prompts, self.seeds = answer, [], []

    def stream(self, prompt, seed, **settings):
        self.prompts.append(prompt)
        self.seeds.append(seed)
        yield from self.answer


def ids(tokenizer, pieces):
    return [
        i
        for p in pieces
        for i in (
            [tokenizer.convert_tokens_to_ids(p)]
            if p.startswith("<|")
            else tokenizer.encode(p, add_special_tokens=False)
        )
    ]


def test_a_second_question_and_a_retry_continue_the_ids_of_what_was_said(tokenizer):
    engine = Scripted(tokenizer, ids(tokenizer, CALL))
    page = Page(Chat(engine, temperature=1.0), "be brief")
    *_, shown = page.respond("3*4?", [], 1.0, 50)
    assert shown == "so `3*4 → 12` cats"
    history = [{"role": "user", "content": "3*4?"}, {"role": "assistant", "content": [{"type": "text", "text": shown}]}]
    for _ in range(2):
        list(page.respond("sure?", history, 1.0, 50))
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3*4?"}]
    parts = [
        {"type": k, "text": t}
        for k, t in (("text", "so "), ("python", "3*4"), ("python_output", "12"), ("text", " cats"))
    ]
    expected = render(tokenizer, {"messages": [*said, {"role": "assistant", "content": parts}]})[0]
    assert engine.prompts[1] == engine.prompts[2] and engine.prompts[1][: len(expected)] == expected, (
        "the call, not its text"
    )
    assert len(set(engine.seeds)) == 3, "a retry is a new try"


def test_texts_that_were_never_said_here_are_taken_as_texts(tokenizer):
    engine = Scripted(tokenizer, ids(tokenizer, ["ok"]))
    page = Page(Chat(engine), None)
    list(page.respond("c", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], 0.0, 0))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert (
        engine.prompts[0][: len(render(tokenizer, {"messages": messages})[0])]
        == render(tokenizer, {"messages": messages})[0]
    )


def test_old_conversations_are_forgotten(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat_hf.cli.chat_web.REMEMBERED", 2)
    answers, chat = Answers(), Chat(Scripted(tokenizer, []))
    for i in range(3):
        answers.store((str(i), "x"), chat)
    assert list(answers.after) == [("1", "x"), ("2", "x")]


def test_stop_keeps_what_was_said(tokenizer):
    engine = Scripted(tokenizer, ids(tokenizer, CALL))
    page = Page(Chat(engine), None)
    stream = page.respond("3*4?", [], 0.0, 50)
    shown = next(stream)
    stream.close()
    assert shown == "s" and ("3*4?", shown) in page.answers.after
    list(
        page.respond("what?", [{"role": "user", "content": "3*4?"}, {"role": "assistant", "content": ""}], 0.0, 50)
    )  # it showed less
    assert engine.prompts[1][: len(engine.prompts[0]) + 1] == [*engine.prompts[0], engine.answer[0]]


@pytest.fixture(scope="module")
def site(tokenizer, tmp_path_factory):
    """(address, Page) of a running page; the model says "!" as often as it may."""
    pytest.importorskip("gradio", reason="gradio (the extra web) is not installed")
    folder = tmp_path_factory.mktemp("web")
    endless().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    interface, launch, page = build_page(["--model", str(folder), "--port", str(port), "--max-new-tokens", "300"])
    assert launch["server_name"] == "127.0.0.1" and launch["share"] is False
    interface.launch(**launch, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}", page
    interface.close()


def test_the_page_streams_over_http(site):
    site[1].base.settings["max_new_tokens"] = 300
    client = pytest.importorskip("gradio_client").Client(site[0], verbose=False)
    job = client.submit("hi", 0.0, 0, api_name="/chat")
    assert set(job.result(timeout=120)) == {"!"} and len(job.outputs()) > 3, "it comes in pieces"
    with pytest.raises(Exception, match="the model sees 100000"):
        client.predict("cat " * 100_000, 0.0, 0, api_name="/chat")


def test_in_a_browser_a_question_is_answered_stopped_and_tried_again(site, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine")
    site[1].base.settings["max_new_tokens"] = 90_000
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", *quiet],
        )
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(site[0])
        box, last = page.locator("textarea").first, page.locator("[data-testid=bot]").last
        box.fill("hi")
        box.press("Enter")
        page.wait_for_function(
            "() => (document.querySelector('[data-testid=bot]')?.innerText.match(/!/g) || []).length > 5"
        )
        early = len(last.inner_text())
        page.locator("button.stop-button").dispatch_event("click")
        page.wait_for_timeout(500)
        stopped = last.inner_text()
        page.wait_for_timeout(1000)
        assert last.inner_text() == stopped and early <= len(stopped) < 90_000, "it grew, and then it stopped"
        chat = Chat(site[1].base.engine)
        site[1].answers.restore(("hi", stopped), chat)
        assert len(chat.messages) == 2 and len(chat.messages[1]["content"]) - len(stopped) in range(10), (
            "a next question continues it"
        )
        page.get_by_label("Retry").last.click()
        grown = (
            "n => (m => m > 5 && m != n)((document.querySelector('[data-testid=bot]')?.innerText || '').trim().length)"
        )
        page.wait_for_function(grown, arg=len(stopped))  # the old answer is gone, a new one comes
        page.locator("button.stop-button").dispatch_event("click")
        page.screenshot(path=tmp_path / "page.png")
        assert page.locator("[data-testid=user]").count() == 1 and page.locator("[data-testid=bot]").count() == 1
        assert all(url.startswith((site[0], "data:", "blob:")) for url in asked), "the page asks nobody else"
        browser.close()
