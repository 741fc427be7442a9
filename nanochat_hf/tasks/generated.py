"""Tasks that code generates: spelling, counting letters, arithmetic, identity. Row i of a split is always the same row."""

import random

from .base import Task, pair, same_number, same_text
from .embedded import words

TEST_OFFSET = 10_000_000
BEE_QUESTIONS = (
    "How many {l} are in {w}?", "How many {l} are there in {w}?", "Count the {l} in {w}.", "Count the letter {l} in {w}.",
    "How often does {l} occur in {w}?", "How often is {l} in {w}?", "How many times does {l} appear in {w}?", "Number of {l} in {w}?",
    "What is the number of {l} in {w}?", "Tell me how many {l} are in {w}.", "In {w}, how many {l} are there?", "In {w}, count the {l}.",
    "How many of the letters of {w} are {l}?", "How many {l} does {w} have?", "How many {l} does {w} contain?", "Please count {l} in {w}.",
)  # fmt: skip
SUMS = ("What is {e}?", "Compute {e}.", "How much is {e}?", "Calculate {e}.")
IDENTITY = (
    (("Who are you?", "What are you?", "What is your name?", "Introduce yourself."), "I am a small chat model, trained with nanochat_hf."),
    (("Who made you?", "Where do you come from?", "How were you trained?"), "You did: you trained me yourself, with nanochat_hf."),
    (("What can you do?", "How can you help me?"), "I can spell words, count their letters and calculate with a tool."),
    (("Hello", "Hi", "Good morning", "Hello!", "Hi there"), "Hello! Ask me to spell a word, count letters or calculate."),
)


def rows(draw):
    """load() of a generated task: `draw(random, split)` makes one row; train and test rows have seeds of their own."""

    def load(split="train", path=None, limit=None):
        start = TEST_OFFSET if split == "test" else 0
        return [draw(random.Random(start + i), split) for i in range(limit or (1000 if split == "test" else 20000))]

    return load


def draw_word(rng, split):
    """One word of the split."""
    return {"word": rng.choice(words(split))}


def draw_bee(rng, split):
    """A word, and a letter of it nine times out of ten."""
    word = rng.choice(words(split))
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    return {"word": word, "letter": letter, "question": rng.choice(BEE_QUESTIONS)}


def draw_sum(rng, split):
    """Two numbers of up to three digits and an operator; test rows have an odd digit sum, train rows an even one."""
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        if sum(map(int, f"{a}{b}")) % 2 == (split == "test"):
            return {"expression": f"{a}{rng.choice('+-*')}{b}", "question": rng.choice(SUMS)}


def draw_identity(rng, split):
    """A question about the model itself and its answer."""
    questions, answer = rng.choice(IDENTITY)
    return {"question": rng.choice(questions), "answer": answer}


def spell(word):
    """spell("apple") → "apple:a,p,p,l,e"."""
    return f"{word}:{','.join(word)}"


def bee_conversation(row):
    """Spell, walk position by position, check with the tool, answer behind ####."""
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
    return pair(row["question"].format(l=letter, w=word), answer)


def sum_conversation(row):
    """The tool calculates; the answer stands behind ####."""
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
    "simple_spelling", rows(draw_word), lambda row: pair(f"Spell the word: {row['word']}", spell(row["word"])), same_text
)
SPELLING_BEE = Task("spelling_bee", rows(draw_bee), bee_conversation, same_number)
CALCULATOR = Task("calculator", rows(draw_sum), sum_conversation, same_number)
IDENTITY_TASK = Task("identity", rows(draw_identity), lambda row: pair(row["question"], row["answer"]), same_text)
