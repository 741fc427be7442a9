"""Tokens → text: stop strings, characters of several tokens, calls; the same however the tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_hf.serving.writing import Writer
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.serving import TEXT, ids_of

TOKENIZER = train_tokenizer(TEXT, 280)
CALL = ["so ", "<|python_start|>", "3*4", "<|python_end|>", "<|output_start|>", "12", "<|output_end|>", " cats 🙂"]
WEATHER = ["<|python_start|>", 'weather{"city": "Rome"}', "<|python_end|>"]


def write(pieces, *, size=1, scored=False, **options):
    """(text given out, the writer, all that was given) for tokens that come `size` at a time."""
    ids, writer, given = ids_of(TOKENIZER, pieces), Writer(TOKENIZER, **options), []
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        given += writer.feed(some, [-float(i) for i in some] if scored else ())
        if writer.stopped:
            break
    given += writer.end()
    return "".join(w.text for w in given), writer, given


@pytest.mark.parametrize("size", [1, 4, 99])
def test_a_call_of_the_calculator_is_a_part_and_no_text(size):
    text, writer, given = write(CALL, size=size)
    assert text == writer.text == "so  cats 🙂"
    parts = [("text", "so "), ("python", "3*4"), ("python_output", "12"), ("text", " cats 🙂")]
    assert [(p["type"], p["text"]) for p in writer.parts] == parts
    merged = "".join(w.text or f"[{w.parts[0]['text']}]" for w in given)
    assert merged == "so [3*4][12] cats 🙂", "in order, whatever arrives together"
    assert "\ufffd" not in text and not writer.calls and not writer.stopped


def test_calls_of_declared_tools_are_calls_and_others_the_calculators():
    text, writer, given = write(["ok ", *WEATHER, *WEATHER], declared=frozenset({"weather"}))
    assert text == "ok " and writer.calls == [("weather", '{"city": "Rome"}')] * 2 and not writer.stopped
    assert [call for w in given for call in w.calls] == writer.calls
    _, writer, _ = write(WEATHER, declared=frozenset({"other"}))
    assert not writer.calls and writer.parts == [{"type": "python", "text": 'weather{"city": "Rome"}'}]
    _, writer, _ = write([*WEATHER, *WEATHER], declared=frozenset({"weather"}), one_call=True)
    assert len(writer.calls) == 1 and writer.stopped
    opened = ids_of(TOKENIZER, ["<|python_start|>", "weather"])
    _, writer, _ = write(['{"city": "Ro'], declared=frozenset({"weather"}), opened=opened)
    assert writer.calls == [("weather", '{"city": "Ro')], "cut off, and given as far as it came"


def test_a_plain_writer_drops_special_tokens_alone():
    assert write([*CALL, "<|bos|>"], plain=True)[0] == "so 3*412 cats 🙂"


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["sat on"], "The cat "),
        (["mat", "cat"], "The "),
        (["T"], ""),
        (["nowhere", "letters.", "the mat and counted 12!"], "The cat sat on the mat and counted 12 letters"),
        (["letters"], "The cat sat on the mat and counted 12 "),
    ],
)
def test_the_text_ends_before_a_stop_string(stops, expected):
    for size in (1, 2, 50):
        text, writer, _ = write(["The cat sat on the mat and counted 12 letters"], size=size, stops=stops)
        assert text == writer.text == expected and writer.stopped == (expected[-7:] != "letters")


@settings(max_examples=60, deadline=None)
@given(
    st.text("The catsonmdu🙂é", max_size=30),
    st.lists(st.text("Thecatson🙂", min_size=1, max_size=4), max_size=3),
    st.integers(1, 9),
)
def test_what_is_given_out_is_the_text_up_to_the_first_stop_whatever_arrives_together(said, stops, size):
    text, writer, given = write([said] if said else [], size=size, scored=True, stops=stops)
    cut = min((place for stop in stops if (place := said.find(stop)) >= 0), default=None)
    # of two stop strings the one that is whole first ends the answer, so it may begin later
    assert text == writer.text and (text == said if cut is None else said.startswith(text) and len(text) >= cut)
    assert writer.stopped == (cut is not None)
    tokens = [token.id for w in given for token in w.tokens]
    assert tokens == ids_of(TOKENIZER, [said] if said else [])[: len(tokens)]
    if cut is None:
        assert TOKENIZER.decode(tokens) == said
    # what is given out never has to be taken back
    assert all(not any(stop in text[:end] for stop in stops) for end in range(len(text) + 1))
