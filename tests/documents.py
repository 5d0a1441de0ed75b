"""Commands in the documents: found, filled with real directories, parsed by their own parsers, made small, and run.

Fenced bash blocks are read by sybil's lexer. The rest is our own, because neither sybil nor pytest-markdown-docs knows
it: commands in tables and sentences, indented lines of module docstrings with their explanations, ``[--optional]``
flags, placeholders such as RUN_DIR, and one run that many commands share.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sybil.document import Document
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).parents[1]
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:\.venv/bin/)?"
    r"(?:python3? \S|pip |pytest\b|wandb |cat >|(?:\./)?(?:train_reinflow\.py|(?:benchmarks|examples)/\w+\.(?:py|sh))"
    r"|(?:torchrun|accelerate launch) (?=.*train_reinflow)|(?:reinflow|lerobot)-[a-z][a-z0-9-]*(?=\s|$))"
)
HISTORY = {"notes/LOG.md"}  # what was run then; commands change, a diary does not
LAUNCHERS = ("torchrun", "accelerate")
OPERATORS = {"&&", "||", ";", "{", "}", "|", "&"}


@dataclass(frozen=True)
class Command:
    """One command as a document has it."""

    where: str  # file:line
    text: str
    words: tuple[str, ...]  # without environment variables, comments and brackets of optional flags
    whole: bool  # a line to copy; False: named in a sentence or a table, perhaps in part

    @property
    def launched(self) -> int:
        """Words of a launcher before the program that it starts; 0 without one."""
        if self.words[0].removeprefix(".venv/bin/") not in LAUNCHERS:
            return 0
        return next(i for i, word in enumerate(self.words) if word.endswith(".py") or self.words[i - 1] == "-m")

    @property
    def program(self) -> str:
        """train_reinflow.py, reinflow-eval, benchmarks/x.py, lerobot-train, pytest, pip, venv, ..."""
        if self.launched:
            return self.words[self.launched].removesuffix(".py") + ".py"
        first = self.words[0].removeprefix(".venv/bin/")
        if re.fullmatch(r"python3?", first):
            return self.words[2] if self.words[1] == "-m" else self.words[1]
        return first

    @property
    def flags(self) -> list[str]:
        """What follows the program."""
        if self.launched:
            return list(self.words[self.launched + 1 :])
        first = self.words[0].removeprefix(".venv/bin/")
        skipped = (3 if self.words[1] == "-m" else 2) if re.fullmatch(r"python3?", first) else 1
        return list(self.words[skipped:])

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@cache
def tracked(suffix: str) -> list[Path]:
    """The project's files of a suffix, new ones that git does not ignore included."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", f"*{suffix}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in sorted(set(names.split())) if (ROOT / name).is_file()]


def words_of(text: str) -> list[tuple[str, ...]]:
    """The simple commands of one line of shell."""
    text = re.sub(r"\s\.\.\.(?=\s|$)|(?<=[A-Z])\.\.\.", "", re.sub(r"\[(-[^\]]*)\]", r"\1", text))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split, found = True, [[]]
    for word in lexer:
        if word in OPERATORS:
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [tuple(words) for words in found if words]


def commands_of(text: str, where: str, whole: bool) -> Iterator[Command]:
    for words in words_of(text):
        if words[0] != "[":  # a test of the shell
            yield Command(where, " ".join(text.split()), words, whole and "..." not in text)


def joined(source: str) -> Iterator[tuple[int, str]]:
    """Lines of shell with their numbers; continued ones and here-documents as one."""
    lines, i = source.splitlines(), 0
    while i < len(lines):
        start, line = i, lines[i]
        if end := re.search(r"<<'(\w+)'", line):
            while lines[i] != end[1]:
                i += 1
            line = "\n".join(lines[start : i + 1])
        while line.endswith("\\") and i + 1 < len(lines):
            i += 1
            line = line[:-1].rstrip() + " " + lines[i].strip()
        i += 1
        if line.strip() and not line.lstrip().startswith("#"):
            yield start, line.strip()


def of_markdown(path: Path) -> Iterator[Command]:
    """Fenced bash, indented lines, and code in sentences and tables."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    rest = text
    for region in FencedCodeBlockLexer(r"\w*")(Document(text, str(path))):
        rest = rest[: region.start] + re.sub(r"[^\n]", " ", rest[region.start : region.end]) + rest[region.end :]
        if region.lexemes["language"] != "bash":
            continue
        first = text[: region.start].count("\n") + 2
        for number, line in joined(region.lexemes["source"]):
            if "<<" in line:
                yield Command(f"{name}:{first + number}", line, ("cat", line), True)
            else:
                yield from commands_of(line, f"{name}:{first + number}", True)
    for number, line in joined(rest):
        if rest.splitlines()[number].startswith("    ") and PROGRAM.match(line):
            yield from commands_of(re.split(r"\s{2,}(?![-\s])", line)[0], f"{name}:{number + 1}", True)
    for span in re.finditer(r"(?<!`)`([^`]+)`(?!`)", rest):
        if PROGRAM.match(code := " ".join(span[1].split())):
            yield from commands_of(code, f"{name}:{rest[: span.start()].count(chr(10)) + 1}", False)


def of_module(path: Path) -> Iterator[Command]:
    """Indented lines of the module's docstring; an explanation follows after two blanks."""
    name, doc = path.relative_to(ROOT).as_posix(), ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = doc.splitlines()
    for number, line in joined(doc):
        if lines[number].startswith("    ") and PROGRAM.match(line):
            yield from commands_of(re.split(r"\s{2,}(?![-\s])", line)[0], f"{name}:{number + 1}", True)


@cache
def documented() -> list[Command]:
    """Every command of the documents and of the modules' docstrings."""
    pages = [p for p in tracked(".md") if p.relative_to(ROOT).as_posix() not in HISTORY and "tests" not in p.parts]
    inner = re.compile(r"tests/|benchmarks/.*\b_[a-z]")  # no commands of their own
    modules = [p for p in tracked(".py") if not inner.match(p.relative_to(ROOT).as_posix())]
    return [c for p in pages for c in of_markdown(p)] + [c for p in modules for c in of_module(p)]
