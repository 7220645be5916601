"""The index is read without trust, and says the same as torch's own reader does of an honest one."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from adamoe_dist.checkpoint import find_checkpoint, verify_files
from adamoe_dist.checkpoint.index import (
    METADATA,
    CheckpointReader,
    read_index,
    read_tensor,
    write_index,
)
from adamoe_dist.errors import UserError
from tests.checkpoint.small import hostile_bytes, make_checkpoint, sign, tree_of, weights_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path)


@pytest.fixture
def metadata(path: Path) -> records.Metadata:
    return FileSystemReader(path).read_metadata()


KEY = "model.decoder.layers.0.mlp.router.weight"


def rewrite(path: Path, metadata: records.Metadata) -> None:
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    sign(path)


def place_of(metadata: records.Metadata, key: str = KEY) -> _StorageInfo:
    return next(info for place, info in metadata.storage_data.items() if place.fqn == key)


def test_honest_index(path: Path) -> None:
    index = read_index(path)
    whole = weights_of(tree_of({}))
    assert {key: (entry.shape, entry.dtype) for key, entry in index.items()} == {
        key: (tuple(value.shape), value.dtype) for key, value in whole.items()
    }
    by_torch = {key: torch.empty_like(value) for key, value in whole.items()}
    torch_checkpoint.load(by_torch, storage_reader=FileSystemReader(path), no_dist=True)
    checked = {key: torch.empty_like(value) for key, value in whole.items()}
    torch_checkpoint.load(checked, storage_reader=CheckpointReader(path), no_dist=True)
    for key, value in whole.items():
        assert torch.equal(read_tensor(path, index, key), value), key
        assert torch.equal(by_torch[key], value) and torch.equal(checked[key], value), key


def test_written_index_is_torchs(path: Path, metadata: records.Metadata) -> None:
    write_index(path, read_index(path))
    again = FileSystemReader(path).read_metadata()
    assert again.state_dict_metadata == metadata.state_dict_metadata
    assert again.storage_data == metadata.storage_data


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/etc/hostname", "sub/__0_0.distcp", "..", "", "unlisted.distcp"]
)
def test_place_outside_the_checkpoint(path: Path, metadata: records.Metadata, name: str) -> None:
    (path.parent / "outside.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    place_of(metadata).relative_path = name
    rewrite(path, metadata)
    with pytest.raises(UserError, match=r"not the name of a file in the checkpoint|not among the checkpoint's files"):
        read_index(path)
    with pytest.raises(UserError):
        CheckpointReader(path)


def _bytes_entry(metadata: records.Metadata) -> None:
    metadata.state_dict_metadata["extra"] = records.BytesStorageMetadata()
    metadata.storage_data[records.MetadataIndex("extra")] = _StorageInfo("__0_0.distcp", 0, 10)


def _bytes_entry_with_place(metadata: records.Metadata) -> None:
    metadata.state_dict_metadata["extra"] = records.BytesStorageMetadata()
    metadata.storage_data[records.MetadataIndex("extra", (0,))] = _StorageInfo("__0_0.distcp", 0, 10)


def _beyond_the_end(metadata: records.Metadata) -> None:
    place_of(metadata).length = 10**9


def _negative(metadata: records.Metadata) -> None:
    place_of(metadata).offset = -5


def _transformed(metadata: records.Metadata) -> None:
    place_of(metadata).transform_descriptors = ["stream.zstd"]


def _no_place(metadata: records.Metadata) -> None:
    metadata.storage_data = {place: info for place, info in metadata.storage_data.items() if place.fqn != KEY}


def _no_shape(metadata: records.Metadata) -> None:
    del metadata.state_dict_metadata[KEY]


def _a_part_missing(metadata: records.Metadata) -> None:
    entry = metadata.state_dict_metadata[KEY]
    assert isinstance(entry, records.TensorStorageMetadata)
    entry.size = torch.Size((entry.size[0] + 1, *entry.size[1:]))


def _a_part_outside(metadata: records.Metadata) -> None:
    entry = metadata.state_dict_metadata[KEY]
    assert isinstance(entry, records.TensorStorageMetadata)
    entry.chunks = [replace(entry.chunks[0], sizes=torch.Size((99, 8)))]


def _shape_of_something_else(metadata: records.Metadata) -> None:
    entry = metadata.state_dict_metadata[KEY]
    assert isinstance(entry, records.TensorStorageMetadata)
    entry.size = "large"  # type: ignore[assignment]


def _no_tensors(metadata: records.Metadata) -> None:
    metadata.state_dict_metadata = [1, 2]  # type: ignore[assignment]


@pytest.mark.parametrize(
    "harm",
    [
        _bytes_entry,
        _bytes_entry_with_place,
        _beyond_the_end,
        _negative,
        _transformed,
        _no_place,
        _no_shape,
        _a_part_missing,
        _a_part_outside,
        _shape_of_something_else,
        _no_tensors,
    ],
)
def test_index_that_does_not_hold_together(path: Path, metadata: records.Metadata, harm: Any) -> None:
    harm(metadata)
    rewrite(path, metadata)
    verify_files(path)
    with pytest.raises(UserError, match=r"\.metadata") as caught:
        read_index(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch\nload\n.",
        b"ctorch.serialization\nload\n.",
        # an attribute of an allowed name: STACK_GLOBAL takes dotted ones
        b"\x80\x04\x8c\x05torch\x8c\rSize.__class__\x93.",
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(torch.Size((1,))),
        b"\x80\x04K\x01\x8c\x01x\x86.",
    ],
)
def test_pickle_of_something_else(path: Path, content: bytes) -> None:
    (path / METADATA).write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata is not the index of a checkpoint \(.+\); choose another"):
        read_index(path)


def test_a_record_cannot_change_a_class(path: Path) -> None:
    """BUILD with a class in the place of an object would set the class's attributes."""
    content = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x06broken\x88s\x86b."
    pickle.loads(content)  # what pickle itself does
    assert records.Metadata.broken is True  # type: ignore[attr-defined]
    del records.Metadata.broken  # type: ignore[attr-defined]
    (path / METADATA).write_bytes(content)
    with pytest.raises(UserError):
        read_index(path)
    assert not hasattr(records.Metadata, "broken")


