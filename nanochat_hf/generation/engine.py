"""The engine: prompts in, completions out, in batches and as a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.tools.calculator import calculate

from .decoding import Batch, Eager
from .sampling import Sampler, check_sampling, draw_uniforms
from .static import STEPS, Static
from .tools import Calculator, Completion, Row, decode, special_ids

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Settings:
    """How many tokens to generate, and how to sample them; ValueError where that is impossible."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        check_sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )


class Engine:
    """Generates with any causal language model of transformers.

    Tools are called where the tokenizer has nanochat's special tokens. `calculator` takes an expression and returns its
    result or None; where it is None itself, calls stay without an answer.

    `compile` decodes with a static cache through torch.compile: the first call of a shape takes many seconds, later
    ones are fast.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calculator: Calculator | None = calculate,
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.calculator = model, tokenizer, calculator
        self.tools, self.ends = special_ids(tokenizer)
        self.pad = tokenizer.pad_token_id or 0
        self.static = Static(model, self.tools["<|python_end|>"] if calculator else None) if compile else None
        # where decoding is compiled: the tokens that the GPU makes before the host looks at them
        self.steps = STEPS if model.device.type == "cuda" else 1

    def generate(  # noqa: PLR0913 - the settings of generation, each by its name
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_samples: int = 1,
        seed: int | Sequence[int] = 0,
    ) -> list[list[Completion]]:
        """Lists of ids → for each of these prompts `num_samples` completions, which end at assistant_end or bos.

        A prompt is read once, whatever num_samples. Sample j of prompt i depends on seed, i and j. With a list of
        seeds, one a prompt, it depends on the prompt's seed and j: then it is the same in any batch, up to the rounding
        of the kernels.

        Raises ValueError for empty prompts and for impossible settings.
        """
        check_sampling(num_samples=num_samples)
        settings = Settings(max_new_tokens, temperature, top_k, top_p)
        rows = self._rows(len(prompts) * num_samples, max_new_tokens)
        for _ in self._run(prompts, rows, num_samples, seed, self.steps, settings):
            pass
        for row in rows:
            row.out.text = decode(self.tokenizer, row.out.ids)
        return [[row.out for row in rows[i : i + num_samples]] for i in range(0, len(rows), num_samples)]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield the ids of one completion as they come, forced ones too; the end token is not among them."""
        settings = Settings(max_new_tokens, temperature, top_k, top_p)
        (row,) = rows = self._rows(1, max_new_tokens)
        shown = 0
        for _ in self._run([prompt], rows, 1, seed, 1, settings):
            yield from row.out.ids[shown:]
            shown = len(row.out.ids)

    def _rows(self, count: int, limit: int) -> list[Row]:
        return [Row(self.tokenizer, self.calculator, (self.tools, self.ends), limit) for _ in range(count)]

    def _run(
        self,
        prompts: Prompts,
        rows: list[Row],
        samples: int,
        seed: int | Sequence[int],
        steps: int,
        settings: Settings,
    ) -> Iterator[None]:
        """Decode until all `rows` are done; yields after each look at the tokens, `steps` at most apart."""
        if not prompts or not all(prompts):
            raise ValueError("prompts must be non-empty lists of ids; render_prompt gives one")
        limit = settings.max_new_tokens
        uniforms = None
        if settings.temperature:
            uniforms = draw_uniforms(seed, len(prompts), samples, limit).to(self.model.device)
        sampler = Sampler(uniforms, settings.temperature, settings.top_k, settings.top_p)
        # compiled decoding copies the prompts' cache into its own, so that one needs no room
        prefilled = Eager(self.model, prompts, samples, self.pad, 0 if self.static else limit)
        chosen = [[token] for token in sampler(prefilled.logits).tolist()]
        batch: Batch = self.static.begin(prefilled, uniforms, limit) if self.static and limit > 1 else prefilled
        del prefilled  # compiled decoding has its own cache now
        while True:
            for row, tokens in zip(rows, chosen, strict=True):
                for token in tokens:
                    if not row.done:
                        row.take(token)
            yield
            alive = [i for i, row in enumerate(rows) if not row.done]
            if not alive:
                return
            # Dropping rows copies the cache, which costs about as much as one step reads. It pays for an eighth of the
            # rows and more.
            if len(rows) - len(alive) >= max(1, len(rows) // 8) and batch.keep(alive):
                rows = [rows[i] for i in alive]
                sampler.keep(alive)
            chosen = batch.advance(rows, steps, sampler)
