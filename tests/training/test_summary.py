"""What the last lines say, and what of a text reaches a terminal."""

from pathlib import Path

from adamoe_dist.training.sampling import printable
from adamoe_dist.training.summary import _with_other_runs


def test_tensorboard_is_shown_a_run_or_the_runs_beside_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    (run_dir / "tensorboard").mkdir(parents=True)
    (tmp_path / "no run").mkdir()
    assert _with_other_runs(run_dir) == run_dir
    (tmp_path / "b" / "tensorboard").mkdir(parents=True)
    assert _with_other_runs(run_dir) == tmp_path


def test_a_sample_cannot_command_the_terminal() -> None:
    assert printable("line\n\ttab \x1b[2J \r \x9b é \x00") == "line\n\ttab \\x1b[2J \\r \\x9b é \\x00"
