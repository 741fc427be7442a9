"""Talk to a model: python -m scripts.chat_cli --model DIR [-p "one question"]"""

import argparse
import sys

import torch

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import user_errors
from nanochat_hf.conversation import render_prompt
from nanochat_hf.generation import Engine
from nanochat_hf.tokenizer import load_tokenizer


@user_errors
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("-p", "--prompt", help="answer this and exit")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=50, help="sample among so many tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model)
    model = NanochatForCausalLM.from_pretrained(args.model).eval()
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    engine, messages = Engine(model, tokenizer), []
    if args.prompt is not None:
        answer(engine, args, [{"role": "user", "content": args.prompt}])
        return
    print("Ask. /clear forgets the conversation, /quit leaves.")
    for line in iter(lambda: input("> "), "/quit"):
        if line == "/clear":
            messages = []
        elif line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": answer(engine, args, messages)})


def answer(engine, args, messages):
    """Stream the answer to `messages`; returns its text."""
    prompt, shown, ids = render_prompt(engine.tokenizer, {"messages": messages}), "", []
    for token in engine.stream(prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k):
        ids.append(token)
        text = engine.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an unfinished character waits for its other bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(file=sys.stdout)
    return shown


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
