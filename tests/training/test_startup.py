"""The lines of the start-up report that nothing else computes."""

from adamoe_dist.config import Layout, config_from_dict
from adamoe_dist.training.startup import checkpoint_words, places


def layout(world: int, expert: int, expert_tensor: int = 1) -> Layout:
    return Layout(
        world_size=world,
        tensor=1,
        pipeline=1,
        context=1,
        data=world,
        expert=expert,
        expert_tensor=expert_tensor,
        expert_data=world // (expert * expert_tensor),
    )


def test_places_name_the_ranks_that_exchange_rows() -> None:
    nodes = [rank // 8 for rank in range(16)]
    assert places(layout(2, 2), [0, 0]) == "places: one node; ranks 0-1 share a layer's experts"
    assert places(layout(1, 1), [0]) == "places: one node; every rank has all experts of its layers"
    assert places(layout(16, 8), nodes) == (
        "places: 2 nodes (0-7, 8-15); ranks 0-7, 8-15 share a layer's experts, within a node"
    )
    assert places(layout(16, 8, 2), nodes).endswith("ranks 0-15 share a layer's experts, across nodes")
    assert places(layout(1024, 2), [rank // 8 for rank in range(1024)]).endswith(
        "ranks 0-1, 2-3, 4-5, 6-7 and 508 more such groups share a layer's experts, within a node"
    )


def test_checkpoints_in_words() -> None:
    words = checkpoint_words(
        config_from_dict(
            {
                "run": {"dir": "x"},
                "checkpoint": {"interval": 5, "keep_last": 2, "keep_every": 50, "time_limit_minutes": 9},
            }
        )
    )
    assert words == (
        "checkpoints: every 5 steps and after the last, or after 9 minutes, the last 2 kept, and those of every 50 "
        "steps, in x/checkpoints"
    )
    assert "after the last step, all kept" in checkpoint_words(config_from_dict({"run": {"dir": "x"}}))
