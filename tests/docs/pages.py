"""What the pages say that can be checked: paths, links and commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = {"results.md", "negative_results.md"}  # by scripts.records, which checks them itself
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "records" not in p.parts)]
PAGES = [page for page in PAGES if page.name not in GENERATED]
COMPARISONS = {"flags", "from_nanochat", "from_trl"}
HOMES = (ROOT, ROOT / "nanochat_hf", ROOT / "docs")
FENCE = re.compile(r"^( *)```(\w*)(.*?)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ENDINGS = (".py", ".md", ".yaml", ".yml", ".jinja", ".sh", ".svg", ".cfg", ".toml")
FOLDERS = ("nanochat_hf/", "scripts/", "tests/", "docs/", "accelerate_configs/", "findings/")
TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title (what the reader needs for it) and its text."""

    page: Path
    language: str
    title: str
    text: str


@cache
def text_of(page: Path) -> str:
    """The page as it is written."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    return [
        Block(page, match[2], (TITLE.search(match[3]) or ("", ""))[1], match[4])
        for match in FENCE.finditer(text_of(page))
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def paths(page: Path) -> Iterator[str]:
    """The paths of this project that a page's prose names in code: "data/packing.py", "accelerate_configs/cpu.yaml".

    Names with a placeholder (X, NNN, *) and those of what a run writes are none.
    """
    for token in INLINE.findall(prose(page)):
        is_path = re.fullmatch(r"[\w./-]+", token) and (token.endswith(ENDINGS) or token.startswith(FOLDERS))
        if is_path and "/" in token and not re.search(r"\bX\b|NNN", token):
            yield token


def exists(path: str) -> bool:
    """Whether a path leads somewhere from the top of the project, from the package or from docs."""
    return any((home / path).exists() for home in HOMES)


def links(page: Path) -> Iterator[str]:
    """The relative links of a page."""
    for target in LINK.findall(prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def single_flags(page: Path) -> Iterator[str]:
    """Flags that prose names by themselves: "--keep-best". The first column of a comparison is another program's."""
    text = prose(page)
    if page.stem in COMPARISONS:
        text = re.sub(r"^\|[^|]*\|", "|", text.replace("\\|", " "), flags=re.MULTILINE)
    for token in INLINE.findall(text):
        if token.startswith("--"):
            yield from re.findall(r"(?<!\S)--[a-z][a-z-]*[a-z](?![\w-])", token)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of a page as words: those of bash blocks, and those in the prose that begin like one."""
    for block in blocks(page):
        if block.language in ("bash", "sh", "console"):
            for line in re.sub(r"\\\n", " ", block.text).splitlines():
                yield from _words(line)
    for token in INLINE.findall(prose(page)):
        if re.match(r"(\.venv/bin/)?(python|accelerate|make)\b", token):
            yield from _words(token)


def _words(line: str) -> Iterator[list[str]]:
    line = re.sub(r"\[([^\]]*)\]", r"\1", line).replace("…", "")  # [--optional] parts are flags too
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):  # PJRT_DEVICE=TPU python …
        words = words[1:]
    if words:
        yield words


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """("chat_sft", its arguments) of a line that runs a command of this project; None for any other.

    >>> own_command("accelerate launch -m scripts.chat_sft --model newest".split())
    ('chat_sft', ['--model', 'newest'])
    """
    for place, word in enumerate(words[:-1]):
        name = re.fullmatch(r"(?:scripts|nanochat_hf\.cli)\.([\w.]+)", words[place + 1])
        if word == "-m" and name:
            return name[1], words[place + 2 :]
    return None
