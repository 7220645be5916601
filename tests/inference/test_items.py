"""Questions in every layout, and lines that are none."""

import gzip
import json

import pytest

from adamoe_dist.errors import UserError
from adamoe_dist.inference import items_as_lines, read_items
from tests.inference.tiny import QUESTIONS, write_lines

ARC = {
    "id": "Mercury_7",
    "question": {
        "stem": "Which is largest?",
        "choices": [{"text": "ant", "label": "1"}, {"text": "bear", "label": "2"}, {"text": "cat", "label": "3"}],
    },
    "answerKey": "2",
}
ARC_OF_HUB = {
    "id": "Mercury_7",
    "question": "Which is largest?",
    "choices": {"text": ["ant", "bear", "cat"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
HELLASWAG = {"ind": 24, "ctx": "A man sits", "endings": ["down.", "up.", "in a car.", "on it."], "label": "2"}
PIQA = {"goal": "Open a jar", "sol1": "twist it", "sol2": "eat it", "label": 0}


@pytest.mark.parametrize(
    ("record", "context", "choices", "answer", "name"),
    [
        (ARC, "Question: Which is largest?\nAnswer:", ("ant", "bear", "cat"), 1, "Mercury_7"),
        (ARC_OF_HUB, "Question: Which is largest?\nAnswer:", ("ant", "bear", "cat"), 1, "Mercury_7"),
        (HELLASWAG, "A man sits", ("down.", "up.", "in a car.", "on it."), 2, "24"),
        (PIQA, "Question: Open a jar\nAnswer:", ("twist it", "eat it"), 0, None),
        (QUESTIONS[1], "Question: What is two and two?\nAnswer:", ("four", "five houses"), 0, "q2"),
        (QUESTIONS[2], "The cat sat on ", ("the mat", "Straße 🙂"), 1, "q3"),
        (QUESTIONS[4], "One. \nQuestion: Which?\nAnswer:", ("this one", "that"), 1, "q5"),
        ({"context": "1, ", "choices": ["1", "2"], "answer": "1"}, "1, ", ("1", "2"), 0, None),
        ({"context": "x", "choices": ["p", "q"], "labels": ["q", "p"], "answer": "q"}, "x", ("p", "q"), 0, None),
    ],
)
def test_a_layout(tmp_path, record, context: str, choices: tuple[str, ...], answer: int, name: str | None) -> None:
    file = write_lines(tmp_path / "items.jsonl", [record])
    [item] = read_items(file)
    assert (item.context, item.choices, item.answer) == (context, choices, answer)
    assert item.id == (name or f"{file}:1")


def test_blank_lines_limits_compression_and_the_own_layout(tmp_path) -> None:
    file = tmp_path / "items.jsonl.gz"
    file.write_bytes(gzip.compress("\n\n".join(map(json.dumps, QUESTIONS)).encode()))
    items = read_items(file)
    assert len(items) == 5 and read_items(file, limit=2) == items[:2]
    (tmp_path / "own.jsonl").write_text(items_as_lines(items), encoding="utf-8")
    assert read_items(tmp_path / "own.jsonl") == items
    assert read_items(file, "{question}?!")[0].context == "What colour is the sky??!"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no object"),
        ('{"question": "x"}', "has no list of choices"),
        ('{"choices": ["a", "b"], "answer": 0}', "neither question nor context"),
        ('{"question": 3, "choices": ["a", "b"], "answer": 0}', "question is of type int"),
        ('{"question": "x", "choices": ["a"], "answer": 0}', "fewer than two choices"),
        ('{"question": "x", "choices": ["a", " "], "answer": 0}', "choice ' ' is no text"),
        ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "answer 2 names none of the 2 choices"),
        ('{"question": "x", "choices": ["a", "b"], "answer": true}', "answer True names none"),
        ('{"question": "x", "choices": ["a", "b"]}', "answer None names none"),
        ('{"question": "x", "choices": ["a", "b"], "answer": "C"}', "answer 'C' names none"),
        ('{"question": "x", "choices": ["a", "b"], "answer": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"question": "x\\ud800", "choices": ["a", "b"], "answer": 0}', "its question has .* at 1, which is no"),
        ('{"question": "x", "choices": ["a", "\\udc00"], "answer": 0}', "which is no character"),
        ('{"question": "x", "choices": ["a", "b"], "labels": 1, "answer": 0}', "its labels are of type int"),
        ('{"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "1"}', "labels A, B"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line: str, message: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message) as refusal:
        read_items(file)
    assert f"{file}:2" in str(refusal.value)


def test_files_that_hold_nothing(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    for name, message in [
        ("nowhere.jsonl", "is not a file"),
        ("empty.jsonl", "has no items"),
        ("broken.jsonl.gz", "whole gzip"),
        ("latin.jsonl", "not UTF-8"),
    ]:
        with pytest.raises(UserError, match=message):
            read_items(tmp_path / name)
    with pytest.raises(UserError, match="--template"):
        read_items(write_lines(tmp_path / "good.jsonl", QUESTIONS), "no place")
