"""What TensorBoard, CSV files and JSON lines hold after a resumption, and on a disk that is full."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adamoe_dist.config import config_from_dict
from adamoe_dist.errors import UserError
from adamoe_dist.monitoring import CsvWriter, RoutingCounts, TensorBoardWriter, WandbWriter, event_lists
from adamoe_dist.training.writers import Board
from tests.disk import small_files

COUNTS = RoutingCounts([0, 1], np.array([[1, 2, 3], [0, 4, 2]]), np.array([[5, 3], [2, 6]]))


def write(directory: Path, first_step: int, steps: list[int], extra: str | None = None) -> None:
    """What a run does that goes on after ``first_step``."""
    writer = TensorBoardWriter(directory, first_step)
    writer.write_start(config_from_dict({}))
    for step in steps:
        writer.write_scalars({"loss/lm": step + 0.5}, step)
        writer.write_routing(COUNTS, step)
        if extra:
            writer.write_text(extra, f"text of step {step}", step)
    writer.close()


def read(directory: Path) -> dict[str, list[int]]:
    """The steps of each tag, as TensorBoard's own reader finds them, without what START or a restart could hide."""
    events = EventAccumulator(str(directory), purge_orphaned_data=False).Reload()
    tags = events.Tags()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
    return found | {tag: [event.step for event in events.Tensors(tag)] for tag in tags["tensors"]}


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Scalars that are written again, and pictures and texts that are not."""
    write(tmp_path, 0, [2, 4, 6, 8], extra="sample")
    (file,) = tmp_path.iterdir()
    with file.open("ab") as end:
        end.write(file.read_bytes()[40:90])  # the run was killed within a record
    write(tmp_path, 4, [5, 7])
    found = read(tmp_path)
    assert found["loss/lm"] == [2, 4, 5, 7]
    assert found["heat_map/expert_load"] == [2, 4, 5, 7] and found["heat_map/true_experts"] == [2, 4, 5, 7]
    assert found["sample/text_summary"] == [2, 4]
    write(tmp_path, 7, [9], extra="sample")
    assert read(tmp_path)["loss/lm"] == [2, 4, 5, 7, 9] and read(tmp_path)["sample/text_summary"] == [2, 4, 9]
    assert len(list(tmp_path.iterdir())) == 3


def test_tensorboard_begins_anew_with_a_run_that_does(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    write(tmp_path, 0, [2, 4], extra="sample")
    write(tmp_path, 0, [3])
    found = read(tmp_path)
    assert found["loss/lm"] == [3] and "sample/text_summary" not in found
    assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "mine.txt").read_text() == "kept"


def test_files_that_hold_nothing_later_are_not_touched(tmp_path: Path) -> None:
    write(tmp_path, 0, [2, 4])
    (file,) = tmp_path.iterdir()
    inode = file.stat().st_ino
    write(tmp_path, 4, [6])
    assert file.stat().st_ino == inode


@pytest.fixture
def csv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    return tmp_path / "csv"


def test_csv_files_of_others_are_left_alone_and_lines_that_were_cut_off_are_not_kept(csv_files: Path) -> None:
    csv_files.mkdir()
    others = {"notes.csv": "step,words\nwarm,x\n", "mine.csv": "a,b,c\n1,2,3\n"}
    for name, text in others.items():
        (csv_files / name).write_text(text)
    (csv_files / "loss_lm.csv").write_bytes(b"step,lm\r\n2,1.5\r\n4,1.25\r\n6,1.0\r\n1,0.")
    (csv_files / "loss_z.csv").write_bytes(b"step,z\r\n2,1.5\r\n4,1.2")
    CsvWriter(csv_files.parent, 4).write_scalars({"loss/lm": 3.0, "loss/z": 3.0}, 6)
    assert (csv_files / "loss_lm.csv").read_text().split() == ["step,lm", "2,1.5", "4,1.25", "6,3.0"]
    assert (csv_files / "loss_z.csv").read_text().split() == ["step,z", "2,1.5", "6,3.0"]
    CsvWriter(csv_files.parent, 0)
    assert {path.name: path.read_text() for path in csv_files.iterdir()} == others


def test_a_full_disk_costs_the_numbers_and_not_the_training(csv_files: Path, caplog) -> None:
    run_dir = csv_files.parent
    config = config_from_dict({"run": {"dir": str(run_dir)}, "monitor": {"csv": True, "image_interval": 2}})
    board = Board(config, first_step=0)
    before = {path: path.stat().st_size for path in run_dir.rglob("*") if path.is_file()}
    with small_files(8):
        board.write({"step": 2, "lm_loss": 1.0}, {})
        board.write_text("sample", "text", 2)
        board.write({"step": 4, "lm_loss": 1.0}, {})
        board.finish()
    assert len(caplog.messages) == 2, caplog.messages
    assert "tfevents" in caplog.messages[0] and "CSV files: nothing more is written" in caplog.messages[1]
    assert {path: path.stat().st_size for path in before} == before
    board.write({"step": 6, "lm_loss": 1.0}, {})
    board.close()
    assert read(run_dir / "tensorboard")["loss/lm"] == [6]


def stand_in(monkeypatch: pytest.MonkeyPatch, **members: Any) -> Any:
    """Put something in the place of the package."""
    wandb = SimpleNamespace(Error=type("Error", (Exception,), {}), run=None, finish=lambda: None, **members)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("WANDB_NAME", "WANDB_DIR"):
        monkeypatch.setenv(name, "x")  # what the writer sets is gone afterwards
    return wandb


def test_wandb_that_refuses_a_run_is_one_line(tmp_path: Path, monkeypatch) -> None:
    wandb = stand_in(monkeypatch)

    def refuse(_: Any) -> None:
        raise wandb.Error("api_key not configured (no-tty)")

    monkeypatch.setattr(event_lists, "WandbMonitor", refuse)
    config = config_from_dict({"run": {"dir": str(tmp_path)}, "monitor": {"wandb": {"project": "mine"}}})
    with pytest.raises(UserError, match=r"monitor.wandb.project=mine: .*api_key not configured.*WANDB_MODE=offline"):
        WandbWriter(config)


def test_wandb_that_fails_later_is_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    wandb = stand_in(monkeypatch)

    def fail(_: Any) -> None:
        raise wandb.Error("no network")

    monkeypatch.setattr(event_lists, "WandbMonitor", lambda _: SimpleNamespace(write_events=fail))
    monitor = {"wandb": {"project": "mine"}, "tensorboard": False}
    board = Board(config_from_dict({"run": {"dir": str(tmp_path)}, "monitor": monitor}), first_step=0)
    board.write({"step": 1, "lm_loss": 1.0}, {})
    board.write({"step": 2, "lm_loss": 1.0}, {})
    board.close()
    assert caplog.messages == ["warning: Weights & Biases: nothing more is written (no network); the training goes on"]
