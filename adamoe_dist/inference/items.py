"""Multiple-choice questions from JSON lines, in the layouts in which people have them."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamoe_dist.errors import UserError

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"
LAYOUTS = (
    '{"question" or "context": text, "choices": [texts], "answer": number from 0 or label}, or ARC\'s, HellaSwag\'s or '
    "PIQA's layout"
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: what reports call it.
        context: the text before each choice, as the model reads it.
        choices: the texts to choose from.
        answer: the position of the right one.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int

    def as_record(self) -> dict[str, Any]:
        """The item as a line of this project's own layout."""
        return {"id": self.id, "context": self.context, "choices": list(self.choices), "answer": self.answer}


def read_items(file: str | Path, template: str = QUESTION_TEMPLATE, limit: int | None = None) -> list[Item]:
    """Read the questions of a file, one JSON object a line (``.jsonl`` or ``.jsonl.gz``).

    Args:
        file: the file.
        template: what an item that has a question becomes; ``{question}`` stands for it. A context is taken as it is.
        limit: read so many at most.

    Raises:
        UserError: the file is missing or empty, or a line is no question; the line is named.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--tasks {file} is not a file; give JSON lines: {LAYOUTS}")
    if "{question}" not in template:
        raise UserError(f"--template {template!r} has no {{question}}; say where the question goes")
    items: list[Item] = []
    for number, line in _lines(path):
        if limit is not None and len(items) == limit:
            break
        items.append(_item(line, f"{path}:{number}", template))
    if not items:
        raise UserError(f"--tasks {file} has no items; give JSON lines: {LAYOUTS}")
    return items


def items_as_lines(items: list[Item]) -> str:
    """Return items in this project's own layout, which lm-evaluation-harness reads with a few lines of YAML."""
    return "".join(json.dumps(item.as_record(), ensure_ascii=False) + "\n" for item in items)


def require_unicode(text: str, what: str) -> None:
    """Refuse text that is none: half of a surrogate pair, or bytes of a command line that are no UTF-8.

    Raises:
        UserError: naming ``what``.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} has {text[error.start]!r} at {error.start}, which is no character; mend it") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.decode("utf-8")
                if text.strip():
                    yield number, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); make or fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it (iconv -t UTF-8)") from error


def _item(line: str, where: str, template: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is no object; each line must be {LAYOUTS}")
    question, choices, labels, answer = _parts(record, where)
    _check_choices(choices, where)
    given_id = record.get("id", record.get("ind"))
    name = where if given_id is None else str(given_id)
    context = _context(record, question, where, template)
    return Item(name, context, tuple(choices), _position(answer, choices, labels, where))


def _parts(record: dict[str, Any], where: str) -> tuple[Any, list[Any], list[str], Any]:
    """Return question, choices, their labels (perhaps none) and the answer, from any of the layouts."""
    question = record.get("question")
    if "endings" in record:  # HellaSwag
        return None, record["endings"], [], record.get("label")
    if "goal" in record and "sol1" in record:  # PIQA
        return record["goal"], [record["sol1"], record.get("sol2")], [], record.get("label")
    choices: Any = record.get("choices")
    if isinstance(question, dict):  # ARC as it is published
        choices, question = question.get("choices"), question.get("stem")
    answer = record.get("answer", record.get("answerKey"))
    if isinstance(choices, dict):  # ARC as the hub has it
        return question, choices.get("text", []), _labels(choices.get("label", []), where), answer
    if not isinstance(choices, list):
        raise UserError(f"{where} has no list of choices (its keys are {', '.join(record)}); give {LAYOUTS}")
    if choices and all(isinstance(choice, dict) for choice in choices):
        labels = [str(choice.get("label")) for choice in choices]
        return question, [choice.get("text") for choice in choices], labels, answer
    return question, choices, _labels(record.get("labels", []), where), answer


def _labels(labels: Any, where: str) -> list[str]:
    if not isinstance(labels, list):
        raise UserError(f"{where}: its labels are of type {type(labels).__name__}, not a list; mend the line")
    return [str(label) for label in labels]


def _check_choices(choices: Any, where: str) -> None:
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where} has fewer than two choices; mend or remove the line")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(f"{where}: choice {choice!r} is no text; mend or remove the line")
        require_unicode(choice, f"{where}: choice {choice!r}")


def _context(record: dict[str, Any], question: Any, where: str, template: str) -> str:
    context = record.get("context", record.get("ctx"))
    for name, text in (("question", question), ("context", context)):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: its {name} is of type {type(text).__name__}, not a text; mend the line")
        require_unicode(text or "", f"{where}: its {name}")
    if question is None:
        if context is None:
            raise UserError(f"{where} has neither question nor context (its keys are {', '.join(record)})")
        return str(context)
    asked = template.replace("{question}", question)
    return f"{context}\n{asked}" if context else asked


def _position(answer: Any, choices: list[str], labels: list[str], where: str) -> int:
    """Return the right choice's position: by number from 0, by label, by its text, or by letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = answer
    elif isinstance(answer, str):
        text = answer.strip()
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        for names in (labels, choices, letters):
            if names.count(text) == 1:
                return names.index(text)
        found = int(text) if text.isascii() and text.isdigit() and not labels else -1
    else:
        found = -1
    if not 0 <= found < len(choices):
        known = f"labels {', '.join(labels)}" if labels else f"numbers 0 to {len(choices) - 1}, or letters from A"
        raise UserError(f"{where}: answer {answer!r} names none of the {len(choices)} choices ({known}); mend the line")
    return found
