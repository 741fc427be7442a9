"""OpenAI's own client against a running server."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai", reason="openai (the extra test) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (the extra web) is not installed")

from nanochat_hf.conversation import render_prompt  # noqa: E402  after the packages that may be missing
from nanochat_hf.generation import Engine  # noqa: E402
from nanochat_hf.serving import app  # noqa: E402
from tests.support.serving import NAME, Script, eventually, ids_of, running, small_engine  # noqa: E402

HI = [{"role": "user", "content": "hi"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def engine():
    return small_engine()


@pytest.fixture(scope="module")
def site(engine):
    with running(engine) as (address, site):
        yield address, site


@pytest.fixture(scope="module")
def client(site):
    with openai.OpenAI(base_url=f"{site[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def script(engine, monkeypatch):
    return Script(engine, monkeypatch)


def chat(client, **settings):
    return client.chat.completions.create(**({"model": NAME, "messages": HI, "max_tokens": 12} | settings))


def collect(stream):
    """(texts by choice, reasons by choice, calls, usage) of a stream."""
    texts, reasons, calls, usage = {}, {}, [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            calls += choice.delta.tool_calls or []
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return texts, reasons, calls, usage


def said(engine, **settings):
    """What the engine says to HI."""
    prompt = render_prompt(engine.tokenizer, {"messages": HI})
    (row,) = Engine(engine.model, engine.tokenizer).generate([prompt], **({"max_new_tokens": 12} | settings))
    return row


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist"):
        client.models.retrieve("gpt-4")


def test_a_chat_is_the_engines_whole_and_streamed(client, engine):
    expected = said(engine, temperature=0.9, top_p=0.9, seed=[5], num_samples=2)
    settings = dict(temperature=0.9, top_p=0.9, seed=5, n=2)
    answer = chat(client, **settings)
    decoded = [engine.tokenizer.decode(c.ids, skip_special_tokens=True) for c in expected]
    assert [choice.message.content for choice in answer.choices] == decoded
    assert [choice.finish_reason for choice in answer.choices] == ["stop" if c.finished else "length" for c in expected]
    size = len(render_prompt(engine.tokenizer, {"messages": HI}))
    counted = size, sum(len(c.ids) for c in expected)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == counted
    texts, reasons, _, usage = collect(chat(client, stream=True, stream_options={"include_usage": True}, **settings))
    assert [texts[i] for i in range(2)] == decoded
    assert [reasons[i] for i in range(2)] == [choice.finish_reason for choice in answer.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == counted
    assert collect(chat(client, stream=True, **settings))[3] is None


def test_seeds_and_limits(client, engine):
    ask = lambda **settings: chat(client, temperature=1.0, **settings).choices[0].message.content  # noqa: E731
    assert ask(seed=1) == ask(seed=1) and len({ask(seed=1), ask(seed=2), ask(), ask()}) == 4
    assert chat(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3
    long = chat(client, max_tokens=None, temperature=0)
    assert long.usage.total_tokens <= engine.length


def test_log_probs_spell_the_text(client, engine, script):
    script.say("café 🙂", "<|assistant_end|>")
    answer = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert answer.message.content == "café 🙂" and answer.finish_reason == "stop"
    assert b"".join(bytes(token.bytes) for token in answer.logprobs.content) == "café 🙂".encode()
    assert all(token.logprob > -0.01 and len(token.top_logprobs) == 2 for token in answer.logprobs.content)
    streamed = chat(client, logprobs=True, top_logprobs=2, stream=True)
    parts = [
        one for chunk in streamed for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert parts == answer.logprobs.content


def test_an_answer_ends_at_a_stop_string(client, engine, script):
    script.say("The cat sat on the mat and counted 12 letters")
    for stream in (False, True):
        answer = chat(client, stop=["on the", "never"], stream=stream, max_tokens=150)
        text, reason = (
            (collect(answer)[0][0], collect(answer)[1].get(0) or "stop")
            if stream
            else (answer.choices[0].message.content, answer.choices[0].finish_reason)
        )
        assert (text, reason) == ("The cat sat ", "stop")
    assert eventually(lambda: engine.idle), "what would have come is not computed"


def test_the_calculator_answers_and_its_call_is_no_text(client, engine, script):
    pieces = ["so ", "<|python_start|>", "3*4", "<|python_end|>", "<|output_start|>", "12", "<|output_end|>", " cats"]
    script.say(*pieces, "<|assistant_end|>")
    answer = chat(client, max_tokens=40)
    message = answer.choices[0].message
    assert message.content == "so  cats" and answer.choices[0].finish_reason == "stop" and not message.tool_calls
    kinds = [(part["type"], part["text"]) for part in message.parts]
    assert kinds == [("text", "so "), ("python", "3*4"), ("python_output", "12"), ("text", " cats")]
    again = [*HI, {"role": "assistant", "content": message.parts}, {"role": "user", "content": "sure?"}]
    chat(client, messages=again)
    assert script.prompts[-1] == render_prompt(engine.tokenizer, {"messages": again}), "parts can be sent back"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_their_answers_read(client, engine, script, stream):
    script.say("<|python_start|>", 'weather{"city": "Rome"}', "<|python_end|>", "<|assistant_end|>")
    answer = chat(client, tools=[WEATHER, CLOCK], max_tokens=60, stream=stream)
    if stream:
        texts, reasons, (call,), _ = collect(answer)
        assert reasons == {0: "tool_calls"} and not texts[0]
    else:
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
    given = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    again = [*HI, {"role": "assistant", "content": None, "tool_calls": [given]}]
    again.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    script.say("sunny", "<|assistant_end|>")
    assert chat(client, messages=again, tools=[WEATHER, CLOCK]).choices[0].message.content == "sunny"
    assert script.prompts[-1] == render_prompt(engine.tokenizer, {"messages": again, "tools": [WEATHER, CLOCK]})


def test_tool_choice(client, engine, script):
    plain = render_prompt(engine.tokenizer, {"messages": HI})
    listed = render_prompt(engine.tokenizer, {"messages": HI, "tools": [WEATHER, CLOCK]})
    script.say('{"zone": 1}', "<|python_end|>", "more")
    named = {"type": "function", "function": {"name": "clock"}}
    answer = chat(client, tools=[WEATHER, CLOCK], tool_choice=named, max_tokens=40).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("clock", '{"zone": 1}') and answer.message.content is None
    assert script.prompts[-1] == [*listed, *ids_of(engine.tokenizer, ["<|python_start|>", "clock"])]
    assert answer.finish_reason == "tool_calls"
    chat(client, tools=[WEATHER, CLOCK], tool_choice="required")
    assert script.prompts[-1] == [*listed, *ids_of(engine.tokenizer, ["<|python_start|>"])]
    chat(client, tools=[WEATHER, CLOCK], tool_choice="none")
    assert script.prompts[-1] == plain


def test_completions_go_on_from_texts_and_ids(client, engine):
    tokenizer = engine.tokenizer
    ids = tokenizer("The cat")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    (expected,) = Engine(engine.model, tokenizer, None).generate([ids], max_new_tokens=8)[0]
    text = tokenizer.decode(expected.ids, skip_special_tokens=True)
    way = dict(model=NAME, temperature=0, max_tokens=8)
    ask = lambda **settings: client.completions.create(**(way | settings))  # noqa: E731
    answer = ask(prompt="The cat", logprobs=2)
    assert answer.choices[0].text == text and answer.usage.prompt_tokens == len(ids)
    scored = answer.choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == len(scored.text_offset)
    assert [choice.text for choice in ask(prompt=[ids, ids], n=2).choices] == [text] * 4
    assert ask(prompt=["The cat", "The"]).choices[0].text == ask(prompt=ids).choices[0].text == text
    assert ask(prompt="The cat", echo=True).choices[0].text == "The cat" + text
    assert "".join(chunk.choices[0].text for chunk in ask(prompt="The cat", echo=True, stream=True)) == "The cat" + text


@pytest.mark.parametrize(
    ("settings", "param", "reason"),
    [
        (dict(temperature=2.5), "temperature", "must lie between 0 and 2"),
        (dict(top_p=-0.1), "top_p", "between 0 and 1"),
        (dict(n=0), "n", "at least 1"),
        (dict(n=5), "n", "at most 4"),
        (dict(max_tokens=0), "max_tokens", "at least 1"),
        (dict(max_tokens="many"), "max_tokens", "whole number"),
        (dict(stop=["a"] * 5), "stop", "at most 4"),
        (dict(stop=""), "stop", "non-empty"),
        (dict(top_logprobs=2), "top_logprobs", "needs logprobs"),
        (dict(seed=1.5), "seed", "whole number"),
        (dict(stream_options={"include_usage": True}), "stream_options", "stream=true"),
        (dict(frequency_penalty=0.5), "frequency_penalty", "not supported"),
        (dict(response_format={"type": "json_object"}), "response_format", "not supported"),
        (dict(extra_body={"temprature": 1}), "temprature", "Unrecognized request argument supplied: temprature"),
        (dict(messages=[]), "messages", "non-empty list"),
        (dict(messages=[*HI, {"role": "assistant", "content": "yo"}]), "messages", "end with a message of the user"),
        (dict(messages=[{"role": "robot", "content": "yo"}]), "messages", "role 'robot'"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages", "has the part"),
        (dict(tools=[{"type": "function"}]), "tools[0]", "'name'"),
        (dict(tool_choice="auto"), "tool_choice", "only allowed with tools"),
        (dict(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice", "weather"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value)[:12],
)
def test_values_that_cannot_be_are_named(client, settings, param, reason):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, **settings)
    assert error.value.param == param and reason in error.value.message and error.value.type == "invalid_request_error"


def test_values_that_ask_for_nothing_are_taken(client):
    neutral = dict(frequency_penalty=0, presence_penalty=0, logit_bias={}, response_format={"type": "text"}, user="me")
    assert chat(client, **neutral, extra_body={"top_k": 5}).choices


def test_a_prompt_that_does_not_fit_has_its_own_code(client):
    for long in ("a b " * 300, "a" * 100_000):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 400 tokens") as error:
            chat(client, messages=[{"role": "user", "content": long}])
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, max_tokens=400)
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=NAME, prompt=[1] * 399)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="the id 280; the vocabulary has 280"):
        client.completions.create(model=NAME, prompt=[1, 280])


def post(client, path, content, **headers):
    """(status, JSON) of raw bytes."""
    base = str(client.base_url).removesuffix("/v1/")
    answer = client._client.post(base + path, content=content, headers={"content-type": "application/json"} | headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b'{"model": "tiny", "temperature": NaN}', {}, 400),
        (b'{"messages": []}', {}, 400),
        (b'{"model": "other"}', {}, 404),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b" " * (app.BODY_BYTES + 1), {}, 413),
    ],
    ids=["half", "list", "deep", "surrogate", "nan", "no-model", "other-model", "no-json", "large"],
)
def test_bodies_that_cannot_be_are_answered_with_an_error(client, content, headers, status):
    for path in ("/v1/chat/completions", "/v1/completions"):
        found, body = post(client, path, content, **headers)
        assert found == status and set(body["error"]) == {"message", "type", "param", "code"}


def test_paths_and_methods(client):
    assert post(client, "/v1/embeddings", b"{}")[0] == 404
    assert post(client, "/health", b"{}")[0] == 405
    base = str(client.base_url).removesuffix("/v1/")
    assert client._client.get(f"{base}/health").json()["status"] == "ok"


def test_many_streams_at_once_are_what_each_is_alone(client, engine):
    def ask(seed):
        return collect(chat(client, temperature=1.0, seed=seed, stream=True, max_tokens=8 + seed))[0][0]

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_rows(engine, script, site, monkeypatch, stream):
    script.say("a")  # for ever
    step, began = engine.step, threading.Event()
    # each step takes so long that the whole answer would take eight seconds
    monkeypatch.setattr(engine, "step", lambda: (began.set(), time.sleep(0.02), step())[2])
    content = json.dumps({"model": NAME, "messages": HI, "max_tokens": 380, "n": 4, "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(site[0].rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        assert began.wait(20) and eventually(lambda: site[1].scheduler.busy == 4)
    longest = 0

    def free():
        nonlocal longest
        longest = max([longest, *(len(one.row.out.ids) for one in engine.live if one)])
        return site[1].scheduler.busy == 0 and engine.idle

    assert eventually(free) and longest < 380


def test_too_many_requests_are_told_to_come_later(engine, script):
    script.say("a")
    with (
        running(engine, waiting=0) as (address, site),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = chat(client, n=4, stream=True, max_tokens=380)
        with pytest.raises(openai.RateLimitError, match="at most 4 may") as error:
            chat(client)
        assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "1"
        stream.close()
        assert eventually(lambda: site.scheduler.busy == 0)
        assert chat(client).choices


def test_a_key_is_asked_for(engine):
    with running(engine, key="sesame") as (address, _):
        for key, good in (("sesame", True), ("wrong", False), ("séame", False)):
            with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
                headers = {"authorization": f"Bearer {key}".encode()}
                status = client._client.get(f"{address}/v1/models", headers=headers).status_code
                assert status == (200 if good else 401)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as error:
                chat(client)
            assert error.value.code == "invalid_api_key"
            assert client._client.get(f"{address}/health").status_code == 200


def test_a_model_that_fails_fails_its_requests_alone(client, engine, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr(engine.table, "run", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            chat(client)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(chat(client, stream=True))
    assert "ZeroDivisionError" in caplog.text
    assert chat(client).choices and engine.idle


def test_a_request_that_the_engine_refuses_does_not_end_the_thread(client, engine, monkeypatch):
    with monkeypatch.context() as strict:
        strict.setattr(engine, "length", 5)  # shorter than what the server was told
        with pytest.raises(openai.BadRequestError, match="a row has 5"):
            chat(client)
    assert chat(client).choices
