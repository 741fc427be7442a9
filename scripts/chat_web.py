"""Talk to a model in the browser: python -m scripts.chat_web --model DIR. Needs the extra: pip install 'nanochat_hf[web]'"""

import argparse
from collections import OrderedDict

from nanochat_hf.config import user_errors
from nanochat_hf.generation import check_sampling
from scripts.chat_cli import Chat, add_model_arguments, load_chat, show

REMEMBERED = 10_000  # answers whose ids the page can take up again


class Answers:
    """Finds the conversation that an earlier answer left. The page knows texts only, and a tool call is more than its text."""

    def __init__(self):
        self.after = OrderedDict()

    def store(self, turns, chat):
        """`turns` (texts, alternating) led to this state of `chat`."""
        self.after[turns] = (list(chat.ids), list(chat.messages))
        while len(self.after) > REMEMBERED:
            self.after.popitem(last=False)

    def restore(self, turns, chat):
        """Bring `chat` to where `turns` led; turns that were never seen here become plain text."""
        chat.clear(chat.system)
        if turns in self.after:
            chat.ids, chat.messages = (list(part) for part in self.after[turns])
        elif turns:
            chat.replay(turns)


class PageChat(Chat):
    """A Chat of one request."""

    def __init__(self, engine, *, system=None, **settings):
        super().__init__(engine, system=system, **settings)
        self.system = system

    def replay(self, turns):
        """Take `turns` as a conversation of plain texts."""
        from nanochat_hf.conversation import render

        roles = ("user", "assistant")
        self.messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
        self.ids = render(self.engine.tokenizer, {"messages": self.messages})[0]


def text_of(message):
    """The text of a message as gradio's history holds it: a string, or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def build_page(argv=None):
    """(gradio's ChatInterface, parsed arguments); ValueError where gradio is missing or a flag is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument("--share", action="store_true", help="ask gradio for a public address: anyone who has it can use the model")
    args = parser.parse_args(argv)
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio, which is not installed; pip install 'nanochat_hf[web]'") from None
    base, answers = load_chat(args), Answers()

    def respond(message, history, temperature, top_k):
        settings = dict(base.sampling, temperature=float(temperature), top_k=int(top_k))
        try:
            check_sampling(**settings)
            chat, turns = PageChat(base.engine, system=args.system, seed=base.seed, **settings), tuple(map(text_of, history))
            answers.restore(turns, chat)
            pieces, shown = chat.ask(message), ""
            try:
                for piece in show(pieces):
                    shown += piece
                    yield shown
            finally:  # also when stop is pressed
                pieces.close()
                answers.store((*turns, message, shown), chat)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    page = gradio.ChatInterface(
        respond, title="nanochat_hf", api_name="chat",
        additional_inputs=[
            gradio.Slider(0, 2, args.temperature, label="temperature (0: greedy)"),
            gradio.Slider(0, 200, args.top_k, step=1, label="top-k (0: all tokens)"),
        ],
    )  # fmt: skip
    return page, args


@user_errors
def main(argv=None):
    page, args = build_page(argv)
    page.launch(server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
