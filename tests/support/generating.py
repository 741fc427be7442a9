"""Prompts, what transformers makes of them, and models with weights that show every path or that call their tool."""

from itertools import pairwise

import torch

PROMPTS = [[1, 5, 9, 12], [3, 4], [7, 8, 9, 10, 11, 12] * 5, [20]]


def shaken(make):
    """make(), with weights that are not zero anywhere."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def reference(model, tokenizer, prompt, new):
    """The greedy ids of transformers' generate, without the end token."""
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    mask = torch.ones(1, len(prompt))
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return [i for i in ids[0, len(prompt) :].tolist() if i not in ends]


def calling(model, tokenizer, monkeypatch, every=5):
    """The model, but it often calls the calculator: some tokens lead to python_start, that to 3*4 and python_end."""
    token = tokenizer.convert_tokens_to_ids
    chain = [token("<|python_start|>"), *tokenizer.encode("3*4", add_special_tokens=False), token("<|python_end|>")]
    push = torch.zeros(280, 280)
    for i in range(0, 256, every):
        push[i, chain[0]] = 100
    for i, j in pairwise(chain):
        push[i] = 0
        push[i, j] = 100
    original = model.forward

    def forward(**kwargs):
        output = original(**kwargs)
        output.logits = output.logits + push[kwargs["input_ids"][:, -1:]]
        return output

    monkeypatch.setattr(model, "forward", forward)
