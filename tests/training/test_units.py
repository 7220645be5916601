import json
from types import SimpleNamespace

import pytest

from adamoe_dist.config import config_from_dict
from adamoe_dist.errors import UserError
from adamoe_dist.parallel import optimizer as optimizer_module
from adamoe_dist.training.display import duration
from adamoe_dist.training.schedules import balance_coefficient, learning_rate
from adamoe_dist.training.writers import LAYER_SCALARS, Board, JsonlWriter


def test_learning_rate_warms_up_then_decays_to_the_floor() -> None:
    config = config_from_dict(
        {
            "optimizer": {"learning_rate": 1.0},
            "schedule": {"warmup_steps": 4, "final_fraction": 0.1},
            "train": {"steps": 24},
        }
    )
    assert [learning_rate(config, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 4) == 1.0
    assert learning_rate(config, 14) == pytest.approx(0.55)
    assert learning_rate(config, 24) == pytest.approx(0.1)
    assert learning_rate(config, 99) == pytest.approx(0.1)
    falling = [learning_rate(config, step) for step in range(4, 25)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("decay", "middle", "end"), [("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_other_decays(decay: str, middle: float, end: float) -> None:
    config = config_from_dict(
        {"optimizer": {"learning_rate": 1.0}, "schedule": {"decay": decay}, "train": {"steps": 20}}
    )
    assert learning_rate(config, 10) == pytest.approx(middle)
    assert learning_rate(config, 20) == pytest.approx(end)


def test_schedule_is_laid_out_for_total_steps_not_for_where_the_run_stops() -> None:
    whole = config_from_dict({"train": {"steps": 40}})
    half = config_from_dict({"train": {"steps": 20}, "schedule": {"total_steps": 40}})
    for step in range(20):
        assert learning_rate(whole, step) == learning_rate(half, step)
        assert balance_coefficient(whole, step) == balance_coefficient(half, step)


def test_balance_coefficient_anneals_linearly() -> None:
    balance = {"coefficient": 0.02, "final_coefficient": 0.0001}
    config = config_from_dict({"moe": {"router": {"balance": balance}}, "train": {"steps": 10}})
    assert balance_coefficient(config, 0) == 0.02
    assert balance_coefficient(config, 5) == pytest.approx(0.01005)
    assert balance_coefficient(config, 10) == 0.0001
    quick = config_from_dict({"moe": {"router": {"balance": {**balance, "anneal_steps": 2}}}})
    assert balance_coefficient(quick, 2) == 0.0001
    off = config_from_dict({"moe": {"router": {"balance": {"type": "none"}}}})
    assert balance_coefficient(off, 3) == 0.0


def test_jsonl_drops_what_a_resumed_run_will_write_again(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 10, 20, 30)) + '{"step": 4')
    writer = JsonlWriter(path, first_step=20)
    writer.write({"step": 30, "lm_loss": 1.5})
    writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1])["lm_loss"] == 1.5


def test_what_is_not_finite_is_null_in_json(tmp_path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl", first_step=0)
    writer.write({"step": 1, "lm_loss": float("nan"), "grad_norm": float("inf")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "lm_loss": null, "grad_norm": null}\n'


def test_a_new_run_starts_an_empty_file(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 10}\n')
    JsonlWriter(path, first_step=0).close()
    assert path.read_text() == ""


@pytest.mark.parametrize(("interval", "steps"), [(4, [2, 4, 10]), (None, [10])])
def test_counts_are_kept_without_tensorboard_and_end_with_the_run(tmp_path, interval, steps) -> None:
    changes = {"tensorboard": False, "image_interval": interval}
    config = config_from_dict({"run": {"dir": str(tmp_path)}, "monitor": changes})
    layer = SimpleNamespace(
        **dict.fromkeys(LAYER_SCALARS, 1.0),
        rows={},
        sent_bytes={},
        tokens_by_load=(1, 2),
        tokens_by_expert=(2, 0),
    )
    board = Board(config, first_step=0)
    for step in (2, 4, 6, 10):
        board.write({"step": step}, {3: layer}, is_last=step == 10)
    board.close()
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [line.pop("step") for line in lines] == steps
    assert lines[-1] == {"layers": [3], "tokens_by_true_experts": [[1, 2]], "tokens_by_expert": [[2, 0]]}
    assert [path.name for path in tmp_path.iterdir()] == ["routing.jsonl"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_apex_is_refused_where_it_is_missing() -> None:
    config = config_from_dict({"optimizer": {"implementation": "apex"}})
    with pytest.raises(UserError, match=r"optimizer.implementation=apex: NVIDIA apex is not installed"):
        optimizer_module.choose_implementation(config)
    assert optimizer_module.choose_implementation(config_from_dict({})) == (
        "torch",
        "auto: NVIDIA apex is not installed",
    )


def test_the_unrelated_package_named_apex_is_recognised(monkeypatch) -> None:
    def fake_import(name: str):
        if name == "apex":
            return SimpleNamespace()
        raise ImportError(name)

    monkeypatch.setattr(optimizer_module.importlib, "import_module", fake_import)
    assert "is not NVIDIA apex" in str(optimizer_module.apex_problem())


def test_every_metric_of_the_interface_has_a_tensorboard_tag() -> None:
    from adamoe_dist.training.writers import TAGS

    promised = (
        "lm_loss balance_loss z_loss grad_norm learning_rate step_time_s tokens_per_second true_experts_per_token "
        "true_experts_per_token_min true_experts_per_token_max expert_max_over_mean "
        "null_share all_null_share dropped_share dispatch_rows dispatch_bytes dispatch_rows_undeduplicated "
        "dispatch_bytes_same_node dispatch_bytes_other_node score_entropy "
        "dispatch_rows_same_rank dispatch_rows_same_node dispatch_rows_other_node "
        "expert_flops_saved target_load_error memory_peak_gib loss_scale skipped_steps bad_steps loss_spikes "
        "save_stall_s save_write_s saves_failed model_flops_per_second mfu "
        "time_data_s time_forward_s time_routing_s time_dispatch_s time_experts_s time_combine_s time_backward_s "
        "time_pipeline_s time_optimizer_s time_other_s time_save_s "
        "validation_loss validation_bits_per_byte"
    )
    assert set(promised.split()) == set(TAGS)
