"""The chat template says to transformers, and so to every client of it, exactly what `render` says to the trainer."""

import json
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from nanochat_hf.conversation import SPECIAL_TOKENS, ConversationError, PlainEncoder, render, render_prompt
from nanochat_hf.tokenizer import train_tokenizer

ASK = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a città, today",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


def say(content):
    return {"role": "assistant", "content": content}


def part(kind, text):
    return {"type": kind, "text": text}


def call(name, arguments, number=None):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*called, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(called)}


def answer(content, number=None):
    return {"role": "tool", "content": content, "tool_call_id": number}


def text(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def same(tokenizer, conversation):
    """Template and render give the same ids and mask, and the encoder of many too."""
    ids, mask = render(tokenizer, conversation)
    said = tokenizer.apply_chat_template(
        conversation["messages"],
        tools=conversation.get("tools"),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert said["input_ids"] == ids and said["assistant_masks"] == mask
    many, masks, _ = PlainEncoder(tokenizer).render([conversation, conversation])
    assert many.tolist() == ids * 2 and masks.tolist() == mask * 2
    return ids, mask


def test_tools_and_their_calls_have_the_form_that_the_docs_show(tokenizer):
    messages = [
        {"role": "developer", "content": "Be brief."},
        ASK,
        calls(call("weather", {"city": "Rome"}, "a"), call("weather", '{"city":"Oslo"}', "b"), content="Two calls."),
        answer("snow", "b"),
        answer([part("text", "su"), part("text", "n")], "a"),
        say("Sun and snow."),
    ]
    assert text(tokenizer, messages, tools=[WEATHER]) == (
        "<|bos|><|user_start|>Be brief.\n\nTools, called as NAME{ARGUMENTS}:\n"
        '{"name": "weather", "description": "Of a città, today", "parameters": {"type": "object", "properties": '
        '{"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}\n\nhi<|user_end|>'
        '<|assistant_start|>Two calls.<|python_start|>weather{"city": "Rome"}<|python_end|>'
        '<|python_start|>weather{"city":"Oslo"}<|python_end|><|assistant_end|>'
        "<|output_start|>sun<|output_end|><|output_start|>snow<|output_end|>"
        "<|assistant_start|>Sun and snow.<|assistant_end|>"
    )
    ids, mask = same(tokenizer, {"messages": messages, "tools": [WEATHER]})
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == (
        'Two calls.<|python_start|>weather{"city": "Rome"}<|python_end|><|python_start|>weather{"city":"Oslo"}'
        "<|python_end|><|assistant_end|>Sun and snow.<|assistant_end|>"
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"expression": "2*3"}, "2*3"),
        ({"code": "a\n\\b", "timeout": None}, "a\n\\b"),
        ('{"code": "a\\n\\\\b \\"c\\" {1}"}', 'a\n\\b "c" {1}'),
        (' { "expression" : "2*3" } ', "2*3"),
        ("2*3", "2*3"),
        (42, "42"),
    ],
)
def test_the_calculator_is_called_by_its_bare_code_within_the_turn(tokenizer, arguments, code):
    messages = [ASK, calls(call("python", arguments)), answer("6"), say("Six."), ASK]
    expected = (
        f"<|bos|><|user_start|>hi<|user_end|><|assistant_start|><|python_start|>{code}<|python_end|>"
        "<|output_start|>6<|output_end|>Six.<|assistant_end|><|user_start|>hi<|user_end|>"
    )
    assert text(tokenizer, messages) == expected
    same(tokenizer, {"messages": messages})
    parts = [part("python", code), part("python_output", "6"), part("text", "Six.")]
    assert text(tokenizer, [ASK, say(parts), ASK]) == expected


