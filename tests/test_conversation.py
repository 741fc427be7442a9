"""What a conversation may be, what becomes of it, and what is said of one that cannot be rendered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.conversation import SPECIAL_TOKENS, ConversationError, convert_row, render, render_prompt, validate
from nanochat_hf.tokenizer import train_tokenizer

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)
ASK = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)  # a token per byte: lengths can be read off


def say(content):
    return {"role": "assistant", "content": content}


def test_render_lays_out_pieces_and_mask_as_the_table_says(tokenizer):
    parts = [{"type": "text", "text": "x"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    ids, mask = render(tokenizer, {"messages": [{"role": "system", "content": "s"}, ASK, say(parts)]})
    assert [i for i in ids if i > 255] == [BOS, USER, USER_END, ASSISTANT, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, ASSISTANT_END]
    assert tokenizer.decode(ids[2:7]) == "s\n\nhi"
    #               bos user "s\n\nhi" end assistant  x  python 1+1 end     output 2 end   assistant_end
    assert mask == [0, 0] + [0] * 5 + [0] + [0] + [1] + [1] * 5 + [0] * 3 + [1]


def test_render_cuts_ids_and_mask_together_and_a_prompt_ends_where_the_answer_begins(tokenizer):
    conversation = {"messages": [ASK, say("yes")]}
    ids, mask = render(tokenizer, conversation)
    assert render(tokenizer, conversation, max_tokens=7) == (ids[:7], mask[:7])
    assert render_prompt(tokenizer, conversation) == ids[: ids.index(ASSISTANT) + 1] == render_prompt(tokenizer, {"messages": [ASK]})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<|", "|>", "é"]), max_size=6).map("".join))
def test_special_strings_in_any_text_stay_text(tokenizer, text):
    ids, _ = render(tokenizer, {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text}, say(text)]})
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
        ([ASK, ASK], "turn 2 has role 'user', must be 'assistant'"),
        ([{"role": "system", "content": "s"}], "only a system message"),
        ([{"role": "system", "content": None}, ASK], "system message has content of type NoneType"),
        ([{"role": "system"}, ASK], "system message has content of type NoneType"),
        ([{"role": "user", "content": None}], "turn 1 has content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "turn 1 has content of type list"),
        ([ASK, say([])], "turn 2 has the part None"),
        ([ASK, say(["x"])], "turn 2 has the part 'x'; parts are {'type': text"),
        ([ASK, say([{"type": "text"}])], "turn 2 has the part"),
        ([ASK, say([{"type": "text", "text": 5}])], "turn 2 has the part"),
        ([ASK, say([{"type": ["text"], "text": "x"}])], "turn 2 has the part"),
        ([ASK, say([{"type": "image", "text": "x"}])], "turn 2 has the part"),
    ],
)
def test_what_cannot_be_rendered_says_why(tokenizer, messages, reason):
    for refuse in (lambda c: validate(c, "here"), lambda c: render(tokenizer, c), lambda c: render_prompt(tokenizer, c)):
        with pytest.raises(ConversationError, match=reason):
            refuse({"messages": messages})


anything = st.recursive(
    st.none() | st.integers() | st.sampled_from(["text", "user", "assistant", "system", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "messages"]), inner, max_size=3)
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
