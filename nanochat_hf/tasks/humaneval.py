"""HumanEval (arXiv:2107.03374): complete a Python function; right when the data set's own tests pass in the sandbox."""

import ast
import re
from typing import Any

from nanochat_hf.tools import sandbox

from .base import Conversation, Row, Task, load_rows, pair

BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)


def load(split: str = "test", path: str | None = None, limit: int | None = None) -> Any:
    """Rows {task_id, prompt, canonical_solution, test, entry_point} of the Hub's openai/openai_humaneval or a file."""
    return load_rows("openai/openai_humaneval", None, split, path, limit)


def to_conversation(row: Row) -> Conversation:
    """The prompt is the question; the answer is one block with prompt and solution.

    The conversation also holds `test` and `entry_point`, which `grade` needs.
    """
    answer = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
    return pair(row["prompt"], answer) | {"test": row["test"], "entry_point": row["entry_point"]}


def first_code_block(completion: str) -> str:
    """The code of the first block in triple backticks; a text without such a block is code as a whole."""
    found = BLOCK.search(completion)
    return found[1] if found else completion


def imports(prompt: str) -> str:
    """The top-level import statements of a prompt."""
    try:
        lines = [ast.unparse(node) for node in ast.parse(prompt).body if isinstance(node, ast.Import | ast.ImportFrom)]
    except (SyntaxError, ValueError):
        lines = re.findall(r"^(?:import|from)\s.*$", prompt, re.MULTILINE)
    return "\n".join(lines)


def program(conversation: Conversation, completion: str) -> str:
    """The program that decides: imports of the prompt, code of the completion, the tests, and their call."""
    parts = (imports(conversation["messages"][0]["content"]), first_code_block(completion), conversation["test"])
    return "\n\n".join((*parts, f"check({conversation['entry_point']})\n"))


def grade(conversation: Conversation, completion: str, limits: sandbox.Limits | None = None) -> bool:
    """True when the program ends without an error in the sandbox."""
    return sandbox.run(program(conversation, completion), limits).passed


HUMANEVAL = Task("humaneval", load, to_conversation, grade, notice=sandbox.protections)
