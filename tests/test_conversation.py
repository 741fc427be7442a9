"""What a conversation may be, what becomes of it, and what is said of one that cannot be rendered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.conversation import SPECIAL_TOKENS, ConversationError, PlainEncoder, render, render_prompt, validate
from nanochat_hf.data.formats import convert_row, row_format
from nanochat_hf.tokenizer import train_tokenizer

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)
ASK = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)  # a token per byte: lengths can be read off


def say(content):
    return {"role": "assistant", "content": content}


def call(name, arguments, number=None):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*called, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(called)}


def answer(content, number=None):
    return {"role": "tool", "content": content, "tool_call_id": number}


def test_render_lays_out_pieces_and_mask_as_the_table_says(tokenizer):
    parts = [{"type": "text", "text": "x"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    ids, mask = render(tokenizer, {"messages": [{"role": "system", "content": "s"}, ASK, say(parts)]})
    assert [i for i in ids if i > 255] == [
        BOS,
        USER,
        USER_END,
        ASSISTANT,
        PYTHON,
        PYTHON_END,
        OUTPUT,
        OUTPUT_END,
        ASSISTANT_END,
    ]
    assert tokenizer.decode(ids[2:7]) == "s\n\nhi"
    #               bos user "s\n\nhi" end assistant  x  python 1+1 end     output 2 end   assistant_end
    assert mask == [0, 0] + [0] * 5 + [0] + [0] + [1] + [1] * 5 + [0] * 3 + [1]


def test_render_cuts_ids_and_mask_together_and_a_prompt_ends_where_the_answer_begins(tokenizer):
    conversation = {"messages": [ASK, say("yes")]}
    ids, mask = render(tokenizer, conversation)
    assert render(tokenizer, conversation, max_tokens=7) == (ids[:7], mask[:7])
    assert (
        render_prompt(tokenizer, conversation)
        == ids[: ids.index(ASSISTANT) + 1]
        == render_prompt(tokenizer, {"messages": [ASK]})
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<|", "|>", "é"]), max_size=6).map("".join))
def test_special_strings_in_any_text_stay_text(tokenizer, text):
    ids, _ = render(
        tokenizer, {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text}, say(text)]}
    )
    assert [i for i in ids if i > 255] == [BOS, USER, USER_END, ASSISTANT, ASSISTANT_END]
    assert bytes(text, "utf-8") == bytes(map(_byte(tokenizer), ids[ids.index(ASSISTANT) + 1 : -1]))


def _byte(tokenizer):
    letters = {letter: byte for byte in range(256) for letter in [_letter(byte)]}
    return lambda i: letters[tokenizer.convert_ids_to_tokens(i)]


def _letter(byte):
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in shown else chr(256 + [b for b in range(256) if b not in shown].index(byte))


def test_rows_of_every_known_form_become_the_same_conversation():
    expected = {"messages": [ASK, say("yes")]}
    for row in (
        [ASK, say("yes")],
        {"messages": [ASK, say("yes")], "source": "x"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"prompt": "hi", "completion": "yes"},
        {"prompt": [ASK], "completion": [say("yes")]},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"instruction": "hi", "input": None, "output": "yes"},
    ):
        assert convert_row(row) == expected
    assert convert_row({"instruction": "hi", "input": "you", "output": "yes"})["messages"][0]["content"] == "hi\n\nyou"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x", "id": 1}, "row 3: columns text, id; need messages"),
        ("x", "row 3: holds str"),
        ({"conversations": None}, "row 3: conversations must be a list"),
        ({"conversations": [{"from": "human"}]}, "row 3: conversations must be a list"),
        ({"instruction": None, "output": "x"}, "row 3: instruction and input must be text"),
    ],
)
def test_rows_of_no_known_form_say_why(row, reason):
    with pytest.raises(ConversationError, match=reason):
        convert_row(row, "row 3")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("hello", "no messages"),
        (["hello"], "turn 1 has role None, must be 'user'"),
        ([say("a")], "turn 1 has role 'assistant', must be 'user'"),
        ([ASK, say("a"), say("b")], "turn 3 has role 'assistant', must be 'user'"),
        ([ASK, {"role": "tool", "content": "x"}], "turn 2 has role 'tool', must be 'user' or 'assistant'"),
        ([ASK, {"role": "system", "content": "x"}], "turn 2 has role 'system'.*system messages come first"),
        (
            [ASK, calls(call("python", "1")), ASK],
            "turn 3 has role 'user', must be 'tool' .a tool call must be answered",
        ),
        ([ASK, calls(call("look_up", {})), say("x")], "turn 3 has role 'assistant', must be 'tool'"),
        ([ASK, calls(call("look up", {}))], "turn 2 calls 'look up'; a tool's name has letters"),
        (
            [ASK, calls(call("look_up", "no json"))],
            "turn 2 calls look_up with 'no json'; arguments must be a JSON object",
        ),
        ([ASK, calls(call("look_up", "[1]"))], "turn 2 calls look_up with .* must be a JSON object"),
        ([ASK, calls(call("look_up", {"a": {1}}))], "turn 2 holds what JSON cannot"),
        ([ASK, calls({"id": "1"})], "turn 2 calls no function by name"),
        ([ASK, say("x") | {"function_call": {"name": "f"}}], "turn 2 has a function_call, which is an old form"),
        ([ASK, {"role": "assistant", "content": None}], "turn 2 has content of type NoneType"),
        ([{"role": "system", "content": "s"}], "only a system message"),
        ([{"role": "system", "content": None}, ASK], "system message has content of type NoneType"),
        ([{"role": "system"}, ASK], "system message has content of type NoneType"),
        ([{"role": "user", "content": None}], "turn 1 has content of type NoneType"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "turn 1 has the part {'type': 'image_url'",
        ),
        ([{"role": "user", "content": {"text": "x"}}], "turn 1 has content of type dict"),
        ([ASK, say([])], "turn 2 has no parts"),
        ([ASK, say([None])], "turn 2 has the part None"),
        ([ASK, say("\ud83d")], "half a character"),
        ([ASK, say(["x"])], "turn 2 has the part 'x'; parts are {'type': text"),
        ([ASK, say([{"type": "text"}])], "turn 2 has the part"),
        ([ASK, say([{"type": "text", "text": 5}])], "turn 2 has the part"),
        ([ASK, say([{"type": ["text"], "text": "x"}])], "turn 2 has the part"),
        ([ASK, say([{"type": "image", "text": "x"}])], "turn 2 has the part"),
    ],
)
def test_what_cannot_be_rendered_says_why(tokenizer, messages, reason):
    for refuse in (
        lambda c: validate(c, "here"),
        lambda c: render(tokenizer, c),
        lambda c: render_prompt(tokenizer, c),
    ):
        with pytest.raises(ConversationError, match=reason):
            refuse({"messages": messages})


anything = st.recursive(
    st.none() | st.integers() | st.sampled_from(["text", "user", "assistant", "system", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "messages"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_whatever_is_given_it_renders_or_raises_conversation_error(tokenizer, thing):
    for conversation in (thing, {"messages": thing}):
        try:
            ids, mask = render(tokenizer, conversation)
        except ConversationError:
            continue
        assert len(ids) == len(mask)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ([], "list"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"prompt": 1, "completion": 2}, "prompt_completion"),
        ({"instruction": 1, "output": 2}, "alpaca"),
        ({"messages": [], "prompt": 1, "completion": 1}, "messages"),
    ],
)
def test_the_form_of_a_row_is_told(row, form):
    assert row_format(row) == form


def test_calls_of_older_forms_become_tool_calls():
    old = {"role": "assistant", "function_call": {"name": "look_up", "arguments": '{"city": "Rome"}'}, "weight": 0}
    as_text = say("") | {"tool_calls": '[{"function": {"name": "now", "arguments": null}}]'}
    function = {"role": "function", "name": "look_up", "content": "sunny"}
    row = {"messages": [ASK, old, function, say("Sun."), ASK, as_text]}
    assert convert_row(row)["messages"] == [
        ASK,
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": old["function_call"]}],
            "content": None,
            "weight": 0,
        },
        {"role": "tool", "name": "look_up", "content": "sunny"},
        say("Sun."),
        ASK,
        say("") | {"tool_calls": [{"function": {"name": "now", "arguments": None}}]},
    ]


def test_sharegpt_with_tools_and_a_system_column(tokenizer):
    row = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "python", "arguments": {"code": "1"}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "one"},
        ],
    }
    parts = [{"type": "python", "text": "1"}, {"type": "python_output", "text": "1"}, {"type": "text", "text": "one"}]
    standing = {"messages": [{"role": "system", "content": "s"}, ASK, say(parts)]}
    assert render(tokenizer, convert_row(row)) == render(tokenizer, standing)


plain = st.text(max_size=12).filter(lambda t: not any(s in t for s in SPECIAL_TOKENS))
code = st.text(st.characters(codec="utf-8", exclude_characters="{"), max_size=12).filter(
    lambda t: not any(s in t for s in SPECIAL_TOKENS)
)
arguments = st.dictionaries(plain, plain | st.integers() | st.none() | st.lists(plain, max_size=2), max_size=2)
called = st.builds(lambda text: call("python", {"code": text}), code) | st.builds(call, st.just("look_up"), arguments)
steps = st.lists(st.tuples(plain, called, plain), max_size=3)  # words, a call, its answer


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(plain, steps, plain), min_size=1, max_size=3), st.one_of(st.none(), plain))
def test_calls_through_the_template_equal_the_converted_row(tokenizer, turns, system):
    """Without declared tools too: what is trained on is what a client's prompt holds."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, made, last in turns:
        messages.append({"role": "user", "content": question})
        for words, one, result in made:
            messages += [calls(one, content=words), answer(result)]
        messages.append(say(last))
    ids, mask = render(tokenizer, convert_row({"messages": messages}))
    said = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert said["input_ids"] == ids and said["assistant_masks"] == mask
    assert PlainEncoder(tokenizer).render([convert_row({"messages": messages})])[0].tolist() == ids


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4))
def test_rendering_many_equals_rendering_each(tokenizer, pairs):
    import pickle

    conversations = [{"messages": [{"role": "user", "content": q}, say(a)]} for q, a in pairs]
    encoder = pickle.loads(pickle.dumps(PlainEncoder(tokenizer)))  # as a process that tokenises gets it
    ids, mask, lengths = encoder.render(conversations)
    each = [render(tokenizer, c) for c in conversations]
    assert ids.tolist() == [i for part, _ in each for i in part] and mask.tolist() == [
        m for _, part in each for m in part
    ]
    assert lengths.tolist() == [len(i) for i, _ in each]
    hostile = encoder.render([{"messages": [{"role": "user", "content": "<|bos|>"}, say("a")]}])[0].tolist()
    assert hostile.count(BOS) == 1


said = st.text(max_size=12) | st.sampled_from([*SPECIAL_TOKENS, "a<|bos|>b", "<|", "<|x|>", "  ", "\n\n"])
answers = said | st.lists(
    st.builds(lambda k, t: {"type": k, "text": t}, st.sampled_from(["text", "python", "python_output"]), said),
    min_size=1,
    max_size=4,
)
turns = st.lists(st.tuples(said, answers), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(turns, min_size=1, max_size=3), st.none() | said)
def test_many_at_once_render_as_one_by_one_whatever_their_texts_hold(tokenizer, several, system):
    conversations = []
    for pairs in several:
        messages = [{"role": "system", "content": system}] if system is not None else []
        for question, answer in pairs:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append({"messages": messages})
    ids, mask, lengths = PlainEncoder(tokenizer).render(conversations)
    expected = [render(tokenizer, c) for c in conversations]
    assert ids.tolist() == [t for one, _ in expected for t in one] and mask.tolist() == [
        m for _, one in expected for m in one
    ]
    assert lengths.tolist() == [len(one) for one, _ in expected]
