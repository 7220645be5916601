"""A report's files: whole or not at all, and never in the place of something else."""

import json
import os

import pytest

from adamoe_dist.console import say
from adamoe_dist.errors import UserError
from adamoe_dist.inspection import Outputs, analyse, summarise, write_report
from tests.inspection.records import PHRASE, routing_of, text_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("kept")
    (tmp_path / "link.html").symlink_to("text.txt")
    (tmp_path / "pictures").mkdir()
    return tmp_path


def outputs_of(page="page.html", json_file=None, png_dir=None):
    from pathlib import Path

    return Outputs(Path(page), json_file and Path(json_file), png_dir and Path(png_dir))


def analysis_of(layers=2, other=False):
    tokens = PHRASE * 4
    second = routing_of(len(tokens), layers=layers, seed=3) if other else None
    return analyse(text_of(tokens), routing_of(len(tokens), layers=layers), second)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (("text.txt",), r"--output text.txt is --text text.txt as well; choose another place"),
        (("link.html",), r"--output link.html is --text text.txt as well"),
        (("a", "pictures/../a"), r"--json pictures/../a is --output a as well"),
        (("a", None, "a"), r"--png-dir a is --output a as well"),
        (("pictures/expert_load.png", None, "pictures"), r"--output \S+ has the name of a picture of --png-dir"),
        (("a", "pictures"), r"--json pictures is a directory; name a file in it"),
        (("a", None, "text.txt/new"), r"--png-dir text.txt/new: \S+/text.txt cannot be written; choose another"),
    ],
)
def test_places_are_refused_before_anything(place, outputs, message):
    with pytest.raises(UserError, match=message):
        outputs_of(*outputs).check(["text.txt"], overwrite=True)
    assert (place / "text.txt").read_text() == "kept" and not (place / "a").exists()


def test_a_file_that_cannot_be_written_leaves_all_as_it_was(place, monkeypatch):
    (place / "page.html").write_text("old")
    before = sorted(place.iterdir())
    full = OSError(28, "No space left on device")
    write = type(place).write_bytes

    def write_bytes(path, data):
        write(path, data[:10])
        if "coactivation_layer_003.png" in path.name:
            raise full

    monkeypatch.setattr(type(place), "write_bytes", write_bytes)
    outputs = outputs_of("page.html", "numbers.json", "new/pictures")
    outputs.check([], overwrite=True)
    with pytest.raises(
        UserError, match=r"--png-dir new/pictures/coac\S+ cannot be written \(No space left on device\)"
    ):
        write_report(analysis_of(), outputs)
    assert sorted(place.iterdir()) == before and (place / "page.html").read_text() == "old"


def test_pictures_of_an_earlier_report_go_and_others_stay(place):
    outputs = outputs_of("page.html", None, "pictures")
    write_report(analysis_of(layers=3, other=True), outputs)
    (place / "pictures" / "mine.png").write_text("mine")
    written = write_report(analysis_of(layers=1), outputs)
    left = {path.name for path in (place / "pictures").iterdir()}
    assert left == {path.name for path in written if path.suffix == ".png"} | {"mine.png"}
    assert "coactivation_layer_001.png" in left and (place / "pictures" / "mine.png").read_text() == "mine"


def test_a_name_that_is_not_utf8(place, capsys):
    name = os.fsdecode(b"caf\xe9.txt")
    analysis = analysis_of()
    object.__setattr__(analysis.text, "sources", (name,))
    object.__setattr__(analysis.routing, "description", name)
    write_report(analysis, outputs_of("page.html", "numbers.json"))
    assert json.loads((place / "numbers.json").read_text())["sources"] == [name]
    assert "caf\ufffd.txt" in (place / "page.html").read_text(encoding="utf-8")
    for sentence in [*summarise(analysis), name]:
        say(sentence)
    assert "caf\\udce9.txt" in capsys.readouterr().out
