"""Conversations: validation, rendering to ids and loss mask, and the chat template that says the same to transformers."""

SPECIAL_TOKENS = [
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
]  # fmt: skip
PARTS = {"text": None, "python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}
ALPACA = ("instruction", "output")

CHAT_TEMPLATE = (
    "{%- macro plain(text) -%}"
    "{%- for s in [" + ", ".join(repr(t) for t in SPECIAL_TOKENS) + "] -%}{%- if s in text -%}"
    "{{ raise_exception('special token ' ~ s ~ ' inside a message; encode it with nanochat_hf.conversation.render') }}"
    "{%- endif -%}{%- endfor -%}{{ text }}{%- endmacro -%}"
    "{%- set system = messages[0]['content'] ~ '\\n\\n' if messages[0]['role'] == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}"
    "{{ '<|bos|>' }}{%- for m in turns -%}"
    "{%- if m['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
    "{{ raise_exception('roles must alternate user, assistant after an optional system message') }}{%- endif -%}"
    "{%- if m['role'] == 'user' -%}"
    "{{ '<|user_start|>' }}{{ plain((system if loop.first else '') ~ m['content']) }}{{ '<|user_end|>' }}"
    "{%- else -%}{{ '<|assistant_start|>' }}"
    "{%- if m['content'] is string -%}{% generation %}{{ plain(m['content']) }}{{ '<|assistant_end|>' }}{% endgeneration %}"
    "{%- else -%}{%- for p in m['content'] -%}"
    "{%- if p['type'] == 'text' -%}{% generation %}{{ plain(p['text']) }}{% endgeneration %}"
    "{%- elif p['type'] == 'python' -%}{% generation %}{{ '<|python_start|>' }}{{ plain(p['text']) }}{{ '<|python_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ '<|output_start|>' }}{{ plain(p['text']) }}{{ '<|output_end|>' }}{%- endif -%}"
    "{%- endfor -%}{% generation %}{{ '<|assistant_end|>' }}{% endgeneration %}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant_start|>' }}{%- endif -%}"
)


class ConversationError(ValueError):
    """A conversation that cannot be rendered; the message says where and why."""


def validate(conversation, where="conversation"):
    """Check roles and contents; ConversationError names `where`, the fault and the remedy."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ConversationError(f"{where}: no messages; give {{'messages': [{{'role', 'content'}}, …]}}")
    turns = messages[1:] if isinstance(messages[0], dict) and messages[0].get("role") == "system" else messages
    if turns is not messages and not isinstance(messages[0].get("content"), str):
        raise ConversationError(f"{where}: the system message has content of type {type(messages[0].get('content')).__name__}; give text")
    for i, message in enumerate(turns):
        role, expected = message.get("role") if isinstance(message, dict) else None, ("user", "assistant")[i % 2]
        if role != expected:
            raise ConversationError(f"{where}: turn {i + 1} has role {role!r}, must be {expected!r} (user and assistant alternate)")
        content = message.get("content")
        if role == "assistant" and isinstance(content, list):
            wrong = next((part for part in content if not _is_part(part)), None)
            if wrong is not None or not content:
                raise ConversationError(
                    f"{where}: turn {i + 1} has the part {wrong!r:.80}; parts are {{'type': {' | '.join(PARTS)}, 'text'}}"
                )
        elif not isinstance(content, str):
            raise ConversationError(
                f"{where}: turn {i + 1} has content of type {type(content).__name__}; give text (or parts of an assistant)"
            )
    if not turns:
        raise ConversationError(f"{where}: only a system message; add a user's message")


def _is_part(part):
    return isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in PARTS and isinstance(part.get("text"), str)


def encode_plain(tokenizer, text):
    """Ids of `text`, in which the strings of special tokens are ordinary text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


def render(tokenizer, conversation, max_tokens=None):
    """Conversation → (ids, mask), equally long; mask is 1 where the model is to learn, that is on the assistant's own tokens."""
    validate(conversation)
    special = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    ids, mask = [special["<|bos|>"]], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    messages = conversation["messages"]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    for i, message in enumerate(messages[1:] if system else messages):
        if message["role"] == "user":
            text = (system if i == 0 else "") + message["content"]
            add([special["<|user_start|>"], *encode_plain(tokenizer, text), special["<|user_end|>"]], 0)
            continue
        add([special["<|assistant_start|>"]], 0)
        for kind, text in _merged(message["content"]):
            tokens = encode_plain(tokenizer, text)
            if PARTS[kind]:
                tokens = [special[PARTS[kind][0]], *tokens, special[PARTS[kind][1]]]
            add(tokens, int(kind != "python_output"))
        add([special["<|assistant_end|>"]], 1)
    return ids[:max_tokens], mask[:max_tokens]


def _merged(content):
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content:
        if parts and part["type"] == "text" == parts[-1][0]:
            parts[-1] = ("text", parts[-1][1] + part["text"])
        else:
            parts.append((part["type"], part["text"]))
    return parts


def render_prompt(tokenizer, conversation):
    """Ids up to and including assistant_start: the last assistant message, if any, is dropped."""
    validate(conversation)
    messages = conversation["messages"]
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return [*render(tokenizer, {"messages": messages})[0], tokenizer.convert_tokens_to_ids("<|assistant_start|>")]


def convert_row(row, where="row"):
    """A row as messages, a bare list of messages, ShareGPT, prompt/completion or Alpaca → a conversation."""
    if isinstance(row, list):
        return {"messages": row}
    if not isinstance(row, dict):
        raise ConversationError(f"{where}: holds {type(row).__name__}; give an object with messages")
    if "messages" in row:
        return {"messages": row["messages"]}
    if "conversations" in row:
        turns, roles = row["conversations"], {"human": "user", "gpt": "assistant"}
        if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("from"), str) and "value" in t for t in turns):
            raise ConversationError(f"{where}: conversations must be a list of {{'from', 'value'}}")
        return {"messages": [{"role": roles.get(t["from"], t["from"]), "content": t["value"]} for t in turns]}
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):  # lists of messages, as TRL has them
            return {"messages": row["prompt"] + row["completion"]}
        return _pair(row["prompt"], row["completion"])
    if all(column in row for column in ALPACA):
        asked = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(text, str) for text in asked):
            raise ConversationError(f"{where}: instruction and input must be text")
        return _pair("\n\n".join(filter(None, asked)), row["output"])
    raise ConversationError(
        f"{where}: columns {', '.join(map(str, row))}; need messages, conversations, prompt+completion or instruction+output"
    )


def _pair(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
