"""The server's command: its flags, what the page is told, and the page in a headless browser where there is one."""

import json
import re
import shutil
import sys
import threading
import time

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.cli import chat_web
from nanochat_hf.cli.chat_web import build_site, model_name, parse
from nanochat_hf.cli.model_facts import GENERAL, about, examples, settings_of, sources
from nanochat_hf.tasks.generated import SPELLING_BEE
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.serving import TEXT

CSP = "default-src 'none'; script-src 'self'; style-src 'self'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """final/ of a run; its model says "!" for ever."""
    final = tmp_path_factory.mktemp("secretplace") / "poet" / "final"
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=4000)
    model = NanochatForCausalLM(NanochatConfig(vocab_size=290, **sizes))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(final)
    train_tokenizer(TEXT, 290).save_pretrained(final)
    data = [{"path": "/home/me/secretplace/chats.jsonl"}, {"task": "spelling_bee"}, {"task": "calculator"}]
    (final.parent / "config.json").write_text(json.dumps({"train_data": data}))
    return final


@pytest.fixture(scope="module")
def page(folder):
    """The address of a running server with a slow model."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn (the extra web) is not installed")
    from nanochat_hf.serving.app import build_app

    site = build_site(parse(["--model", str(folder), "--dtype", "float32", "--max-new-tokens", "3000"]))
    step = site.scheduler.engine.step
    site.scheduler.engine.step = lambda: (time.sleep(0.01), step())[1]
    server = uvicorn.Server(uvicorn.Config(build_app(site), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_the_page_is_three_files_that_load_nothing_else(page):
    requests = pytest.importorskip("requests", reason="requests is not installed")
    texts = {}
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = requests.get(page + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith(CSP)
        texts[path] = answer.text
    assert not re.findall(r"""https?://|(?:src|href)="(?!page\.|data:,)""", "".join(texts.values()))
    assert "<script>" not in texts["/"] and "style=" not in texts["/"] and "innerHTML" not in texts["/page.js"]
    for path in ("/page.html", "/../setup.cfg", "/config.json", "/docs"):
        assert requests.get(page + path).status_code == 404


def test_the_page_is_told_of_model_and_data_without_folders(page):
    requests = pytest.importorskip("requests", reason="requests is not installed")
    answer = requests.get(f"{page}/settings")
    told = answer.json()
    assert told["model"] == "poet" and "secretplace" not in answer.text
    assert "Trained on chats.jsonl, spelling_bee, calculator." in told["about"] and "1 layers" not in told["about"]
    assert len(told["examples"]) == 4 and told["key"] is False and told["max_new_tokens"] == 3000


def test_examples_are_of_the_kinds_that_were_trained():
    bee = SPELLING_BEE.to_conversation(SPELLING_BEE.load("test", limit=1)[0])["messages"][0]["content"]
    asked = examples(["chats.jsonl", "spelling_bee", "calculator"])
    assert asked[0] == bee and len(set(asked)) == 4 and not set(asked) & set(GENERAL)
    assert examples([]) == list(GENERAL)


def test_sources_come_from_the_run_or_else_from_the_card(folder, tmp_path):
    assert sources(settings_of(folder)) == ["chats.jsonl", "spelling_bee", "calculator"]
    assert settings_of(tmp_path) == {}
    assert sources({}, "---\ndatasets:\n- org/chats\n- org/sums\n---\n# A model") == ["org/chats", "org/sums"]
    assert sources({}, "---\n: [\n---") == sources({}, None) == []
    (tmp_path / "training_config.json").write_text('{"train_data": [{"path": "org/chats"}]}')
    assert sources(settings_of(tmp_path)) == ["org/chats"]


def test_a_model_says_its_size():
    config = NanochatConfig(vocab_size=290, hidden_size=32, num_hidden_layers=2, num_attention_heads=1)
    told = about(NanochatForCausalLM(config), [])
    assert "2 layers, 290 tokens" in told and "\n" not in told and "thousand parameters" in told


def test_the_name_of_a_model_is_no_path(tmp_path):
    for kind in ("final", "best"):
        (tmp_path / "poet" / kind).mkdir(parents=True)
        assert model_name(str(tmp_path / "poet" / kind)) == "poet"
    assert model_name(str(tmp_path / "poet")) == "poet"
    assert model_name("me/poet") == "me/poet"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rows", "0"], "--rows 0"),
        (["--waiting", "-1"], "--waiting -1"),
        (["--api-key", ""], "--api-key is empty"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--share"], "--share needs gradio"),
        ([], "no such folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_flags_that_cannot_be_are_named_before_the_model_is_loaded(flags, reason, capsys, monkeypatch):
    pytest.importorskip("uvicorn", reason="uvicorn (the extra web) is not installed")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        chat_web.main(["--model", "/nowhere/at/all", *flags])
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_without_the_extra_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        chat_web.main(["--model", "/nowhere/at/all"])
    assert "uvicorn is not installed; pip install 'nanochat_hf[web]'" in capsys.readouterr().err


def test_in_a_browser_a_question_is_answered_stopped_edited_and_tried_again(page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("no chromium on this machine")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile",
            executable_path=chromium,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", *quiet],
            viewport={"width": 390, "height": 800},
        )
        window, asked, wrong = browser.new_page(), [], []
        window.on("request", lambda request: asked.append(request.url))
        window.on("pageerror", lambda error: wrong.append(str(error)))
        window.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        window.goto(page)
        window.wait_for_selector("#examples button")
        assert window.title() == "poet" and window.locator("#examples button").count() == 4
        assert window.evaluate("document.documentElement.scrollWidth") <= 390, "nothing stands out at the side"
        window.keyboard.type("hi")  # the field has the focus
        window.keyboard.press("Enter")
        grown = "() => (document.querySelector('.assistant .said')?.textContent.match(/!/g) || []).length > 5"
        window.wait_for_function(grown)
        window.keyboard.press("Escape")
        window.wait_for_selector("text=stopped")
        stopped = window.locator(".assistant .said").inner_text()
        window.wait_for_timeout(300)
        assert window.locator(".assistant .said").inner_text() == stopped
        window.get_by_role("button", name="Retry").click()
        window.wait_for_function(grown)
        window.get_by_role("button", name="Stop").click()
        assert window.locator(".user").count() == window.locator(".assistant").count() == 1
        window.get_by_role("button", name="Edit").click()
        assert window.locator("#text").input_value() == "hi" and window.locator(".user").count() == 0
        window.fill("#text", "ho")
        window.get_by_label("New tokens").evaluate("e => e.value = 5")
        window.get_by_role("button", name="Send").click()
        window.wait_for_selector("text=/5 tokens, .*cut at the limit/")
        with window.expect_download() as saved:
            window.get_by_role("button", name="Save").click()
        said = json.loads(saved.value.path().read_text())["messages"]
        assert [(m["role"], m["content"]) for m in said] == [("user", "ho"), ("assistant", "!!!!!")]
        window.get_by_label("Dark or light").click()
        assert window.evaluate("document.documentElement.dataset.theme") == "dark"
        window.get_by_role("button", name="New").click()
        assert window.locator("#turns li").count() == 0 and window.locator("#welcome").is_visible()
        assert not wrong and all(url.startswith((page, "data:", "blob:")) for url in asked), "the page asks nobody else"
        browser.close()
