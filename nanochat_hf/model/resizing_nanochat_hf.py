"""Tables with a row for each token: how many rows they have, and what `resize_token_embeddings` does to them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .configuration_nanochat_hf import NanochatConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model  # what this class is mixed into
else:
    Model = object


def table_rows(config: NanochatConfig) -> int:
    """Rows of the tables: the vocabulary, rounded up to a multiple of `pad_vocab_to_multiple_of`."""
    multiple = config.pad_vocab_to_multiple_of
    return -(-config.vocab_size // multiple) * multiple


def set_rows(table: nn.Module, rows: int) -> None:
    """Keep the first `rows` rows of an embedding or head, or add rows of zeros."""
    weight: Any = table.weight
    old = weight.detach()
    new = old.new_zeros(rows, old.shape[1])
    new[: len(old)] = old[:rows]
    table.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    setattr(table, "num_embeddings" if isinstance(table, nn.Embedding) else "out_features", rows)


class ResizableTables(Model):
    """`resize_token_embeddings` for embedding, value embeddings and head, as far as the model has them."""

    if TYPE_CHECKING:
        config: NanochatConfig

    def _value_tables(self) -> list[nn.Embedding]:
        base: Any = self.base_model
        return list(base.value_embeds.values())

    def tables(self) -> list[Any]:
        """The embedding, the head if there is one, and the value embeddings."""
        found = (self.get_input_embeddings(), self.get_output_embeddings(), *self._value_tables())
        return [table for table in found if table is not None]

    def pad_tables(self, multiple: int) -> None:
        """Round the rows of all tables up to a multiple; 1 cuts them to the vocabulary. No token's row changes.

        Training pads, because matrix kernels are faster then. A published model has exactly `vocab_size` rows.
        """
        self.config.pad_vocab_to_multiple_of = multiple
        for table in self.tables():
            set_rows(table, table_rows(self.config))

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        # transformers calls this. The padding is removed first: transformers takes each row for a token.
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        if new_num_tokens is not None and new_num_tokens < 1:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} must be positive: give the number of tokens of the tokenizer"
            )
        tokens, value_tables = self.config.vocab_size, self._value_tables()
        self.pad_tables(1)
        embedding = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for table in value_tables:
            trained = table.weight.requires_grad
            resized = self._get_resized_embeddings(table, embedding.num_embeddings, mean_resizing=mean_resizing)
            resized.requires_grad_(trained)
        head: Any = self.get_output_embeddings()
        if head is not None:
            head.init_scheme = "head"  # transformers has made a new layer
        if not mean_resizing:  # transformers initialises all tables alike; here each has its own distribution
            for table in self.tables():
                old = table.weight.detach().clone()
                self._init_weights(table)
                with torch.no_grad():
                    table.weight[:tokens] = old[:tokens]
        return embedding
