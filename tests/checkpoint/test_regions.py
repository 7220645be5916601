"""Parts of a checkpoint's tensors, read and written without the rest."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adamoe_dist.checkpoint import RegionReader, WeightsWriter, read_state, verify_files
from adamoe_dist.checkpoint.index import read_index, read_tensor, write_index
from adamoe_dist.errors import UserError
from tests.checkpoint.small import make_checkpoint, sign, tree_of

EXPERTS = "model.decoder.layers.1.mlp.experts.weight1"


def test_any_region_is_that_of_the_whole_tensor(tmp_path: Path) -> None:
    """Expert tensors (4, 6, 8) lie half in each of two files."""
    path = make_checkpoint(tmp_path)
    whole = read_tensor(path, read_index(path), EXPERTS)
    with RegionReader(path) as reader:
        for offsets, sizes in [
            ((0, 0, 0), (4, 6, 8)),
            ((1, 0, 0), (1, 6, 8)),
            ((1, 3, 0), (2, 2, 8)),
            ((3, 5, 0), (1, 1, 8)),
            ((0, 1, 2), (4, 4, 5)),
        ]:
            place = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            assert torch.equal(reader.read(EXPERTS, offsets, sizes), whole[place]), (offsets, sizes)
        assert torch.equal(reader.read("optimizer.step", (0,), (1,)), torch.tensor([3]))


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    index = read_index(path)
    entry, other = index[EXPERTS], index["model.decoder.layers.0.mlp.router.weight"].blocks[0]
    wrong = replace(entry.blocks[0], file=other.file, start=other.start, length=other.length)
    index[EXPERTS] = replace(entry, blocks=(wrong, *entry.blocks[1:]))
    write_index(path, index)
    sign(path)
    with RegionReader(path) as reader, pytest.raises(UserError, match="does not hold the tensors"):
        reader.read(EXPERTS, (0, 0, 0), (1, 6, 8))


def test_blocks_are_written_as_one_tensor(tmp_path: Path) -> None:
    big = torch.randn(5000, 8)
    with WeightsWriter(tmp_path) as writer:
        writer.add("b", (4, 8), (2, 0), big[2:4])
        writer.add("a", (3,), (0,), torch.arange(3.0).to(torch.bfloat16))
        writer.add("b", (4, 8), (0, 0), big[:2])
        path = writer.finish(tree_of({}), None, {"extra.json": {"one": 1}})
    verify_files(path)
    assert path == tmp_path / "iter_0000000" and read_state(path)["weights_only"]
    index = read_index(path)
    assert torch.equal(read_tensor(path, index, "model.b"), big[:4])
    assert torch.equal(read_tensor(path, index, "model.a"), torch.arange(3.0))
    assert os.stat(path / "__0_0.distcp").st_size < 20_000, "a block of a larger tensor took all of it along"


def test_a_hole_is_found_before_the_checkpoint_has_its_name(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path) as writer:
        writer.add("b", (4, 8), (0, 0), torch.zeros(2, 8))
        with pytest.raises(AssertionError, match=r"model\.b"):
            writer.finish(tree_of({}), None)
    assert not (tmp_path / "iter_0000000").exists()