def test_a_calculator_that_is_declared_or_not_alone_is_called_like_any_tool(tokenizer):
    declared = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]
    one = [ASK, calls(call("calculator", {"expression": "1"})), answer("1")]
    assert '<|python_start|>calculator{"expression": "1"}<|python_end|><|assistant_end|>' in text(
        tokenizer, one, tools=declared
    )
    two = [ASK, calls(call("calculator", {"expression": "1"}), call("f", None)), answer("1"), answer("2")]
    assert '<|python_start|>calculator{"expression": "1"}<|python_end|><|python_start|>f{}' in text(tokenizer, two)
    for conversation in ({"messages": one, "tools": declared}, {"messages": two}):
        same(tokenizer, conversation)


# Generated conversations: everything that OpenAI's clients send and that this form can say

plain = st.text(max_size=10).filter(lambda t: not any(s in t for s in SPECIAL_TOKENS))
content = plain | st.lists(st.builds(part, st.just("text"), plain), max_size=3)
# an output follows its call: of text right before an output, whose last letter takes several tokens, transformers marks
# only the first
worded = st.builds(lambda t: [part("text", t)], plain)
worked = st.builds(
    lambda c, o: [part("python", c), *([] if o is None else [part("python_output", o)])], plain, st.none() | plain
)
said = plain | st.lists(worded | worked, min_size=1, max_size=4).map(lambda groups: list(chain.from_iterable(groups)))
names = st.text("abcXYZ_-.09", min_size=1, max_size=6) | st.sampled_from(["python", "calculator", "code_interpreter"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(plain, inner, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(plain, values, max_size=3)
sayable = st.text(st.characters(codec="latin-1", exclude_categories=("Cc",)), max_size=10).filter(
    lambda t: not any(s in t for s in SPECIAL_TOKENS)
)
code_objects = st.builds(lambda key, code: {key: code}, st.sampled_from(["code", "expression", "input", "x"]), sayable)
arguments = st.one_of(
    objects,
    code_objects,
    code_objects.map(lambda o: json.dumps(o, ensure_ascii=False)),
    objects.map(json.dumps),
    st.none(),
)


@st.composite
def conversations(draw):
    messages = draw(
        st.lists(
            st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["system", "developer"]), content),
            max_size=2,
        )
    )
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": c} for c in draw(st.lists(content, min_size=1, max_size=2))]
        for _ in range(draw(st.integers(0, 2))):
            called = draw(st.lists(st.tuples(names, arguments), min_size=1, max_size=3))
            ids = draw(st.lists(st.none() | st.sampled_from("abc"), min_size=len(called), max_size=len(called)))
            messages.append(
                calls(*(call(n, a, i) for (n, a), i in zip(called, ids, strict=True)), content=draw(st.none() | said))
            )
            messages += [answer(draw(content), i) for i in draw(st.permutations(ids))]
        if draw(st.booleans()):
            messages.append(say(draw(said)))
    tools = draw(
        st.lists(
            st.builds(lambda n, o: {"type": "function", "function": {"name": n, "parameters": o}}, names, objects),
            max_size=2,
        )
    )
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations())
def test_any_conversation_has_the_same_ids_and_mask_from_template_and_render(tokenizer, conversation):
    try:
        render(tokenizer, conversation)
    except ConversationError:
        pytest.fail("the strategy makes what can be rendered")
    try:
        same(tokenizer, conversation)
    except TemplateError as error:  # render keeps such texts as text; the template cannot
        assert "special token" in str(error) or "escapes" in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations())
