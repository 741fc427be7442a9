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


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def test_grpo_trains_with_tools(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    pytest.importorskip("jmespath", reason="jmespath, which TRL's tools need, is not installed")
    from datasets import Dataset

    from nanochat_hf import NanochatForCausalLM
    from scripts.clients.tiny_folder import main

    main([str(tmp_path / "model")])
    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=8,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    seen = []

    def reward(prompts, completions, **given):
        seen.extend(completions)
        return [float(i) for i in range(len(completions))]

    rows = [{"prompt": [{"role": "user", "content": "the cat"}]} for _ in range(4)]
    model = NanochatForCausalLM.from_pretrained(tmp_path / "model")
    trainer = trl.GRPOTrainer(model, reward, args=config, train_dataset=Dataset.from_list(rows), tools=[add])
    trainer.train()
    assert trainer.state.global_step == 1 and len(seen) == 2 and all(said[0]["role"] == "assistant" for said in seen)
