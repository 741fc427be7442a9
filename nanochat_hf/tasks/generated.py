"""Tasks that code generates: spelling, counting letters, arithmetic, identity. Row i of a split is always the same row.

Words come from the text file in `path`, one a line, or else from the embedded text. Words of split "test" occur in no
training row.
"""

import random
from collections.abc import Callable
from string import ascii_lowercase

from .base import Task, pair, same_number, same_text
from .embedded import listed_words, share, words

TEST_OFFSET = 10_000_000
LETTERS = (7, 8)  # of a string to spell
# {l} and {w} are letter and word, each in the quotes of the row; {q} is "?" or nothing
BEE_QUESTIONS = (
    "How many {l} are in {w}{q}",
    "How many {l} are there in {w}{q}",
    "How many {l} does {w} have{q}",
    "How many {l} does {w} contain{q}",
    "How many times does {l} appear in {w}{q}",
    "How often does {l} occur in {w}{q}",
    "How often is {l} in {w}{q}",
    "In {w}, how many {l} are there{q}",
    "How many of the letters of {w} are {l}{q}",
    "What is the number of {l} in {w}{q}",
    "Number of {l} in {w}{q}",
    "Do you know how many {l} are in {w}{q}",
    "Can you tell me how many times {l} occurs in the word {w}{q}",
    "Count the {l} in {w}",
    "Count the letter {l} in {w}",
    "Please count {l} in {w}",
    "Tell me how many {l} are in {w}",
    "In {w}, count the {l}",
    "Find out how often {l} is used in {w}",
    "Letter {l}, word {w}: how many{q}",
    "Wie viele {l} sind in {w}{q}",
    "Wie oft kommt {l} in {w} vor{q}",
    "Zähle die {l} in {w}",
    "Wie oft steht der Buchstabe {l} im Wort {w}{q}",
    "Combien de {l} y a-t-il dans {w}{q}",
    "Combien de fois {l} apparaît dans {w}{q}",
    "Compte les {l} dans {w}",
    "¿Cuántas {l} hay en {w}{q}",
    "¿Cuántas veces aparece {l} en {w}{q}",
    "Cuenta las {l} en {w}",
    "Quante {l} ci sono in {w}{q}",
    "Quante volte compare {l} in {w}{q}",
    "Quantas {l} há em {w}{q}",
    "Quantas vezes aparece {l} em {w}{q}",
    "Hoeveel {l} zitten er in {w}{q}",
    "Hoe vaak komt {l} voor in {w}{q}",
    "Ile liter {l} jest w {w}{q}",
    "Hur många {l} finns i {w}{q}",
    "Сколько букв {l} в слове {w}{q}",
    "{w} 里有多少个 {l}{q}",
    "{w} に {l} はいくつありますか{q}",
    "{w}에 {l}이 몇 개 있나요{q}",
)
QUOTES = ("", "'", '"')
SUMS = ("What is {e}?", "Compute {e}.", "How much is {e}?", "Calculate {e}.")
# questions to train on, others for the held-out split, and the answer to both
IDENTITY = (
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        ("Who is this?", "Tell me your name."),
        "I am a small chat model, trained with nanochat_hf.",
    ),
    (
        ("Who made you?", "Where do you come from?", "How were you trained?"),
        ("Who trained you?", "Who is your maker?"),
        "You did: you trained me yourself, with nanochat_hf.",
    ),
    (
        ("What can you do?", "How can you help me?"),
        ("What can you help me with?", "What are you able to do?"),
        "I can spell words, count their letters and calculate with a tool.",
    ),
    (
        ("Hello", "Hi", "Good morning", "Hello!", "Hi there"),
        ("Hello there", "Good evening", "Hi!"),
        "Hello! Ask me to spell a word, count letters or calculate.",
    ),
)


Row = dict[str, str]  # the fields that a conversation is made of


def rows(draw: Callable[[random.Random, str, str | None], Row]) -> Callable[..., list[Row]]:
    """The `load` of a generated task, whose rows `draw(random, split, path)` makes.

    Each row has a seed of its own, by its split and its number.
    """

    def load(split: str = "train", path: str | None = None, limit: int | None = None) -> list[Row]:
        if limit is not None and limit < 1:
            raise ValueError(
                f"limit={limit}: must be at least 1; leave it out for 20,000 rows to train on or 1,000 to test"
            )
        if split not in ("train", "test"):
            raise ValueError(f"no split {split!r}, there are train and test; give one of them")
        start = TEST_OFFSET if split == "test" else 0
        return [
            draw(random.Random(start + i), split, path) for i in range(limit or (1000 if split == "test" else 20000))
        ]

    return load


