"""Examples to fine-tune on, from JSONL files: a prompt and its completion, or a conversation."""

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adamoe_dist.data.corpus import decode_text, parse_json
from adamoe_dist.errors import UserError

PLAIN_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Completion:
    """A prompt, which may be empty, and what is to follow it."""

    prompt: str
    completion: str
    source: str
    """``file:line``."""


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of the assistant; each ``{"role": ..., "content": ...}``."""

    messages: list[dict[str, str]]
    source: str


Example = Completion | Conversation


def read_examples(path: str | Path) -> Iterator[Example]:
    """Yield the examples of a ``.jsonl`` or ``.jsonl.gz`` file in order; blank lines are left out.

    Raises:
        UserError: the file is missing or no JSONL, or a line is no example; it names file and line.
    """
    file, found = require_file(path), False
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            offset = 0
            for number, line in enumerate(stream, start=1):
                text = decode_text(line, f"{path}:{number}", offset)
                offset += len(line)
                if text.strip():
                    found = True
                    yield parse_example(text, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise UserError(f"{path} is not a whole gzip file ({problem}); make or fetch it again") from problem
    if not found:
        raise UserError(f'data {path} holds no example; add lines such as {{"prompt": "...", "completion": "..."}}')


def require_file(path: str | Path) -> Path:
    """Return the path of a file that examples may be read from.

    Raises:
        UserError: it is no readable file, or its name ends otherwise.
    """
    file = Path(path)
    if not file.is_file():
        kind = "a directory" if file.is_dir() else "no such file"
        raise UserError(f"data {path}: {kind}; name a JSONL file of examples in data.train or data.validation")
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"data {path}: examples are read from .jsonl or .jsonl.gz; rename or convert the file")
    if not os.access(file, os.R_OK):
        raise UserError(f"{path} cannot be read (Permission denied); change its permissions")
    return file


def parse_example(line: str, where: str) -> Example:
    """Return the example in one line of JSON; keys besides those that are read do not matter.

    Raises:
        UserError: it is none; ``where`` is named.
    """
    record = parse_json(line, where)
    if not isinstance(record, dict):
        _refuse(where, "is no JSON object")
    kinds = [name for name in ("prompt", "completion", "messages") if name in record]
    if kinds == ["prompt", "completion"]:
        prompt, completion = (_text(record[name], where, name) for name in kinds)
        if not completion.strip():
            _refuse(where, "has an empty completion, from which nothing is learnt")
        return Completion(prompt, completion, where)
    if kinds == ["messages"]:
        return Conversation(_messages(record["messages"], where), where)
    keys = ", ".join(sorted(record)) or "none"
    _refuse(where, f'needs the keys "prompt" and "completion", or "messages" alone; its keys are {keys}')


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        _refuse(where, 'has no list of messages in "messages"')
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            _refuse(where, f'messages[{number}] is no object with "role" and "content"')
        role, content = (_text(message[name], where, f"messages[{number}].{name}") for name in ("role", "content"))
        if role == "assistant" and not content.strip():
            _refuse(where, f"messages[{number}] of the assistant is empty, from which nothing is learnt")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "assistant":
        _refuse(where, f"ends with a message of role {messages[-1]['role']!r}; the last one must be the assistant's")
    return messages


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        _refuse(where, f"{name} is of type {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as problem:
        _refuse(where, f"{name} has half of a surrogate pair at character {problem.start}")
    return value


def _refuse(where: str, what: str) -> NoReturn:
    raise UserError(f"{where} {what}; mend or remove the line")
