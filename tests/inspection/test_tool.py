"""tools/inspect_routing.py from end to end, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adamoe_dist.errors import UserError
from tests.inference.tiny import TEXT, save_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_routing.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    save_model(root / "model", "adamoe")
    save_model(root / "second", "adamoe", num_experts_per_tok=2)
    save_model(root / "dense", "llama")
    save_model(root / "other_tokens", "adamoe", with_bos=False)
    (root / "a.txt").write_text(" ".join(TEXT) * 4, encoding="utf-8")
    (root / "b.txt").write_text(TEXT[2], encoding="utf-8")
    (root / "empty.txt").write_text(" \n")
    (root / "latin1.txt").write_bytes("Käse".encode("latin-1"))
    (root / "there.html").write_text("kept")
    return root


@pytest.fixture
def tool(place, monkeypatch):
    """The tool's main function in this process."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import inspect_routing

    return inspect_routing.main


@pytest.mark.end_to_end
def test_everything_is_written(place, tool):
    arguments = [
        "--checkpoint",
        "model",
        "--text",
        "a.txt",
        "--text",
        "b.txt",
        "--compare",
        "second",
        "--max-tokens",
        "900",
    ]
    outputs = ["--output", "report.html", "--png-dir", "pictures", "--json", "numbers.json"]
    done = subprocess.run([sys.executable, str(TOOL), *arguments, *outputs], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("A token used ") and "written: report.html" in done.stdout
    numbers = json.loads((place / "numbers.json").read_text(encoding="utf-8"))
    assert numbers["sources"] == ["a.txt", "b.txt"] and numbers["num_null_experts"] == 4
    assert f"A token used {numbers['overall']['mean']:.2f} of 4 true experts" in done.stdout
    page = (place / "report.html").read_text(encoding="utf-8")
    assert page.count("<i class=") == numbers["overall"]["tokens"]
    pictures = {file.name for file in (place / "pictures").iterdir()}
    assert {"load_by_layer.png", "load_by_class_1.png", "expert_load.png", "difference_by_layer.png"} <= pictures
    with pytest.raises(UserError, match="--png-dir pictures has pictures already; choose another directory or add"):
        tool([*arguments, "--output", "second.html", "--png-dir", "pictures"])
    tool([*arguments, *outputs, "--overwrite"])
    assert (place / "report.html").read_text(encoding="utf-8") == page, "the same text gives the same page"


def test_what_is_not_read_is_said(place, tool, capsys):
    texts = ["--text", "a.txt", "--text", "b.txt", "--max-tokens", "50"]
    tool(["--checkpoint", "model", *texts, "--output", "part.html", "--json", "part.json"])
    files = json.loads((place / "part.json").read_text(encoding="utf-8"))["files"]
    assert [file["read"] for file in files] == [50, 0]
    partial = f"of the text was read: the first 50 of {files[0]['tokens']} tokens of a.txt; not read: b.txt"
    assert capsys.readouterr().out.splitlines()[-1] == f"written: part.html, part.json; only part {partial}"
    page = (place / "part.html").read_text(encoding="utf-8")
    assert page.count(partial) == 2, "in the head and in the summary"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--text", "missing.txt"],
            r"--text missing.txt cannot be read \(No such file or directory\); give a file of text",
        ),
        (["--text", "empty.txt"], r"--text empty.txt has no text; give another file"),
        (["--text", "latin1.txt"], r"--text latin1.txt is not UTF-8 at byte 1; convert it"),
        (["--output", "there.html"], r"--output there.html exists already; choose another name or add --overwrite"),
        (["--output", "no/where.html"], r"--output no/where.html: its directory does not exist; make it first"),
        (["--output", "model"], r"--output model is a directory; name a file in it"),
        (["--png-dir", "a.txt"], r"--png-dir a.txt is a file; name a directory"),
        (["--text", "missing.txt", "--png-dir", "new"], r"--text missing.txt cannot be read"),
        (["--max-tokens", "0"], r"--max-tokens 0: give 1 or more"),
        (["--context", "65"], r"--context 65: the model reads up to 64 tokens; give 2 to 64"),
        (["--checkpoint", "dense"], r"no layer with experts"),
        (["--checkpoint", "nothing"], r"--checkpoint nothing is not a directory"),
        (["--compare", "dense"], r"no layer with experts"),
        (["--compare", "other_tokens"], r"--compare other_tokens: its tokenizer cuts the text into other tokens"),
        (["--colour", "red"], r"unrecognized arguments: --colour red"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(tool, place, arguments, message):
    named = {"--checkpoint": "model", "--text": "a.txt", "--output": "refused.html"}
    named.update(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(UserError, match=message):
        tool([part for pair in named.items() for part in pair])
    assert not (place / "refused.html").exists() and not (place / "new").exists()
    assert (place / "there.html").read_text() == "kept"


def test_missing_text_is_refused(tool):
    with pytest.raises(UserError, match="--text"):
        tool(["--checkpoint", "model", "--output", "x.html"])
