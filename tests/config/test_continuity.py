"""Every key has one rule for a run that continues, and only what changes its numbers can be named."""

import pytest

from adamoe_dist.config import Config, config_from_dict, leaves, resolve
from adamoe_dist.config.continuity import RULES, rule_of
from adamoe_dist.errors import UserError

DATA = {"tokenizer": "t", "train": [{"path": "p"}]}


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    paths = [path for path, _, _ in leaves(Config)]
    assert [path for path in paths if rule_of(path) is None] == []
    governing = {rule_of(path) for path in paths}
    assert [rule.key for rule in RULES if rule not in governing] == []
    assert len({rule.key for rule in RULES}) == len(RULES)


def refusal(names: list[str], resume: str = "auto") -> str:
    tree = {"data": DATA, "checkpoint": {"allow_changes": names, "resume": resume}}
    with pytest.raises(UserError) as caught:
        resolve(config_from_dict(tree), 1)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_that_allow() -> None:
    names = [
        "optimizer.learning_rate",
        "schedule",
        "optimizer",
        "moe.router.balance",
        "moe.router",
        "data.train",
        "train",
    ]
    resolve(config_from_dict({"data": DATA, "checkpoint": {"allow_changes": names, "resume": "auto"}}), 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimizer.lerning_rate", "unknown key optimizer.lerning_rate; did you mean optimizer.learning_rate?"),
        ("optim", "unknown key optim; "),
        (
            "model.hidden_size",
            "model.hidden_size, which a continued run cannot change (shapes and meaning of the weights)",
        ),
        ("model", "model, which a continued run cannot change"),
        ("moe.num_experts", "(shape of the experts and of the router)"),
        ("optimizer.type", "(moments in the checkpoint)"),
        ("run.seed", "(order of the data)"),
        ("parallel", "parallel, which may change unnamed"),
        ("train.steps", "may change unnamed (where the run stops; what follows from it is schedule.total_steps)"),
    ],
)
def test_names_that_are_refused(name: str, expected: str) -> None:
    message = refusal(["schedule", name])
    assert message.startswith("checkpoint.allow_changes names ") and expected in message


def test_nothing_to_allow_without_a_checkpoint() -> None:
    assert "does nothing without checkpoint.resume" in refusal(["schedule"], resume="none")


def test_a_continued_run_may_go_on_after_its_schedule() -> None:
    tree = {"data": DATA, "train": {"steps": 100}, "schedule": {"total_steps": 50}}
    with pytest.raises(UserError, match=r"schedule\.total_steps=50 is less than train\.steps=100"):
        resolve(config_from_dict(tree), 1)
    resolve(config_from_dict({**tree, "checkpoint": {"resume": "auto"}}), 1)
