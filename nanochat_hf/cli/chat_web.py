"""Talk to a model in the browser: python -m scripts.chat_web --model DIR. Needs the extra: pip install 'nanochat_hf[web]'

The page is on this machine alone unless --host or --share says otherwise. What the calculator was asked and said stands in code marks.
"""

import argparse
import contextlib
import os
from collections import OrderedDict

from nanochat_hf.config import user_errors
from nanochat_hf.generation import Chat, show

from .chat_cli import add_model_arguments, load_chat

REMEMBERED = 10_000  # answers whose ids the page can take up again
MARKS = ("`", " → ", "`")


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
        # when stop was pressed, the page may not have shown the last piece
        known = turns if turns in self.after else next((k for k in reversed(self.after) if _stopped(turns, k)), None)
        if known:
            chat.ids, chat.messages = (list(part) for part in self.after[known])
        elif turns:
            roles = ("user", "assistant")
            chat.replay([*chat.messages, *({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))])


def _stopped(shown, said):
    return shown[:-1] == said[:-1] and said[-1].startswith(shown[-1])


def text_of(message):
    """The text of a message as gradio's history holds it: a string, or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Page:
    """Answers a question of the page; `base` holds model and settings."""

    def __init__(self, base, system):
        self.base, self.system, self.answers, self.asked = base, system, Answers(), 0

    def respond(self, message, history, temperature, top_k):
        """Yield the answer so far, again and again. ValueError for what cannot be asked."""
        settings = self.base.settings | {"temperature": float(temperature), "top_k": int(top_k)}
        # another seed for every question, so that a retry is a new try
        chat, turns = (
            Chat(self.base.engine, system=self.system, seed=self.base.seed + self.asked, **settings),
            tuple(map(text_of, history)),
        )
        self.asked += 1
        self.answers.restore(turns, chat)
        pieces, shown = chat.ask(message), ""
        try:
            for piece in show(pieces, MARKS):
                shown += piece
                yield shown
        finally:  # also when stop is pressed
            pieces.close()
            self.answers.store((*turns, message, shown), chat)


def build_page(argv=None):
    """(gradio's ChatInterface, settings of its launch, Page); ValueError where gradio is missing or a flag is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument(
        "--share", action="store_true", help="ask gradio for a public address: anyone who has it can use the model"
    )
    args = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = (
        "False"  # read when gradio is imported; also its question for a newer version
    )
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio, which is not installed; pip install 'nanochat_hf[web]'") from None
    page = Page(load_chat(args), args.system)

    def respond(*inputs):
        try:
            with contextlib.closing(page.respond(*inputs)) as answers:
                yield from answers
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    # without the button that publishes the chat
    window = gradio.Chatbot(buttons=["copy", "copy_all"], show_label=False, height=200, scale=1)
    interface = gradio.ChatInterface(
        respond,
        chatbot=window,
        title=f"nanochat_hf: {args.model}",
        api_name="chat",
        concurrency_limit=1,
        analytics_enabled=False,
        additional_inputs=[
            gradio.Slider(0, 2, args.temperature, label="temperature (0: greedy)"),
            gradio.Slider(0, 200, args.top_k, step=1, label="top-k (0: all tokens)"),
        ],
    )
    # the default theme would fetch its fonts from elsewhere
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return (
        interface,
        dict(server_name=args.host, server_port=args.port, share=args.share, theme=theme, footer_links=[]),
        page,
    )


@user_errors
def main(argv=None):
    interface, launch, _ = build_page(argv)
    interface.launch(**launch)


if __name__ == "__main__":
    main()
