"""Publish a data set as training uses it.

The rows are checked conversations or text, optionally with their token ids, in parquet shards with a card.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from transformers import PreTrainedTokenizerFast

from nanochat_hf.conversation import SPECIAL_TOKENS, encode_plain, render
from nanochat_hf.data.conversations import conversations
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import Texts
from nanochat_hf.data.weights import factor_of, token_factors

from .card import KEEP_END, KEEP_START, WRITTEN, kept_text, public

if TYPE_CHECKING:  # datasets takes a second to import
    from datasets import Features

SHARD_BYTES = 500_000_000  # the size that the Hub's own viewer and the streaming readers like best
PublishedRow = dict[str, Any]


class SplitCount(TypedDict):
    """What one split holds: rows, tokens, and tokens that training learns. The last two are 0 without a tokenizer."""

    rows: int
    tokens: int
    trained: int


@dataclass(frozen=True)
class SetFacts:
    """What the card of a data set says beside its counts.

    `kind` is chat or text, `sources` are the paths or tasks that the rows come from. Without `license` or `language`
    the present card's value stays.
    """

    kind: str
    tokenizer_name: str | None = None
    sources: Sequence[str] = ()
    license: str | None = None
    language: str | None = None


def tokenised_rows(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    kind: str = "chat",
    text_column: str = "text",
) -> Iterator[PublishedRow]:
    """The rows of `source` for publishing.

    With kind "chat" a row is {"messages": […]}. A tokenizer adds "input_ids" and "assistant_masks", which are equally
    long; the mask is 1 on the assistant's own tokens. With kind "text" a row is {"text": …}. A tokenizer adds
    "input_ids", which begin with <|bos|>. ValueError names a malformed row or a missing column.
    """
    if kind == "chat":
        for converted in conversations(source):
            row: PublishedRow = {"messages": published(converted.conversation["messages"])}
            if converted.conversation.get("tools"):
                row["tools"] = converted.conversation["tools"]
            if tokenizer:
                ids, mask = render(tokenizer, converted.conversation)
                if converted.weights is not None:
                    special = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL_TOKENS}
                    factors = token_factors(np.array(ids), special, converted.weights)
                    mask = [int(learned and factor > 0) for learned, factor in zip(mask, factors, strict=True)]
                row["input_ids"], row["assistant_masks"] = ids, mask
            yield row
        return
    for text in Texts(source, text_column):
        entry: PublishedRow = {"text": text}
        if tokenizer:
            entry["input_ids"] = [tokenizer.bos_token_id, *encode_plain(tokenizer, text)]
        yield entry


def published(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the keys that training reads, and no others.

    These are role and content, tool_calls and tool_call_id where a message has them, and one weight where a message has
    `weight` or `train`.
    """
    rows = []
    for message in messages:
        row = {"role": message["role"], "content": message["content"]}
        row |= {key: message[key] for key in ("tool_calls", "tool_call_id") if message.get(key) is not None}
        if message.get("weight") is not None or message.get("train") is not None:
            row["weight"] = factor_of(message, "row")
        rows.append(row)
    return rows


