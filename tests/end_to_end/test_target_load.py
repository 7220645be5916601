"""Training with ``moe.router.target_load``: the load settles at the target in every layer and stays there."""

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import REPOSITORY, metrics_of, one_process, run_command, torchrun

pytestmark = pytest.mark.end_to_end

WITHOUT_BALANCE = ["moe.router.balance.type=none", "moe.router.balance.final_coefficient=null"]
STEPS, SETTLED_AFTER, WINDOW = 400, 250, 50


def loads_of(run_dir: Path) -> dict[str, np.ndarray]:
    """The load of each MoE layer by logged step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("layers/true_experts_per_token/")]
    return {tag: np.array([event.value for event in events.Scalars(tag)]) for tag in tags}


@pytest.mark.slow
def test_a_held_run_resumes_bit_for_bit_and_reports_its_error(workspace) -> None:
    held = ["--config", "small.yaml", "moe.router.target_load=1.2", "train.steps=20", "schedule.total_steps=40"]
    goal = ["train.steps=40", "checkpoint.resume=auto"]
    done = [
        run_command(command, workspace)
        for command in (
            one_process(*held, "run.dir=runs/held", "train.steps=40"),
            one_process(*held, "run.dir=runs/held_broken"),
            one_process(*held, "run.dir=runs/held_broken", *goal),
            torchrun(2, *held, "run.dir=runs/held_two"),
        )
    ]
    assert all(finished.returncode == 0 for finished in done), done
    unbroken = metrics_of(workspace / "runs" / "held")
    assert metrics_of(workspace / "runs" / "held_broken") == unbroken
    assert [record["step"] for record in unbroken if "target_load_error" not in record] == [0]
    for mine, theirs in zip(metrics_of(workspace / "runs" / "held_two"), unbroken, strict=False):
        assert mine.get("true_experts_per_token", 0) == pytest.approx(theirs.get("true_experts_per_token", 0), rel=0.02)
    started = run_command(
        one_process(
            "--config", "small.yaml", "run.dir=runs/free_to_held", "train.steps=1", "moe.router.target_load=1.8",
            f"checkpoint.load_weights={workspace / 'runs' / 'held'}",
        ),
        workspace,
    )  # fmt: skip
    assert started.returncode == 0 and "selection bias of every layer starts at 0" not in started.stdout
    refused = run_command(
        one_process(
            "--config", "small.yaml", "run.dir=runs/held_to_free", f"checkpoint.load_weights={workspace}/runs/held"
        ),
        workspace,
    )  # fmt: skip
    assert refused.returncode == 2 and "moe.router.target_load is 1.2 there, None here" in refused.errors[0]


@pytest.mark.slow
def test_the_load_settles_at_the_target_in_real_training(workspace) -> None:
    """Two runs at a time: below and above k n / (n + m) = 1.5, with a balance loss that pulls to 1.5 and with none.

    A batch of 3,072 tokens of the same text differs from the mean by 2 to 4 %, so that means of 50 steps are judged.
    """
    data = prepared_standard_library(workspace)
    runs = {
        f"{target}_{name}": [f"moe.router.target_load={target}", *balance]
        for target in (1.2, 1.8)
        for name, balance in (("balanced", []), ("free", WITHOUT_BALANCE))
    }
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        waiting = {
            name: pool.submit(
                run_command,
                one_process("--config", str(REPOSITORY / "configs/quickstart.yaml"), *SHRUNK, *data, *changes,
                            f"run.dir=runs/load_{name}"),
                workspace,
                600,
                {"OMP_NUM_THREADS": "1"},
            )
            for name, changes in runs.items()
        }  # fmt: skip
        finished = {name: future.result() for name, future in waiting.items()}
    for name, done in finished.items():
        assert done.returncode == 0, done.stderr
        target = float(name.split("_")[0])
        for tag, loads in loads_of(workspace / "runs" / f"load_{name}").items():
            off = np.convolve(loads[SETTLED_AFTER:], np.ones(WINDOW) / WINDOW, "valid") / target - 1
            print(f"{name} {tag}: largest deviation of a {WINDOW}-step mean {abs(off).max():.2%}")
            assert len(loads) == STEPS and abs(off).max() < 0.02, (name, tag)
        last = json.loads((workspace / "runs" / f"load_{name}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["target_load_error"] < 0.25


SHRUNK = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "moe.expert_hidden_size=64",
    f"train.steps={STEPS}",
    "train.validation_interval=null",
    "train.validation_samples=8",
    "checkpoint.interval=null",
    "monitor.log_interval=1",
    "monitor.sample_tokens=0",
]


def prepared_standard_library(workspace: Path) -> list[str]:
    """The quickstart's text and tokenizer, prepared by a run of one step; the keys that name them."""
    base = workspace / "library"
    data = [
        f"data.train=[{{path: {base}/corpus_train}}]",
        f"data.validation=[{{path: {base}/corpus_validation}}]",
        f"data.tokenizer={base}/tokenizer",
    ]
    command = one_process(
        "--config", str(REPOSITORY / "configs/quickstart.yaml"), *SHRUNK, *data, "train.steps=1", "run.dir=runs/prepare"
    )
    done = run_command(command, workspace)
    assert done.returncode == 0, done.stderr
    return data
