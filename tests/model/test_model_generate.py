"""transformers' generate(): caches, padding, beams, assistants, constraints, compiling, pipelines, streaming."""

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation import GenerateDecoderOnlyOutput

from nanochat_hf.conversation import SPECIAL_TOKENS
from nanochat_hf.model import NanochatForCausalLM
from nanochat_hf.model.ops_nanochat_hf import norm
from nanochat_hf.tokenizer import train_tokenizer
from tests.support.models import LATER, SIZES, build, tokens

# 10 tokens of prompt and 30 new ones: windows are 9 keys, max_position_embeddings is 16
LONG = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module", params=["value embeddings", "none", "later parts"])
def model(request):
    return build(**LATER) if request.param == "later parts" else build(use_value_embeddings=request.param != "none")


@pytest.fixture
def prompt():
    ids = tokens(2, 10)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture
def greedy(model, prompt):
    """Without any cache: each token from a whole forward pass."""
    ids = prompt["input_ids"]
    for _ in range(30):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def test_greedy_is_the_same_with_every_cache_and_without(model, prompt, greedy):
    assert torch.equal(model.generate(**prompt, **LONG), greedy)
    assert torch.equal(model.generate(**prompt, **LONG, use_cache=False), greedy)
    for kind in ("static", "dynamic"):
        assert torch.equal(model.generate(**prompt, **LONG, cache_implementation=kind, disable_compile=True), greedy), (
            kind
        )
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=64),
    ):
        assert torch.equal(model.generate(**prompt, **LONG, past_key_values=cache, disable_compile=True), greedy)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_prefill_in_chunks_is_one_prefill(model, prompt, greedy, size):
    assert torch.equal(model.generate(**prompt, **LONG, prefill_chunk_size=size), greedy)
    cache, pieces = DynamicCache(config=model.config), []
    for part in tokens(2, 40).split(7, 1):  # longer than the windows and than max_position_embeddings
        pieces.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens(2, 40), use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_embeddings_start_generation_only_where_no_value_embedding_needs_ids(model, prompt, greedy):
    embedded = dict(
        inputs_embeds=model.model.embed_tokens(prompt["input_ids"]), attention_mask=prompt["attention_mask"]
    )
    if model.config.use_value_embeddings:
        with pytest.raises(ValueError, match="value embeddings are looked up by id"):
            model.generate(**embedded, **LONG)
    else:
        assert torch.equal(model.generate(**embedded, **LONG), greedy[:, 10:])


def test_generation_goes_on_from_a_cache(model, prompt, greedy):
    first = model.generate(**prompt, **LONG | dict(max_new_tokens=12), return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    rest = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **LONG | dict(max_new_tokens=18)
    )
    assert torch.equal(rest, greedy)


def test_scores_attentions_and_hidden_states_come_out(prompt):
    model = build(attn_implementation="eager")
    out = model.generate(
        **prompt,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert type(out) is GenerateDecoderOnlyOutput and len(out.scores) == len(out.logits) == 4
    assert (
        len(out.attentions) == len(out.hidden_states) == 4
        and len(out.attentions[0]) == 4
        and len(out.hidden_states[0]) == 5
    )
    assert out.attentions[0][0].shape == (2, 4, 10, 10) and out.attentions[3][3].shape == (2, 4, 1, 13)
    assert out.attentions[3][0].shape[-1] == 9  # a window's cache holds no more
    assert out.hidden_states[1][0].shape == (2, 1, 64)
    whole = model(out.sequences[:, :-1]).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_sampling_is_repeatable_and_takes_the_usual_settings(model, prompt):
    def sample(**settings):
        torch.manual_seed(3)
        return model.generate(**prompt, do_sample=True, max_new_tokens=20, eos_token_id=None, **settings)

    settings = dict(temperature=0.7, top_k=10, top_p=0.8, min_p=0.01, repetition_penalty=1.1, num_return_sequences=3)
    assert sample(**settings).shape == (6, 30) and torch.equal(sample(**settings), sample(**settings))
    assert torch.equal(sample(top_k=1), model.generate(**prompt, **LONG | dict(max_new_tokens=20)))
    free, uncached = sample(temperature=1.3, top_k=0), sample(temperature=1.3, top_k=0, use_cache=False)
    assert torch.equal(free, uncached) and (free < 100).all()


def test_beams_find_at_least_what_greedy_finds_and_do_not_mix(model, prompt):
    options = dict(max_new_tokens=20, eos_token_id=None, do_sample=False)

    def score(sequences):
        nll = -model(sequences).logits[:, 9:-1].log_softmax(-1).gather(-1, sequences[:, 10:, None]).sum((1, 2))
        return -nll

    beams = model.generate(**prompt, num_beams=4, **options)
    # in all: for a single row four beams may lose the path that greedy takes
    assert score(beams).sum() >= score(model.generate(**prompt, **options)).sum() - 1e-4
    assert torch.equal(model.generate(**prompt, num_beams=4, use_cache=False, **options), beams)
    for row in range(2):
        alone = model.generate(**{n: t[row : row + 1] for n, t in prompt.items()}, num_beams=4, **options)
        assert torch.equal(alone[0], beams[row])
    assert model.generate(**prompt, num_beams=4, num_return_sequences=3, **options | dict(do_sample=True)).shape == (
        6,
        30,
    )


def test_left_padding_changes_nothing_for_any_cache(model):
    prompts = [tokens(1, n, n) for n in (3, 12, 20)]
    ids = torch.cat([torch.nn.functional.pad(p, (20 - p.shape[1], 0), value=3) for p in prompts])
    mask = (torch.arange(20) >= 20 - torch.tensor([[3], [12], [20]])).long()
    short = dict(max_new_tokens=12)
    for options in (
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3} | short,
        {"prefill_chunk_size": 6} | short,
    ):
        together = model.generate(ids, attention_mask=mask, **LONG | options)[:, 20:]
        for p, row in zip(prompts, together, strict=True):
            # prompts in chunks of one size would themselves begin with another chunk
            alone = model.generate(
                p, attention_mask=torch.ones_like(p), **LONG | {k: v for k, v in options.items() if "chunk" not in k}
            )
            assert torch.equal(alone[0, p.shape[1] :], row), options