def write_dataset(
    splits: Mapping[str, Iterable[PublishedRow]], folder: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> dict[str, SplitCount]:
    """Write the rows of each split to folder/data/SPLIT-00000-of-00001.parquet and so on; returns what each holds.

    Documents are held one shard at a time; conversations are all held in memory, as in training. ValueError for a split
    without rows.
    """
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    return {split: _write_split(split, iter(rows), data, shard_bytes) for split, rows in splits.items()}


def _write_split(split: str, rows: Iterator[PublishedRow], data: Path, shard_bytes: int) -> SplitCount:
    from datasets import Dataset

    first = next(rows, None)
    if first is None:
        raise ValueError(f"{split}: no rows to publish; check the source's start and rows")
    every: Iterable[PublishedRow] = chain([first], rows)
    if "messages" in first:
        every = list(every)
    features = _features(first, every)
    count: SplitCount = {"rows": 0, "tokens": 0, "trained": 0}
    shard: list[PublishedRow] = []
    size = 0
    shards: list[Path] = []

    def close() -> None:
        shards.append(data / f"{split}-{len(shards):05d}.parquet")
        Dataset.from_list(shard, features=features).to_parquet(shards[-1])

    for row in every:
        shard.append(row)
        size += len(str(row.get("messages") or row.get("text"))) + 5 * len(row.get("input_ids", ()))
        count["rows"] += 1
        count["tokens"] += len(row.get("input_ids", ()))
        count["trained"] += sum(row.get("assistant_masks", ()))
        if size >= shard_bytes:
            close()
            shard, size = [], 0
    if shard:
        close()
    for path in shards:  # the Hub's own tools put the number of shards into each name
        path.rename(path.with_stem(f"{path.stem}-of-{len(shards):05d}"))
    return count


def _features(first: PublishedRow, rows: Iterable[PublishedRow]) -> "Features":
    """The columns that every shard has, whatever its own rows hold; `rows` are read where they are conversations."""
    from datasets import Features, List, Value

    columns: dict[str, Any] = {"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8"))}
    columns["text"] = Value("string")
    names = list(first)
    if "messages" in first:
        # A content is text or a list of parts. Arrow has no type for either of two, so datasets stores it as JSON
        said = [message for row in rows for message in row["messages"]]
        mixed = any(isinstance(message["content"], list) for message in said)
        calls = any("tool_calls" in message or "tool_call_id" in message for message in said)
        tools = any("tools" in row for row in rows)
        if mixed or calls or tools:
            from datasets import Json  # not in the oldest version that training runs with
        message: dict[str, Any] = {"role": Value("string"), "content": Json() if mixed else Value("string")}
        if any("weight" in m for m in said):
            message["weight"] = Value("float64")
        columns["messages"] = List(Json() if calls else message)
        if tools:
            columns["tools"] = List(Json())
            names = [*dict.fromkeys([*names, "tools"])]
    return Features({name: columns[name] for name in names})


def dataset_card(repo_id: str, counts: Mapping[str, SplitCount], facts: SetFacts, existing: str | None = None) -> str:
    """The text of the card; of the `existing` one, the text between the marks, licence and language stay."""
    own = DatasetCard(existing, ignore_metadata_errors=True).data.to_dict() if existing else {}
    kind = facts.kind
    data = DatasetCardData(
        license=facts.license or own.get("license") or "other",
        language=facts.language or own.get("language") or "en",
        task_categories=["text-generation"],
        tags=["nanochat", "nanochat_hf", kind],
        configs=[
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*.parquet"} for s in counts]}
        ],
    )
    lines = [f"| {s} | {c['rows']:,} | {c['tokens']:,} | {c['trained']:,} |" for s, c in counts.items()]
    script = f"accelerate launch -m scripts.chat_sft --model MODEL --data {repo_id} --output-dir runs/sft"
    if kind == "text":
        script = (
            f"accelerate launch -m scripts.base_train --tokenizer TOKENIZER --data {repo_id} --output-dir runs/base"
        )
    columns = {
        "chat": "`messages`: role and content, where an assistant's content may be parts with tool calls",
        "text": "`text`",
    }[kind]
    if facts.tokenizer_name:
        columns += f"; `input_ids` by the tokenizer {public(facts.tokenizer_name)}"
        columns += (
            ", `assistant_masks`: 1 on the tokens that the assistant says"
            if kind == "chat"
            else ", beginning with `<|bos|>`"
        )
    made_of = f"\n\nMade of: {', '.join(f'`{public(s)}`' for s in facts.sources)}." if facts.sources else ""
    return f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

{KEEP_START}
{kept_text(existing)}
{KEEP_END}

{WRITTEN}

{"Conversations" if kind == "chat" else "Documents"} as nanochat_hf trains on them. Columns: {columns}.{made_of}

| split | rows | tokens | trained tokens |
| --- | --- | --- | --- |
{chr(10).join(lines)}

Train on it by name:

```bash
{script}
```
"""
