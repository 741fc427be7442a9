"""Talk to a model in the browser.

python -m scripts.chat_web --model DIR    (needs the extra: pip install 'nanochat_hf[web]')

The page is on this machine alone unless --host or --share says otherwise. What the calculator was asked and said stands
in brackets. Answers are shown as plain text, nothing can be uploaded, and pictures of other hosts are not loaded.
"""

import argparse
import contextlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_hf.config import user_errors
from nanochat_hf.generation import Chat, show

from .chat_cli import add_model_arguments, load_chat

REMEMBERED = 10_000  # answers whose ids the page can take up again
WAITING = 16  # questions that may wait for their turn; more are refused
BODY_BYTES = 4 * 2**20  # of a request; a conversation that fits a model is far smaller
CHARACTERS_A_TOKEN = 16  # a text with more characters for each position is refused before it is tokenised
NOT_SERVED = ("/upload", "/proxy=", "/file=", "/file/", "/stream/")  # what a page of texts needs none of
POLICY = "img-src 'self' data: blob:; media-src 'self' blob:; object-src 'none'; frame-src 'none'; base-uri 'self'"

Scope = Mapping[str, Any]
App = Callable[[Scope, Callable[..., Awaitable], Callable[..., Awaitable]], Awaitable[None]]


class Answers:
    """Finds the conversation that an earlier answer left: the page knows texts only, and a tool call is more."""

    def __init__(self) -> None:
        self.after: OrderedDict[tuple[str, ...], tuple[list, list]] = OrderedDict()

    def store(self, turns: tuple[str, ...], chat: Chat) -> None:
        """`turns` (texts, alternating) led to this state of `chat`."""
        self.after[turns] = (list(chat.ids), list(chat.messages))
        while len(self.after) > REMEMBERED:
            self.after.popitem(last=False)

    def restore(self, turns: tuple[str, ...], chat: Chat) -> None:
        """Bring `chat` to where `turns` led; turns that were never seen here become plain text."""
        # when stop was pressed, the page may not have shown the last piece
        known = turns if turns in self.after else next((k for k in reversed(self.after) if _stopped(turns, k)), None)
        if known:
            chat.ids, chat.messages = (list(part) for part in self.after[known])
        elif turns:
            roles = ("user", "assistant")
            chat.replay([*chat.messages, *({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))])


def _stopped(shown: tuple[str, ...], said: tuple[str, ...]) -> bool:
    return shown[:-1] == said[:-1] and said[-1].startswith(shown[-1])


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message as gradio's history holds it: a string, or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Page:
    """Answers a question of the page; `base` holds model and settings."""

    def __init__(self, base: Chat, system: str | None) -> None:
        self.base, self.system, self.answers, self.asked = base, system, Answers(), 0

    def respond(
        self, message: str, history: Sequence[Mapping[str, Any]], temperature: float, top_k: float
    ) -> Generator[str, None, None]:
        """Yield the answer so far, again and again. ValueError for what cannot be asked."""
        turns = tuple(map(text_of, history))
        self._check_size(message, turns)
        settings = self.base.settings | {"temperature": float(temperature), "top_k": int(top_k)}
        # another seed for every question, so that a retry is a new try
        chat = Chat(self.base.engine, system=self.system, seed=self.base.seed + self.asked, **settings)
        self.asked += 1
        self.answers.restore(turns, chat)
        pieces, shown = chat.ask(message), ""
        try:
            for piece in show(pieces):
                shown += piece
                yield shown
        finally:  # also when stop is pressed
            pieces.close()
            self.answers.store((*turns, message, shown), chat)

    def _check_size(self, message: str, turns: tuple[str, ...]) -> None:
        positions = getattr(self.base.engine.model.config, "max_position_embeddings", None)
        length = len(message) + sum(map(len, turns))
        if positions and length > positions * CHARACTERS_A_TOKEN:
            raise ValueError(
                f"the conversation has {length:,} characters, the model sees {positions:,} tokens; "
                "clear it, or ask something shorter"
            )


class Guard:
    """ASGI middleware: no uploads, no files, no large bodies; browsers are told to load nothing from elsewhere."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Refuse with 403 or 413, or pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if any(part in scope["path"] for part in NOT_SERVED):
            await _refuse(send, 403, "not served here")
            return
        body, complete = await _body(receive)
        if not complete:
            await _refuse(send, 413, f"a request has at most {BODY_BYTES:,} bytes")
            return

        async def receive_again() -> Mapping[str, Any]:
            nonlocal body
            if body is None:
                return await receive()  # a later message tells that the browser has gone
            message, body = {"type": "http.request", "body": body, "more_body": False}, None
            return message

        async def send_with_policy(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive_again, send_with_policy)


async def _body(receive: Callable) -> tuple[bytes, bool]:
    """(the body of a request, True), or (its beginning, False) where it is larger than BODY_BYTES."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > BODY_BYTES:
            return body, False
    return body, True


async def _refuse(send: Callable, status: int, reason: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": reason.encode()})


def model_name(model: str) -> str:
    """What the page calls a model, without the folders above it.

    >>> model_name("/home/me/runs/poet/final"), model_name("me/poet")
    ('poet', 'me/poet')
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and not folder.is_absolute():
        return model
    folder = folder if folder.name else folder.resolve()
    return folder.parent.name if folder.name in ("final", "best") else folder.name


def build_page(argv: list[str] | None = None) -> tuple[Any, dict[str, Any], Page]:
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
    # read when gradio is imported; also its question for a newer version
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio, which is not installed; pip install 'nanochat_hf[web]'") from None
    from starlette.middleware import Middleware

    page = Page(load_chat(args), args.system)
    interface = _interface(gradio, page, args)
    # the default theme would fetch its fonts from elsewhere
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    launch = dict(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        theme=theme,
        footer_links=[],
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    return interface, launch, page


def _interface(gradio: Any, page: Page, args: argparse.Namespace) -> Any:
    """A ChatInterface: one answer at a time, WAITING questions in the queue, texts shown as they are."""

    def respond(*inputs: Any) -> Iterator[str]:
        try:
            with contextlib.closing(page.respond(*inputs)) as answers:
                yield from answers
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    # without the button that publishes the chat
    window = gradio.Chatbot(
        buttons=["copy", "copy_all"],
        show_label=False,
        height=200,
        scale=1,
        render_markdown=False,
        sanitize_html=True,
    )
    interface = gradio.ChatInterface(
        respond,
        chatbot=window,
        title=f"nanochat_hf: {model_name(args.model)}",
        api_name="chat",
        concurrency_limit=1,
        analytics_enabled=False,
        additional_inputs=[
            gradio.Slider(0, 2, args.temperature, label="temperature (0: greedy)"),
            gradio.Slider(0, 200, args.top_k, step=1, label="top-k (0: all tokens)"),
        ],
    )
    interface.queue(max_size=WAITING, default_concurrency_limit=1)
    return interface


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    interface, launch, _ = build_page(argv)
    interface.launch(**launch)


if __name__ == "__main__":
    main()
