import pytest
import yaml

from adamoe_dist.config import Config, config_from_dict, leaves, load_config
from adamoe_dist.errors import UserError


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_round_trip_through_yaml(tmp_path) -> None:
    config = config_from_dict({"moe": {"top_k": 2, "router": {"balance": {"coefficient": 1e-3}}}})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_one_text_is_a_list_of_one_and_all_is_all() -> None:
    for given, meant in (("router", ["router"]), (["router"], ["router"]), ("all", "all"), (["all"], "all")):
        assert config_from_dict({"finetune": {"trainable": given}}).finetune.trainable == meant
    assert config_from_dict({"checkpoint": {"allow_changes": "schedule"}}).checkpoint.allow_changes == ["schedule"]
    assert "must be" in refusal(lambda: config_from_dict({"finetune": {"trainable": 3}}))


def test_overrides_are_yaml_and_apply_in_order(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 5}\n")
    config = load_config(
        path,
        [
            "train.steps=7",
            "train.steps=8",
            "optimizer.learning_rate=1e-4",
            "data.train=[{path: a, weight: 2}]",
            "run.dir=null",
            "moe.dispatcher.deduplicate=false",
            "parallel.expert=2",
        ],
    )
    assert config.train.steps == 8
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.train == [{"path": "a", "weight": 2}]
    assert config.run.dir is None and config.moe.dispatcher.deduplicate is False and config.parallel.expert == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=5", "unknown key train.stepz; did you mean train.steps?"),
        ("top_k=2", "did you mean moe.top_k?"),
        ("moe.router.balance.coeficient=1", "did you mean moe.router.balance.coefficient?"),
        ("train.steps=ten", "train.steps='ten' must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5 must be a whole number"),
        ("train.steps=true", "train.steps=True must be a whole number"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0 must be greater than 0"),
        ("optimizer.learning_rate=.nan", "must be a finite number"),
        ("optimizer.beta1=1.0", "optimizer.beta1=1.0 must be smaller than 1"),
        ("zero.stage=4", "zero.stage=4 must be one of 0 | 1 | 2 | 3"),
        ("moe.router.type=best", "moe.router.type='best' must be one of adamoe | topk"),
        ("moe.router.capacity_factor=0", "moe.router.capacity_factor=0 must be greater than 0"),
        ("moe.router.balance.target_null_share=1", "moe.router.balance.target_null_share=1 must be smaller than 1"),
        ("moe.null_types.identity=-1", "moe.null_types.identity=-1 must be at least 0"),
        ("parallel.expert=many", "parallel.expert='many' must be a whole number or one of auto"),
        ("monitor.tensorboard=1", "monitor.tensorboard=1 must be true or false"),
        ("train=5", "train=5 must be a mapping of keys"),
        ("train.steps", "is not section.key=value"),
        ("train.steps=[1", "the value is not valid YAML"),
    ],
)
def test_refusals_of_one_override(tmp_path, override: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{}\n")
    assert expected in refusal(lambda: load_config(path, [override]))


def test_all_problems_are_named_together(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {stepz: 1}\nmoe: {top_k: none}\n")
    message = refusal(lambda: load_config(path, ["zero.stage=5"]))
    assert message.startswith("3 problems:")
    assert "train.stepz" in message and "moe.top_k='none'" in message and "zero.stage=5" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"- a\n", "must be a mapping"),
        (b"a: [1\n", "not valid YAML"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "given twice"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_refused_files(tmp_path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = refusal(lambda: load_config(path))
    assert expected in " ".join(message.split()) and str(path) in message


def test_missing_file_is_refused(tmp_path) -> None:
    assert "no such file" in refusal(lambda: load_config(tmp_path / "none.yaml"))


def test_every_key_has_documentation() -> None:
    for path, field, _ in leaves(Config):
        assert len(field.metadata["doc"]) > 10, path


def test_yaml_of_the_tree_has_no_python_objects() -> None:
    assert yaml.safe_load(Config().to_yaml()) == Config().to_dict()
