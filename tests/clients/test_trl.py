"""TRL's own checks of a template for tools, which its trainers make before they take `tools=`."""

import pytest

from nanochat_hf.tokenizer import train_tokenizer

templates = pytest.importorskip("trl.chat_template_utils", reason="trl is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 265)


def test_the_template_passes_the_checks_that_trainers_make(tokenizer):
    assert templates.supports_tool_calling(tokenizer)
    assert templates.is_chat_template_prefix_preserving(tokenizer)
    assert templates.is_chat_template_stop_token_trained(tokenizer)
    assert templates.get_training_chat_template(tokenizer) is None, "nothing to patch"


@pytest.mark.parametrize(
    ("said", "content", "calls"),
    [
        ('<|python_start|>f{"a": 1}<|python_end|><|assistant_end|>', "", [("f", {"a": 1})]),
        ("yes<|assistant_end|>", "yes", []),
    ],
)
def test_completions_are_parsed_and_go_back_into_the_same_tokens(tokenizer, said, content, calls):
    ask = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    message = templates.parse_response(tokenizer, ids, prefix=prompt)
    assert message["content"] == content
    assert [tuple(c["function"].values()) for c in message.get("tool_calls", [])] == calls
    assert tokenizer.apply_chat_template([*ask, message], return_dict=True)["input_ids"] == prompt + ids
