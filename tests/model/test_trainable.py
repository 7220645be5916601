"""Names of weights to train, compared with those of a model."""

import pytest

from adamoe_dist.errors import UserError
from adamoe_dist.model import check_trainable

NAMES = ["decoder.layers.0.mlp.router.weight", "decoder.layers.0.self_attention.linear_proj.weight"]


def test_what_is_near_is_named_only_where_it_matches() -> None:
    check_trainable(["router", "attention", "decoder.layers.0.*"], NAMES)
    with pytest.raises(UserError, match="names 'routr', which matches no weight of the model; nearest: router"):
        check_trainable(["routr"], NAMES)
    with pytest.raises(UserError, match="names 'null_experts', which matches no weight") as caught:
        check_trainable(["null_experts"], NAMES)
    assert str(caught.value).count("null_experts") == 1
    check_trainable(["null_experts"], [*NAMES, "decoder.layers.0.mlp.router.null_weight"])