def test_assisted_generation_says_what_greedy_says(model, prompt):
    one = {name: t[:1] for name, t in prompt.items()}
    expected = model.generate(**one, **LONG)
    torch.manual_seed(5)
    small = NanochatForCausalLM(type(model.config)(**SIZES | dict(num_hidden_layers=1))).eval()
    for helper in (dict(assistant_model=model), dict(assistant_model=small), dict(prompt_lookup_num_tokens=3)):
        assert torch.equal(model.generate(**one, **LONG, **helper), expected), helper


def test_the_layers_that_run_are_as_many_as_the_config_says(model, prompt):
    """transformers shortens num_hidden_layers for a draft by the first layers (assistant_early_exit)."""
    ids, layers = prompt["input_ids"], model.config.num_hidden_layers
    stream = model(ids, output_hidden_states=True).hidden_states[2]
    model.config.num_hidden_layers = 2
    try:
        exited = model.model(ids).last_hidden_state
    finally:
        model.config.num_hidden_layers = layers
    torch.testing.assert_close(exited, norm(stream, model.config.rms_norm_eps))


def test_constraints_are_kept(model, prompt):
    allowed = [5, 17, 42]
    bound = model.generate(**prompt, **LONG, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert set(bound[:, 10:].flatten().tolist()) <= set(allowed)
    with_beams = model.generate(
        **prompt, **LONG, num_beams=3, prefix_allowed_tokens_fn=lambda row, ids: [allowed[row], 60]
    )
    assert set(with_beams[0, 10:].tolist()) <= {5, 60} and set(with_beams[1, 10:].tolist()) <= {17, 60}

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert (
                scores.shape[-1] == 100 and scores.dtype == torch.float32
            )  # cut to the vocabulary: no padding row can be chosen
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    forced = model.generate(**prompt, **LONG, logits_processor=LogitsProcessorList([Only()]))
    assert (forced[:, 10:] == 7).all()
    banned = model.generate(
        **prompt, **LONG, bad_words_ids=[[t] for t in range(50)], no_repeat_ngram_size=2, min_new_tokens=5
    )
    assert (banned[:, 10:] >= 50).all()


def test_decoding_over_a_static_cache_is_compiled_whole_and_not_per_token(prompt):
    model, graphs = build(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = CompileConfig(fullgraph=True, mode=None, backend=count)
    compiled._compile_all_devices = True
    out = model.generate(**prompt, **LONG, cache_implementation="static", compile_config=compiled)
    assert torch.equal(out, model.generate(**prompt, **LONG))
    # transformers' windowed static cache counts in Python: one graph for the first token, one for all others
    assert 1 <= len(graphs) <= 3, f"30 tokens took {len(graphs)} compilations"


@pytest.mark.slow
def test_inductor_decodes_what_eager_decodes(prompt):
    torch.compiler.reset()
    compiled = CompileConfig(fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    model = build()
    out = model.generate(**prompt, **LONG, cache_implementation="static", compile_config=compiled)
    assert torch.equal(out, model.generate(**prompt, **LONG))


@pytest.mark.slow
def test_continuous_batching_over_a_paged_cache_says_what_greedy_says(prompt):
    model = build()
    settings = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=3)
    prompts = [*prompt["input_ids"].tolist(), tokens(1, 5, 9)[0].tolist()]
    out = model.generate_batch(inputs=prompts, generation_config=settings)
    for row, answer in zip((0, 1), out.values(), strict=False):
        alone = model.generate(**{n: t[row : row + 1] for n, t in prompt.items()}, **LONG)
        assert answer.generated_tokens == alone[0, 10:].tolist()
    assert len(out) == 3


# With text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of 300 tokens with its tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_tokenizer(
        ["The cat sat on the mat, and it counted 12 letters; then the other cat sat there."] * 4, 300
    )
    ids = {
        name: tokenizer.convert_tokens_to_ids(t)
        for name, t in zip(("bos", "eos", "pad"), SPECIAL_TOKENS[::4], strict=True)
    }
    model = build(vocab_size=300, bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pipeline_answers_chat_messages_and_batches_of_text(folder):
    chat = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(chat.model) is NanochatForCausalLM
    messages = [{"role": "user", "content": "the cat"}]
    answer = chat(messages, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert answer[0] == messages[0] and answer[1]["role"] == "assistant" and isinstance(answer[1]["content"], str)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    direct = chat.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer[1]["content"] == tokenizer.decode(direct, skip_special_tokens=True)
    texts = ["the cat", "the other cat sat on the mat"]
    together = chat(texts, batch_size=2, max_new_tokens=12, do_sample=False)
    assert together == [chat(t, max_new_tokens=12, do_sample=False) for t in texts]


def test_streaming_yields_the_answer_piece_by_piece(folder):
    from threading import Thread

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = NanochatForCausalLM.from_pretrained(folder)
    ids = tokenizer("<|bos|>the cat", return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=model.generate, kwargs=dict(**ids, **LONG, streamer=streamer))
    thread.start()
    pieces = list(streamer)
    thread.join()
    whole = model.generate(**ids, **LONG)[0, ids["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(whole) and len([p for p in pieces if p]) > 3