def test_the_index_is_not_read_again(path: Path, tmp_path: Path) -> None:
    """Torch's reader would unpickle the file when it reads tensors."""
    reader, wanted = CheckpointReader(path), {KEY: torch.zeros(4, 8)}
    (path / METADATA).write_bytes(hostile_bytes("pickle", tmp_path / "marker"))
    torch_checkpoint.load(wanted, storage_reader=reader, no_dist=True)
    assert torch.equal(wanted[KEY], weights_of(tree_of({}))[KEY])
    assert not (tmp_path / "marker").exists()


def test_links_are_refused(path: Path, tmp_path: Path) -> None:
    (path / "state.json").rename(tmp_path / "elsewhere.json")
    (path / "state.json").symlink_to(tmp_path / "elsewhere.json")
    sign(path)
    with pytest.raises(UserError, match=r"state\.json is a link to another file"):
        verify_files(path)
    with pytest.raises(UserError, match=r"is not a complete checkpoint"):
        find_checkpoint(str(path), tmp_path)


def test_tensor_that_is_another(path: Path) -> None:
    index = read_index(path)
    other = index["model.decoder.layers.1.mlp.router.weight"]
    swapped = index | {KEY: replace(index["optimizer.step"], shape=other.shape, dtype=other.dtype, blocks=())}
    step = index["optimizer.step"].blocks[0]
    wrong = replace(other.blocks[0], file=step.file, start=step.start, length=step.length)
    swapped[KEY] = replace(other, blocks=(wrong,))
    with pytest.raises(UserError, match=r"\.distcp does not hold the tensors that the index names"):
        read_tensor(path, swapped, KEY)