def draw_word(rng: random.Random, split: str, path: str | None = None) -> Row:
    """One word of the split: of the list in `path`, or of the embedded text."""
    return {"word": rng.choice(listed_words(path, split) if path else words(split))}


def draw_letters(rng: random.Random, split: str, path: str | None = None) -> Row:
    """A string of random letters, no word, of LETTERS. Those of split "test" occur in no training row."""
    while True:
        text = "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(*LETTERS)))
        if share(split, [text]):
            return {"word": text}


def draw_bee(rng: random.Random, split: str, path: str | None = None) -> Row:
    """A word, a letter (nine times out of ten one of the word's), a phrasing, the quotes and the mark at its end."""
    word = draw_word(rng, split, path)["word"]
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    marks = {"letter_quote": rng.choice(QUOTES), "word_quote": rng.choice(QUOTES), "mark": rng.choice(("?", ""))}
    return {"word": word, "letter": letter, "question": rng.choice(BEE_QUESTIONS)} | marks


def draw_sum(rng: random.Random, split: str, path: str | None = None) -> Row:
    """Two numbers of up to three digits and an operator; the sum of all digits is odd in test rows, even in others."""
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        if sum(map(int, f"{a}{b}")) % 2 == (split == "test"):
            return {"expression": f"{a}{rng.choice('+-*')}{b}", "question": rng.choice(SUMS)}


def draw_identity(rng: random.Random, split: str, path: str | None = None) -> Row:
    """A question about the model itself and its answer. Questions of split "test" occur in no training row."""
    questions, held_out, answer = rng.choice(IDENTITY)
    return {"question": rng.choice(held_out if split == "test" else questions), "answer": answer}


def spell(word: str) -> str:
    """The word, a colon and its letters.

    >>> spell("apple")
    'apple:a,p,p,l,e'
    """
    return f"{word}:{','.join(word)}"


def bee_conversation(row: Row) -> dict:
    """Spell the word, count position by position, check with the tool, answer after ####."""
    word, letter = row["word"], row["letter"]
    steps, count = [], 0
    for position, other in enumerate(word, 1):
        count += other == letter
        steps.append(f"{position}:{other}" + (f"={count}" if other == letter else ""))
    answer = [
        {"type": "text", "text": f"{spell(word)}\n{' '.join(steps)}\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n#### {count}"},
    ]
    quotes = row.get("letter_quote", ""), row.get("word_quote", "")
    letter, word = (f"{quote}{text}{quote}" for quote, text in zip(quotes, (letter, word), strict=True))
    return pair(row["question"].format(l=letter, w=word, q=row.get("mark", "?")), answer)


def sum_conversation(row: Row) -> dict:
    """The tool calculates; the answer stands after ####."""
    a, op, b = _split(row["expression"])
    result = str({"+": a + b, "-": a - b, "*": a * b}[op])
    answer = [
        {"type": "python", "text": row["expression"]},
        {"type": "python_output", "text": result},
        {"type": "text", "text": f"#### {result}"},
    ]
    return pair(row["question"].format(e=row["expression"]), answer)


def _split(expression):
    op = next(c for c in expression if c in "+-*")
    a, b = expression.split(op)
    return int(a), op, int(b)


SIMPLE_SPELLING = Task(
    "simple_spelling",
    rows(draw_word),
    lambda row: pair(f"Spell the word: {row['word']}", spell(row["word"])),
    same_text,
)
RANDOM_SPELLING = Task(
    "random_spelling",
    rows(draw_letters),
    lambda row: pair(f"Spell the word: {row['word']}", spell(row["word"])),
    same_text,
)
SPELLING_BEE = Task("spelling_bee", rows(draw_bee), bee_conversation, same_number)
CALCULATOR = Task("calculator", rows(draw_sum), sum_conversation, same_number)
IDENTITY_TASK = Task("identity", rows(draw_identity), lambda row: pair(row["question"], row["answer"]), same_text)
