"""A data set as training uses it, published.

Validated conversations or text, tokenised beside it, in parquet shards with a card.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData

from nanochat_hf.conversation import SPECIAL_TOKENS, encode_plain, render
from nanochat_hf.data.conversations import conversations
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import Texts
from nanochat_hf.data.weights import factor_of, token_factors

from .card import KEEP_END, KEEP_START, WRITTEN, kept_text, public

SHARD_BYTES = 500_000_000  # the size that the Hub's own viewer and the streaming readers like best


def tokenised_rows(
    source: SourceConfig, tokenizer: Any = None, *, kind: str = "chat", text_column: str = "text"
) -> Iterator[dict[str, Any]]:
    """Rows of `source` (SourceConfig) for publishing.

    chat: {"messages": […]} and, with a tokenizer, "input_ids" and "assistant_masks" (1 where the assistant's own tokens
    are), equally long. text: {"text": …} and "input_ids", which begin with <|bos|>. ValueError names a malformed row or
    a missing column.
    """
    if kind == "chat":
        for converted in conversations(source):
            row: dict[str, Any] = {"messages": published(converted.conversation["messages"])}
            if converted.conversation.get("tools"):
                row["tools"] = converted.conversation["tools"]
            if tokenizer:
                ids, mask = render(tokenizer, converted.conversation)
                if converted.weights is not None:
                    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
                    factors = token_factors(np.array(ids), special, converted.weights)
                    mask = [int(learned and factor > 0) for learned, factor in zip(mask, factors, strict=True)]
                row["input_ids"], row["assistant_masks"] = ids, mask
            yield row
        return
    for text in Texts(source, text_column):
        entry: dict[str, Any] = {"text": text}
        if tokenizer:
            entry["input_ids"] = [tokenizer.bos_token_id, *encode_plain(tokenizer, text)]
        yield entry


def published(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the keys that training reads.

    Role, content, a tool's, and weight where a message has one or `train`.
    """
    rows = []
    for message in messages:
        row = {"role": message["role"], "content": message["content"]}
        row |= {key: message[key] for key in ("tool_calls", "tool_call_id") if message.get(key) is not None}
        if message.get("weight") is not None or message.get("train") is not None:
            row["weight"] = factor_of(message, "row")
        rows.append(row)
    return rows


def write_dataset(splits, folder, *, shard_bytes=SHARD_BYTES):
    """{"train": rows, …} → folder/data/SPLIT-00000-of-00001.parquet …; returns {split: {"rows", "tokens", "trained"}}.

    Documents are taken one shard at a time; conversations are held in memory, as training holds them. ValueError for an
    empty split.
    """
    data = Path(folder) / "data"
    data.mkdir(parents=True)
    return {split: _write_split(split, iter(rows), data, shard_bytes) for split, rows in splits.items()}


def _write_split(split, rows, data, shard_bytes):
    from datasets import Dataset

    first = next(rows, None)
    if first is None:
        raise ValueError(f"{split}: no rows to publish; check the source's start and rows")
    rows = chain([first], rows)
    if "messages" in first:
        rows = list(rows)
    features, count, shard, size, shards = _features(first, rows), {"rows": 0, "tokens": 0, "trained": 0}, [], 0, []

    def close():
        shards.append(data / f"{split}-{len(shards):05d}.parquet")
        Dataset.from_list(shard, features=features).to_parquet(shards[-1])

    for row in rows:
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
    for path in shards:  # the names that the Hub's own tools give, with the number of shards
        path.rename(path.with_stem(f"{path.stem}-of-{len(shards):05d}"))
    return count


def _features(first, rows):
    """The same columns for every shard, whatever its rows happen to hold."""
    from datasets import Features, List, Value

    columns: dict[str, Any] = {"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8"))}
    columns["text"] = Value("string")
    names = list(first)
    if "messages" in first:
        # contents are text or parts with tool calls; Arrow has no such union, datasets keeps it as JSON
        said = [message for row in rows for message in row["messages"]]
        mixed = any(isinstance(message["content"], list) for message in said)
        calls = any("tool_calls" in message or "tool_call_id" in message for message in said)
        tools = any("tools" in row for row in rows)
        if mixed or calls or tools:
            from datasets import Json  # not in the oldest version that training runs with
        message = {"role": Value("string"), "content": Json() if mixed else Value("string")}
        if any("weight" in m for m in said):
            message["weight"] = Value("float64")
        columns["messages"] = List(Json() if calls else message)
        if tools:
            columns["tools"] = List(Json())
            names = [*dict.fromkeys([*names, "tools"])]
    return Features({name: columns[name] for name in names})


def dataset_card(repo_id, counts, *, kind, tokenizer_name=None, sources=(), license=None, language=None, existing=None):
    """The card as a string; text between the marks, licence and language of the `existing` card stay."""
    own = DatasetCard(existing, ignore_metadata_errors=True).data.to_dict() if existing else {}
    data = DatasetCardData(
        license=license or own.get("license") or "other",
        language=language or own.get("language") or "en",
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
    if tokenizer_name:
        columns += f"; `input_ids` by the tokenizer {public(tokenizer_name)}"
        columns += (
            ", `assistant_masks`: 1 on the tokens that the assistant says"
            if kind == "chat"
            else ", beginning with `<|bos|>`"
        )
    made_of = f"\n\nMade of: {', '.join(f'`{public(s)}`' for s in sources)}." if sources else ""
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
