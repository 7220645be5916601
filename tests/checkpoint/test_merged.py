"""Weights with low-rank adapters, read block by block as the model computes with them."""

from pathlib import Path

import pytest
import torch

from adamoe_dist.checkpoint import MergedReader, WeightsWriter, merge_lora
from adamoe_dist.config import Config

QKV, EXPERTS = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.mlp.experts"
SHAPES = {
    f"{QKV}.weight": (12, 6),
    f"{QKV}.bias": (12,),
    f"{QKV}.lora.a": (2, 6),
    f"{QKV}.lora.b": (12, 2),
    f"{EXPERTS}.weight1": (3, 8, 6),
    f"{EXPERTS}.weight2": (3, 6, 4),
    f"{EXPERTS}.lora.a1": (3, 2, 6),
    f"{EXPERTS}.lora.b1": (3, 8, 2),
    f"{EXPERTS}.lora.a2": (3, 2, 4),
    f"{EXPERTS}.lora.b2": (3, 6, 2),
}
ALPHA = 5.0


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors) -> Path:
    tree = Config().to_dict()
    tree["finetune"]["lora"] |= {"rank": 2, "alpha": ALPHA}
    with WeightsWriter(tmp_path_factory.mktemp("adapted")) as writer:
        for name, value in tensors.items():
            writer.add(name, tuple(value.shape), (0,) * value.dim(), value)
        return writer.finish(tree, None)


def test_every_block_is_that_of_the_merged_weights(checkpoint, tensors):
    merged = merge_lora(tensors, ALPHA)
    with MergedReader(checkpoint) as reader:
        assert {key for key in reader.index if key.startswith("model.")} == {f"model.{name}" for name in merged}
        for name, whole in merged.items():
            read = reader.read(f"model.{name}", (0,) * whole.dim(), tuple(whole.shape))
            torch.testing.assert_close(read, whole)
        part = reader.read(f"model.{QKV}.weight", (5, 2), (4, 3))
        torch.testing.assert_close(part, merged[f"{QKV}.weight"][5:9, 2:5])
        part = reader.read(f"model.{EXPERTS}.weight2", (1, 2, 1), (2, 3, 2))
        torch.testing.assert_close(part, merged[f"{EXPERTS}.weight2"][1:, 2:5, 1:3])
    assert not torch.equal(merged[f"{EXPERTS}.weight1"], tensors[f"{EXPERTS}.weight1"])
