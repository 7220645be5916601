"""Every generator goes on with the numbers that it would have given."""

import random

import numpy as np
import pytest
import torch

from adamoe_dist.platform import random_states, restore_random_states


def draws() -> list[float]:
    """Of each generator: uniform and normal numbers, single and many; normal ones come in pairs, of which one waits."""
    values = [random.random(), random.gauss(0, 1), float(random.getrandbits(70))]
    values += [np.random.rand(), np.random.randn(), float(np.random.randint(2**31)), *np.random.permutation(5)]
    return [*values, *torch.randn(3).tolist(), *torch.rand(2).tolist()]


@pytest.mark.parametrize("before", [0, 1, 200, 624])
@pytest.mark.parametrize("normals", [0, 1])
def test_restored_states_give_the_same_numbers(before: int, normals: int) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    for _ in range(before):
        random.random(), np.random.randint(9), torch.rand(1)
    for _ in range(normals):
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    states = random_states()
    assert {state.dtype for state in states.values()} == {torch.uint8}
    exact = random.getstate(), np.random.get_state()
    expected = [draws() for _ in range(700)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert draws() != expected[0]
    restore_random_states({name: state.clone() for name, state in states.items()})
    assert random.getstate() == exact[0]
    for mine, theirs in zip(np.random.get_state(), exact[1], strict=True):
        assert np.array_equal(mine, theirs)
    assert [draws() for _ in range(700)] == expected


def test_states_have_one_length_and_what_is_not_given_is_left() -> None:
    random.seed(1)
    first = {name: state.numel() for name, state in random_states().items()}
    random.gauss(0, 1), np.random.randn()
    assert {name: state.numel() for name, state in random_states().items()} == first
    assert {"cpu", "python", "numpy"} <= first.keys()
    states, before = random_states(), np.random.get_state()[1].copy()
    random.random(), torch.rand(1)
    restore_random_states({"python": states["python"]})
    assert torch.equal(random_states()["python"], states["python"])
    assert not torch.equal(random_states()["cpu"], states["cpu"])
    assert np.array_equal(np.random.get_state()[1], before)
