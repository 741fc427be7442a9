"""Batched sampling with a key/value cache and tool calls (python_start … python_end → calculator → forced output)."""

from collections import deque
from dataclasses import dataclass, field

import torch

from .calculator import calculate


@dataclass
class Completion:
    """Generated `ids`; `forced[i]` is True where the tool, not the model, wrote ids[i]; `text` is their decoding, specials kept."""

    ids: list = field(default_factory=list)
    forced: list = field(default_factory=list)
    text: str = ""


class _Row:
    """The state machine of one row: plain, or collecting an expression, or being forced to take a tool's output."""

    def __init__(self, tokenizer, calculator):
        self.tokenizer, self.calculator = tokenizer, calculator
        self.id = tokenizer.convert_tokens_to_ids
        self.out, self.pending, self.expression, self.done = Completion(), deque(), None, False

    def take(self, token):
        """Accept the model's `token`, or the pending forced one in its place; returns what was taken."""
        forced = bool(self.pending)
        token = self.pending.popleft() if forced else token
        if not forced and token in (self.id("<|assistant_end|>"), self.id("<|bos|>")):
            self.done = True
            return token
        self.out.ids.append(token)
        self.out.forced.append(forced)
        if token == self.id("<|python_start|>"):
            self.expression = []
        elif token == self.id("<|python_end|>") and self.expression is not None:
            result = self.calculator(self.tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                inner = self.tokenizer.encode(result, add_special_tokens=False)
                self.pending.extend([self.id("<|output_start|>"), *inner, self.id("<|output_end|>")])
        elif self.expression is not None:
            self.expression.append(token)
        return token


def sample(logits, generator, temperature, top_k, top_p):
    """Next ids (B,) from logits (B, V): greedy at temperature 0, else from the top_k and the nucleus top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p and top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class Engine:
    """Generates with any causal language model and a tokenizer that has nanochat's special tokens."""

    def __init__(self, model, tokenizer, calculator=calculate):
        self.model, self.tokenizer, self.calculator = model, tokenizer, calculator

    def generate(self, prompts, *, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, num_samples=1, seed=0):
        """prompts: list of id lists → per prompt, num_samples Completions. Rows end at assistant_end or bos."""
        if not prompts or not all(prompts):
            raise ValueError("prompts must be non-empty lists of ids; render_prompt gives one")
        rows = [_Row(self.tokenizer, self.calculator) for _ in prompts for _ in range(num_samples)]
        for _ in self._run([p for p in prompts for _ in range(num_samples)], rows, max_new_tokens, temperature, top_k, top_p, seed):
            pass
        for row in rows:
            row.out.text = self.tokenizer.decode(row.out.ids)
        return [[row.out for row in rows[i : i + num_samples]] for i in range(0, len(rows), num_samples)]

    def stream(self, prompt, *, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, seed=0):
        """Yield the ids of one completion as they come, forced ones too; the end token is not among them."""
        row = _Row(self.tokenizer, self.calculator)
        for tokens in self._run([prompt], [row], max_new_tokens, temperature, top_k, top_p, seed):
            if not row.done:
                yield tokens[0]

    @torch.inference_mode()
    def _run(self, prompts, rows, max_new_tokens, temperature, top_k, top_p, seed):
        device, longest, pad = self.model.device, max(map(len, prompts)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B, T), padded on the left
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        generator, cache, inputs = torch.Generator(device).manual_seed(seed), None, ids
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            out = self.model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            chosen = sample(out.logits[:, -1], generator, temperature, top_k, top_p).tolist()
            taken = [pad if row.done else row.take(token) for row, token in zip(rows, chosen, strict=True)]
            yield taken
            if all(row.done for row in rows):
                return
            inputs = torch.tensor(taken, device=device)[:, None]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
