"""The chat page: conversations taken up by their texts, over HTTP, and in a headless browser where there is one."""

import shutil
import socket

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli import chat_web
from nanochat_hf.cli.chat_web import Answers, Page, build_page, model_name
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
    assert shown == "so [3*4 → 12] cats"
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
    """(address, Page, interface) of a running page; the model says "!" as often as it may."""
    pytest.importorskip("gradio", reason="gradio (the extra web) is not installed")
    folder = tmp_path_factory.mktemp("secretplace") / "poet" / "final"
    endless().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    interface, launch, page = build_page(["--model", str(folder), "--port", str(port), "--max-new-tokens", "300"])
    assert launch["server_name"] == "127.0.0.1" and launch["share"] is False
    interface.launch(**launch, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}", page, interface
    interface.close()


def test_the_page_streams_over_http(site):
    site[1].base.settings["max_new_tokens"] = 300
    client = pytest.importorskip("gradio_client").Client(site[0], verbose=False)
    job = client.submit("hi", 0.0, 0, api_name="/chat")
    assert set(job.result(timeout=120)) == {"!"} and len(job.outputs()) > 3, "it comes in pieces"
    with pytest.raises(Exception, match="the model sees 100000"):
        client.predict("cat " * 100_000, 0.0, 0, api_name="/chat")
    with pytest.raises(Exception, match="characters, the model sees 100,000 tokens"):
        client.predict("c" * 1_600_001, 0.0, 0, api_name="/chat")


def test_the_page_names_no_folder_and_serves_and_takes_no_file(site, tmp_path):
    requests = pytest.importorskip("httpx")
    folder = site[1].base.engine.model.name_or_path
    assert "secretplace" in folder and "poet" in folder
    for path in ("/", "/config", "/gradio_api/info"):
        answer = requests.get(site[0] + path)
        assert answer.status_code == 200 and "img-src 'self' data: blob:;" in answer.headers["content-security-policy"]
        assert "secretplace" not in answer.text and str(tmp_path.parent.parent) not in answer.text
    assert "nanochat_hf: poet" in requests.get(site[0] + "/config").text
    assert requests.post(site[0] + "/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert requests.get(site[0] + f"/gradio_api/file={folder}/config.json").status_code == 403
    large = b"x" * (chat_web.BODY_BYTES + 1)
    assert requests.post(site[0] + "/gradio_api/queue/join", content=large).status_code == 413
    config = requests.get(site[0] + "/config").json()
    (chatbot,) = (c["props"] for c in config["components"] if c["type"] == "chatbot")
    assert chatbot["render_markdown"] is False and chatbot["sanitize_html"] is True


def test_one_answer_at_a_time_and_a_queue_with_an_end(site, tokenizer):
    interface = site[2]
    assert interface._queue.max_size == chat_web.WAITING
    chats = [f for f in interface.fns.values() if f.api_name == "chat"]
    assert chats and all(f.concurrency_limit == 1 for f in chats)


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    engine = Scripted(tokenizer, ids(tokenizer, ["ok"]))
    page = Page(Chat(engine), None)
    monkeypatch.setattr(Chat, "ask", lambda *_: pytest.fail("was asked"))
    monkeypatch.setattr(Answers, "restore", lambda *_: pytest.fail("was tokenised"))
    history = [{"role": "user", "content": "a" * 900_000}, {"role": "assistant", "content": "b" * 700_000}]
    with pytest.raises(ValueError, match="has 1,600,002 characters, the model sees 100,000 tokens"):
        next(page.respond("no", history, 0.0, 0))
    assert not engine.prompts


def test_the_name_of_a_model_is_no_path(tmp_path):
    for kind in ("final", "best"):
        (tmp_path / "poet" / kind).mkdir(parents=True)
        assert model_name(str(tmp_path / "poet" / kind)) == "poet"
    assert model_name(str(tmp_path / "poet")) == "poet"
    assert model_name("me/poet") == "me/poet"


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
