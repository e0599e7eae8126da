"""What a page tells its reader to type: the fenced blocks of a language, and the commands in one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str = "sh") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def lines(block: str) -> list[str]:
    """One command each: a backslash at the end of a line joins it with the next."""
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def commands(block: str, program: str = "moe-serve") -> list[list[str]]:
    """The words after `program`, wherever it stands in a line (`a && moe-serve ...`, `... > file`)."""
    found = []
    for line in lines(block):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        if program in words:
            said = words[words.index(program) + 1 :]
            end = next((place for place, word in enumerate(said) if word and set(word) <= set("|&;<>()")), len(said))
            found.append(said[:end])
    return found