def test_prompts_agree_and_every_beginning_of_a_conversation_is_a_beginning_of_its_text(tokenizer, conversation):
    messages, tools, before = conversation["messages"], conversation.get("tools"), ""
    opening = sum(m["role"] in ("system", "developer") for m in messages)
    for end in range(opening + 1, len(messages) + 1):
        if end < len(messages) and messages[end]["role"] == "tool" and messages[end - 1]["role"] == "tool":
            continue  # answers are put in the order of their calls: a beginning of them is none of the text
        try:
            now = text(tokenizer, messages[:end], tools=tools)
            assert now.startswith(before)
            before = now
            if messages[end - 1]["role"] in ("user", "tool"):
                prompt = tokenizer.apply_chat_template(
                    messages[:end], tools=tools, add_generation_prompt=True, return_dict=True
                )["input_ids"]
                assert prompt == render_prompt(tokenizer, {**conversation, "messages": messages[:end]})
        except TemplateError as error:
            assert "special token" in str(error) or "escapes" in str(error)
            return


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "<|bos|>"}, say("a")],
        [ASK, say("<|assistant_end|>")],
        [{"role": "system", "content": "<|user_end|>"}, ASK, say("a")],
        [ASK, say([part("text", "<|bos"), part("text", "|>")])],  # only together are they a special token
        [{"role": "user", "content": [part("text", "<|bos"), part("text", "|>")]}, say("a")],
        [ASK, say([part("python", "<|python_end|>")])],
        [ASK, say([part("python", "1"), part("python_output", "<|output_end|>")])],
        [ASK, calls(call("python", {"code": "<|bos|>"})), answer("1"), say("a")],
        [ASK, calls(call("f", {"code": "<|bos|>"})), answer("1"), say("a")],
        [ASK, calls(call("f", '{"code": "<|bos|>"}')), answer("1"), say("a")],
        [ASK, calls(call("python", {"code": "1"})), answer("<|bos|>"), say("a")],
    ],
)
def test_the_template_raises_on_special_strings_which_render_keeps_as_text(tokenizer, messages):
    with pytest.raises(TemplateError, match="special token <.* inside a message"):
        tokenizer.apply_chat_template(messages)
    ids, _ = render(tokenizer, {"messages": messages})
    counted = tokenizer.convert_ids_to_tokens(ids)
    assert counted.count("<|bos|>") == counted.count("<|user_end|>") == 1
    assert counted.count("<|assistant_start|>") == counted.count("<|assistant_end|>")


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([say("a")], "role assistant cannot stand here"),
        ([ASK, answer("x")], "role tool cannot stand here"),
        ([ASK, {"role": "system", "content": "x"}], "role system cannot stand here: system messages come first"),
        ([ASK, say("a"), say("b")], "role assistant cannot stand here"),
        ([{"role": "system", "content": "s"}], "no user message"),
        ([ASK, calls(call("python", {"code": "1"})), ASK], "must be answered by a tool message before a user message"),
        ([ASK, calls(call("f", {})), say("x")], "must be answered by a tool message before a assistant message"),
        ([{"role": "user", "content": [part("text", "see"), IMAGE]}], "a user message has a part that is no text"),
        ([{"role": "user", "content": None}], "the content of a user message must be text"),
        ([{"role": "user"}], "the content of a user message must be text"),
        ([{"role": "user", "content": 5}], "the content of a user message must be text"),
        ([{"role": "user", "content": {"text": "x"}}], "the content of a user message must be text"),
        ([{"role": "system", "content": [IMAGE]}, ASK], "a system message has a part that is no text"),
        ([ASK, {"role": "assistant", "content": None}], "neither text, nor parts, nor tool_calls"),
        ([ASK, say([])], "neither text, nor parts, nor tool_calls"),
        ([ASK, say(5)], "neither text, nor parts, nor tool_calls"),
        ([ASK, say([part("image", "x")])], "none of text, python and python_output"),
        ([ASK, say([part("text", 5)])], "none of text, python and python_output"),
        ([ASK, say(["x"])], "none of text, python and python_output"),
        ([ASK, calls({"id": "1"})], "a tool call has no name"),
        ([ASK, calls(call("look up", {}))], "name look up; only letters"),
        ([ASK, calls(call("f", "no json"))], "arguments of f must be a JSON object"),
        ([ASK, calls(call("f", [1]))], "arguments of f must be a JSON object"),
        ([ASK, calls(call("python", '{"code": "\\u00e9"}'))], "give the arguments as an object"),
        ([ASK, {"role": "assistant", "content": "x", "tool_calls": {"a": 1}}], "tool_calls must be a list"),
        ([ASK, {"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "function_call is an old form"),
    ],
)
def test_the_template_raises_what_it_cannot_say(tokenizer, messages, reason):
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template(messages)


def test_a_prompt_after_an_unanswered_call_and_a_tool_without_a_name_raise(tokenizer):
    for name in ("python", "f"):
        with pytest.raises(TemplateError, match="must be answered by a tool message before the assistant goes on"):
            tokenizer.apply_chat_template([ASK, calls(call(name, {"code": "1"}))], add_generation_prompt=True)
    with pytest.raises(TemplateError, match="a tool has no name"):
        tokenizer.apply_chat_template([ASK], tools=[{"type": "function", "function": {}}])
    with pytest.raises(ConversationError, match="the tool .* has no name"):
        render(tokenizer, {"messages": [ASK], "tools": [{"type": "function", "function": {}}]})


PARSED = [
    ("Hello.<|assistant_end|>", {"content": "Hello."}),
    ("Hello, cut", {"content": "Hello, cut"}),
    (
        'Wait. <|python_start|>weather{"city": "Rome", "days": 2}<|python_end|><|assistant_end|>',
        {"content": "Wait. ", "tool_calls": [("weather", {"city": "Rome", "days": 2})]},
    ),
    (
        '<|python_start|>a{}<|python_end|><|python_start|>b-c.d{"x": [1]}<|python_end|><|assistant_end|>',
        {"tool_calls": [("a", {}), ("b-c.d", {"x": [1]})]},
    ),
    ("<|python_start|>6*(7+1)<|python_end|>", {"tool_calls": [("python", "6*(7+1)")]}),
    (
        "a <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>b<|assistant_end|>",
        {"content": "a b", "tool_calls": [("python", "6*7")], "tool_output": ["42"]},
    ),
    ('<|python_start|>f{"a": <|python_end|><|assistant_end|>', {"tool_calls": [("f", '{"a":')]}),
]


@pytest.mark.parametrize(("said", "expected"), PARSED)
def test_answers_are_parsed_into_messages_and_calls(tokenizer, said, expected):
    prefix = text(tokenizer, [ASK], add_generation_prompt=True)
    message = tokenizer.parse_response(said, prefix=prefix)
    assert message.pop("role") == "assistant"
    if "tool_calls" in message:
        message["tool_calls"] = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    assert message == expected
    pieces = tokenizer.get_response_parser(prefix=prefix)
    for letter in said:  # as a server streams it
        pieces.feed(letter)
    streamed = pieces.finalize()[0]
    assert [
        (c["function"]["name"], c["function"]["arguments"]) for c in streamed.get("tool_calls", [])
    ] == expected.get("tool_calls", [])
    assert streamed.get("content") == expected.get("content")


def test_a_parsed_call_goes_back_into_the_same_text(tokenizer):
    said = 'Wait. <|python_start|>weather{"city": "Città"}<|python_end|><|assistant_end|>'
    prompt = text(tokenizer, [ASK], add_generation_prompt=True, tools=[WEATHER])
    message = tokenizer.parse_response(said, prefix=prompt, tools=[WEATHER])
    assert text(tokenizer, [ASK, message], tools=[WEATHER]) == prompt + said


def test_after_the_calculators_output_the_turn_goes_on_and_its_answer_alone_is_parsed(tokenizer):
    messages = [ASK, calls(call("calculator", {"expression": "1+1"})), answer("2")]
    prompt = text(tokenizer, messages, add_generation_prompt=True)
    assert prompt.endswith("<|output_end|>") and prompt.count("<|assistant_start|>") == 1
    assert text(tokenizer, [*messages, say("two")]).startswith(prompt)
    assert tokenizer.parse_response("two<|assistant_end|>", prefix=prompt) == {"role": "assistant", "content": "two"}
