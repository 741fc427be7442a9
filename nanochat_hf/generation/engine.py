"""The engine: prompts in, completions out, in batches and as a stream."""

from nanochat_hf.tools.calculator import calculate

from .decoding import Eager
from .sampling import Sampler, check_sampling, draw_uniforms
from .static import STEPS, Static
from .tools import Row, special_ids


class Engine:
    """Generates with any causal language model of transformers; tool calls where its tokenizer has nanochat's special tokens.

    `compile` decodes with a static cache through torch.compile: the first call of a shape takes many seconds, later ones are fast.
    `calculator`: expression → result or None; None in its place leaves the tool alone, so that calls stay without an answer.
    """

    def __init__(self, model, tokenizer, calculator=calculate, compile=False):
        self.model, self.tokenizer, self.calculator = model, tokenizer, calculator
        self.tools, self.ends = special_ids(tokenizer)
        self.pad = tokenizer.pad_token_id or 0
        self.static = Static(model, self.tools["<|python_end|>"] if calculator else None) if compile else None
        self.steps = (
            STEPS if model.device.type == "cuda" else 1
        )  # tokens between two looks of the host, where decoding is compiled

    def generate(self, prompts, *, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, num_samples=1, seed=0):
        """prompts: list of id lists → per prompt, num_samples Completions. Rows end at assistant_end or bos.

        The prompts are read once, whatever num_samples. Sample j of prompt i depends on seed, i and j; with a list of seeds, one a
        prompt, on that prompt's seed and j: then it is the same in any batch, up to the rounding of the kernels. ValueError for
        empty prompts and for settings that cannot be.
        """
        settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        check_sampling(**settings, num_samples=num_samples)
        rows = self._rows(len(prompts) * num_samples, max_new_tokens)
        for _ in self._run(prompts, rows, num_samples, seed, self.steps, **settings):
            pass
        for row in rows:
            row.out.text = self.tokenizer.decode(row.out.ids)
        return [[row.out for row in rows[i : i + num_samples]] for i in range(0, len(rows), num_samples)]

    def stream(self, prompt, *, max_new_tokens=256, temperature=0.0, top_k=None, top_p=None, seed=0):
        """Yield the ids of one completion as they come, forced ones too; the end token is not among them."""
        settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        check_sampling(**settings)
        (row,) = rows = self._rows(1, max_new_tokens)
        shown = 0
        for _ in self._run([prompt], rows, 1, seed, 1, **settings):
            yield from row.out.ids[shown:]
            shown = len(row.out.ids)

    def _rows(self, count, limit):
        return [Row(self.tokenizer, self.calculator, (self.tools, self.ends), limit) for _ in range(count)]

    def _run(self, prompts, rows, samples, seed, steps, *, max_new_tokens, temperature, top_k, top_p):
        """Decode until all `rows` are done; yields after each look at the tokens, `steps` at most apart."""
        if not prompts or not all(prompts):
            raise ValueError("prompts must be non-empty lists of ids; render_prompt gives one")
        uniforms = (
            draw_uniforms(seed, len(prompts), samples, max_new_tokens).to(self.model.device) if temperature else None
        )
        sampler = Sampler(uniforms, temperature, top_k, top_p)
        # compiled decoding copies the cache into its own
        batch = Eager(self.model, prompts, samples, self.pad, 0 if self.static else max_new_tokens)
        chosen = [[token] for token in sampler(batch.logits).tolist()]
        if self.static and max_new_tokens > 1:
            batch = self.static.begin(batch, uniforms, max_new_tokens)
        while True:
            for row, tokens in zip(rows, chosen, strict=True):
                for token in tokens:
                    if not row.done:
                        row.take(token)
            yield
            alive = [i for i, row in enumerate(rows) if not row.done]
            if not alive:
                return
            # leaving copies the cache, which about one step of reading it pays for: not for less than an eighth of the rows
            if len(rows) - len(alive) >= max(1, len(rows) // 8) and batch.keep(alive):
                rows = [rows[i] for i in alive]
                sampler.keep(alive)
            chosen = batch.advance(rows, steps, sampler)
