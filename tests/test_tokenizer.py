"""The tokenizer: what its folder keeps, how it splits, and what of other folders is refused."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanochat_hf.conversation import CHAT_TEMPLATE, SPECIAL_TOKENS
from nanochat_hf.tokenizer import load_tokenizer, token_bytes, train_tokenizer

TEXT = ["It's 2026, and we'll count 123456 words; naïve café 🙂 in two lines.\r\n\r\nAnd   spaces."] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 290, max_length=512)


def test_specials_take_the_last_ids_in_order_and_serve_as_bos_eos_pad(tokenizer):
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == list(range(281, 290)) and len(tokenizer) == 290
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<|bos|>", "<|assistant_end|>", "<|output_end|>"]


def test_a_saved_folder_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.get_vocab() == tokenizer.get_vocab() and again.model_max_length == 512 and again.chat_template == CHAT_TEMPLATE
        assert again(TEXT[0])["input_ids"] == tokenizer(TEXT[0])["input_ids"]
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (281, 285, 289)


def test_the_pattern_keeps_two_digits_words_and_line_ends_apart(tokenizer):
    def pieces(text):
        return ["".join(text[a:b]) for _, (a, b) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("12345") == ["12", "34", "5"]
    assert pieces("it's we'LL") == ["it", "'s", " we", "'LL"]
    assert pieces("a  b\n\nc !?\n") == ["a", " ", " b", "\n\n", "c", " !?\n"]


def test_token_bytes_counts_raw_bytes_of_invalid_utf8_too(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (290,) and (sizes[:256] == 1).all() and (sizes[281:] == 0).all()
    merges = tokenizer.convert_ids_to_tokens(list(range(256, 281)))
    assert sizes[256:281].tolist() == [len(m) for m in merges] and min(map(len, merges)) > 1


def test_same_text_same_tokenizer():
    assert train_tokenizer(TEXT, 280).backend_tokenizer.to_str() == train_tokenizer(TEXT, 280).backend_tokenizer.to_str()


def test_too_little_text_and_foreign_folders_say_why(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="yields only .* of vocab_size=5000; give more text"):
        train_tokenizer(TEXT, 5000)
    with pytest.raises(ValueError, match="none: cannot be loaded.*scripts.tok_train"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "other").mkdir()
    foreign = PreTrainedTokenizerFast(tokenizer_object=_without_specials(tokenizer))
    foreign.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: lacks <\|bos\|>"):
        load_tokenizer(tmp_path / "other")


def _without_specials(tokenizer):
    import json

    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}))
