"""The tags: on the first page, among the hyper-parameters' metrics, and in the documentation."""

import dataclasses
import math
import re

import pytest
import torch

from adamoe_dist.config import Config, config_from_dict, leaves
from adamoe_dist.errors import UserError
from adamoe_dist.monitoring import QUESTIONS, check_wandb, hyperparameters
from adamoe_dist.monitoring.hyperparameters import METRICS, api_pb2, hyperparameter_types
from adamoe_dist.monitoring.pictures import EXPERT_LOAD, TRUE_EXPERTS, TRUE_EXPERTS_OF_LAYER, TRUE_EXPERTS_OF_TOKENS
from adamoe_dist.routing import SUMS, RoutingStatistics
from adamoe_dist.training.metrics import entropy, routing_record
from adamoe_dist.training.writers import TAGS, scalars_of
from tests.config.test_keys import PACKAGE

TABLE = (PACKAGE.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")
EXPLAINED = re.findall(r"^\| `([^`.]+)` \| ([^|]+) \| ([^|]+) \|$", TABLE, re.MULTILINE)
PATTERNS = [re.compile(tag) for charts in QUESTIONS.values() for tags in charts.values() for tag in tags]


def all_scalars() -> set[str]:
    """Every tag of a scalar that there can be, layers as NN."""
    statistics = RoutingStatistics.unpacked(torch.tensor([1, 2, 3, 4, 4]), 2)
    layer = routing_record(dict.fromkeys(SUMS, 1.0), statistics, top_k=2)
    layer = dataclasses.replace(layer, expert_bias_min=-1.0, expert_bias_max=1.0)
    tags = scalars_of(dict.fromkeys(TAGS, 1), {7: layer})
    return {re.sub(r"/07$", "/NN", tag) for tag in tags}


def test_every_tag_is_explained_with_a_unit_and_nothing_else_is() -> None:
    pictures = {EXPERT_LOAD, TRUE_EXPERTS, TRUE_EXPERTS_OF_TOKENS, f"{TRUE_EXPERTS_OF_LAYER}/NN", "sample"}
    names = [tag for tag, _, _ in EXPLAINED]
    assert len(names) == len(set(names))
    written = all_scalars() | pictures
    assert written <= set(names), written - set(names)
    invented = {tag for tag in set(names) - written if not any(pattern.fullmatch(tag) for pattern in PATTERNS)}
    assert not invented
    assert all(unit.strip() and len(meaning.strip()) > 10 for _, unit, meaning in EXPLAINED)


def test_each_chart_names_tags_that_there_are() -> None:
    names = [tag for tag, _, _ in EXPLAINED]
    for pattern in PATTERNS:
        assert any(pattern.fullmatch(name) for name in names), pattern.pattern
    assert set(METRICS) <= all_scalars()


def test_the_first_page_has_no_line_for_each_layer() -> None:
    of_layers = [tag for tag in all_scalars() if tag.endswith("/NN")]
    assert of_layers and not [tag for tag in of_layers if any(pattern.fullmatch(tag) for pattern in PATTERNS)]


def test_hyperparameters_have_the_declared_types_and_say_nothing_of_null() -> None:
    types = hyperparameter_types()
    config = config_from_dict({"moe": {"router": {"target_load": 1.5}}, "parallel": {"expert": 2}})
    values = hyperparameters(config)
    assert values["moe.router.target_load"] == 1.5 and "model.head_dim" not in values
    assert values["parallel.expert"] == "2", "auto is a value of this key"
    assert values["zero.stage"] == config.zero.stage and types["zero.stage"] == api_pb2.DATA_TYPE_FLOAT64
    assert types["moe.null_types.identity"] == api_pb2.DATA_TYPE_FLOAT64
    assert types["moe.dispatcher.pad_to_capacity"] == api_pb2.DATA_TYPE_BOOL
    assert types["train.precision"] == api_pb2.DATA_TYPE_STRING
    declared = {path for path, _, _ in leaves(Config)}
    assert set(types) <= declared and 40 < len(types) < 80
    assert not {"run.name", "data.train", "moe.dense_layers", "zero.deepspeed", "monitor.csv"} & set(types)


def test_entropy_is_that_of_the_distribution() -> None:
    assert entropy([5, 5, 5, 5]) == pytest.approx(math.log(4))
    assert entropy([0, 7, 0]) == 0 and entropy([0, 0]) == 0
    assert entropy([1, 3]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_wandb_is_refused_where_it_is_missing() -> None:
    check_wandb(config_from_dict({}))
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"monitor.wandb.project=mine needs the package wandb, .*pip install wandb"):
            check_wandb(config_from_dict({"monitor": {"wandb": {"project": "mine"}}}))
