"""Samples, blends and batches against slow references that share no code with them."""

import hashlib
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from adamoe_dist.data import (
    BatchStream,
    BlendedSamples,
    TokenDataset,
    Tokenizer,
    prepare_corpus,
    validation_batches,
)
from adamoe_dist.data.shuffle import permutation
from adamoe_dist.errors import UserError
from tests.data.conftest import documents_on_disk

S = 16


def reference_epoch(prefix: str, seed: int, fingerprint: str, epoch: int) -> list[list[int]]:
    """The samples of an epoch by plain concatenation; orders come from sorting raw Philox words."""

    def order(count: int, kind: str) -> list[int]:
        key = hashlib.blake2b(f"{kind}:{seed}:{fingerprint}:{epoch}".encode(), digest_size=16).digest()
        raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count).tolist()
        return sorted(range(count), key=lambda place: (raw[place], place))

    documents = documents_on_disk(prefix)
    stream = [token for place in order(len(documents), "documents") for token in documents[place]]
    windows = [stream[start : start + S + 1] for start in range(0, len(stream) - S, S)]
    return [windows[place] for place in order(len(windows), "windows")]


@pytest.fixture
def train(prepared: Path) -> TokenDataset:
    return TokenDataset(f"{prepared}_train", S, seed=7)


@pytest.fixture
def validation(prepared: Path) -> TokenDataset:
    return TokenDataset(f"{prepared}_validation", S, seed=7, shuffle=False)


def test_permutation_never_changes() -> None:
    assert permutation(8, "blend", 1, 2).tolist() == [3, 5, 0, 2, 1, 7, 4, 6]
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))


def test_samples_agree_with_the_reference(train: TokenDataset) -> None:
    for epoch in range(3):
        expected = reference_epoch(train.prefix, 7, train.fingerprint, epoch)
        assert len(expected) == len(train) == (train.tokens - 1) // S
        found = [train[epoch * len(train) + place].tolist() for place in range(len(train))]
        assert found == expected


def test_samples_need_no_walk(train: TokenDataset, prepared: Path) -> None:
    far = TokenDataset(f"{prepared}_train", S, seed=7)
    for index in (5 * len(train) + 3, 0, 2 * len(train), 5 * len(train) + 3, len(train) - 1):
        assert far[index].tolist() == train[index].tolist()
    assert far[0].dtype == np.int64 and far[0].shape == (S + 1,)
    with pytest.raises(IndexError):
        far[-1]


def test_sequential_samples(validation: TokenDataset) -> None:
    stream = [token for document in documents_on_disk(validation.prefix) for token in document]
    for index in range(2 * len(validation)):
        start = index % len(validation) * S
        assert validation[index].tolist() == stream[start : start + S + 1]


def test_seed_and_epoch_change_the_order(train: TokenDataset, prepared: Path) -> None:
    other = TokenDataset(f"{prepared}_train", S, seed=8)
    first = [train[place].tolist() for place in range(len(train))]
    assert first != [other[place].tolist() for place in range(len(train))]
    assert first != [train[len(train) + place].tolist() for place in range(len(train))]


def test_bytes_per_token(train: TokenDataset, tokenizer: Tokenizer) -> None:
    texts = [tokenizer.decode(document[:-1]) for document in documents_on_disk(train.prefix)]
    assert train.bytes_per_token * train.tokens == pytest.approx(sum(len(text.encode()) for text in texts))
    assert train.tokenizer_fingerprint == tokenizer.fingerprint


def test_fingerprint_is_of_the_contents(prepared: Path, tmp_path: Path, train: TokenDataset) -> None:
    for ending in ("bin", "idx", "json"):
        shutil.copy(f"{prepared}_train.{ending}", tmp_path / f"copy.{ending}")
    copy = TokenDataset(tmp_path / "copy", S, seed=7)
    assert copy.fingerprint == train.fingerprint
    assert copy[3].tolist() == train[3].tolist()
    assert TokenDataset(f"{prepared}_validation", S, 7).fingerprint != train.fingerprint


def test_refused_datasets(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make it with tools/prepare_data.py .* --output \S*/none$"):
        TokenDataset(tmp_path / "none_train", S, 0)
    with pytest.raises(UserError, match=r"did you mean .*words_train"):
        TokenDataset(prepared, S, 0)
    with pytest.raises(UserError, match=r"not enough data: .*sequence_length"):
        TokenDataset(f"{prepared}_train", 10**6, 0)
    prefix = tmp_path / "x"
    for ending in ("bin", "idx"):
        shutil.copy(f"{prepared}_train.{ending}", f"{prefix}.{ending}")
    with pytest.raises(UserError, match=r"there is no .*x\.json"):
        TokenDataset(prefix, S, 0)
    info = json.loads(Path(f"{prepared}_train.json").read_text())
    for change, message in (
        ({"format_version": 99}, "format_version 99"),
        ({"surplus": 1}, r"unknown keys \(surplus\)"),
        ({"tokens": info["tokens"] + 1}, r"x\.bin has .* bytes"),
        ({"documents": info["documents"] + 1}, r"x\.idx has .* bytes"),
    ):
        Path(f"{prefix}.json").write_text(json.dumps(info | change))
        with pytest.raises(UserError, match=message):
            TokenDataset(prefix, S, 0)
    Path(f"{prefix}.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        TokenDataset(prefix, S, 0)


@pytest.mark.parametrize("weights", [[1, 1], [0.3, 0.7], [5, 1, 1e-4], [0, 1], [0.1, 0.2, 0.7], [1] * 40])
def test_blend_has_exact_proportions(train: TokenDataset, weights: list[float]) -> None:
    blend = BlendedSamples([train] * len(weights), weights, seed=3)
    block = blend.block_size
    used: Counter[int] = Counter()
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    largest = shares.index(max(shares))
    for index in range(3 * block):
        dataset, sample = blend.locate(index)
        assert sample == used[dataset]
        used[dataset] += 1
        if (index + 1) % block == 0:
            expected = [int((index + 1) * share) for share in shares]
            expected[largest] += index + 1 - sum(expected)
            assert [used[place] for place in range(len(weights))] == expected


def test_blend_needs_no_walk(train: TokenDataset) -> None:
    weights = [0.2, 0.5, 0.3]
    walked = BlendedSamples([train] * 3, weights, seed=3)
    places = [walked.locate(index) for index in range(4000)]
    for index in (3999, 1023, 1024, 0, 2500):
        assert BlendedSamples([train] * 3, weights, seed=3).locate(index) == places[index]
    assert [BlendedSamples([train] * 3, weights, seed=4).locate(index) for index in range(99)] != places[:99]
    far = 10**15
    dataset, sample = walked.locate(far)
    assert abs(sample - far * weights[dataset]) <= walked.block_size


def test_blend_mixes_within_a_block(train: TokenDataset, validation: TokenDataset) -> None:
    blend = BlendedSamples([train, validation], [1, 1], seed=0)
    assert 20 < sum(blend.locate(index)[0] for index in range(100)) < 80
    dataset, sample = blend.locate(50)
    assert blend[50].tolist() == [train, validation][dataset][sample].tolist()


def test_blend_of_one_is_that_one(train: TokenDataset) -> None:
    blend = BlendedSamples([train], [0.25], seed=0)
    assert [blend[index].tolist() for index in range(50)] == [train[index].tolist() for index in range(50)]


def test_refused_blends(train: TokenDataset, prepared: Path, tmp_path: Path) -> None:
    for weights, message in (
        ([1, -1], r"data.train\[1\].weight -1"),
        ([float("nan"), 1], r"data.train\[0\].weight nan"),
        ([0, 0], "every weight is 0"),
        ([1], "2 datasets and 1 weights"),
    ):
        with pytest.raises(UserError, match=message):
            BlendedSamples([train] * 2, weights, 0)
    with pytest.raises(UserError, match="is empty"):
        BlendedSamples([], [], 0)
    with pytest.raises(UserError, match="different tokenizers"):
        BlendedSamples([train, other_tokenizer(prepared, tmp_path)], [1, 1], 0)


def other_tokenizer(prepared: Path, directory: Path) -> TokenDataset:
    for ending in ("bin", "idx"):
        shutil.copy(f"{prepared}_train.{ending}", directory / f"other.{ending}")
    info = json.loads(Path(f"{prepared}_train.json").read_text()) | {"tokenizer_fingerprint": "0" * 64}
    (directory / "other.json").write_text(json.dumps(info))
    return TokenDataset(directory / "other", S, 7)


def steps(samples: object, micro: int, ranks: int, count: int, start: int = 0) -> list[list[list[int]]]:
    """The samples of some global batches of 12, put together from all ranks."""
    streams = [BatchStream(samples, 12, micro, rank, ranks, start) for rank in range(ranks)]
    result = []
    for _ in range(count):
        per_rank = [stream.next_step() for stream in streams]
        assert all(batch.tokens.shape == (micro, S + 1) for batches in per_rank for batch in batches)
        turns = zip(*per_rank, strict=True)
        result.append([row.tolist() for turn in turns for batch in turn for row in batch.tokens])
    return result


def test_batches_do_not_depend_on_the_cut(train: TokenDataset) -> None:
    count = len(train) // 12 + 3
    plain = [[train[step * 12 + row].tolist() for row in range(12)] for step in range(count)]
    for micro, ranks in ((12, 1), (1, 1), (3, 2), (2, 3), (1, 12), (4, 3)):
        assert steps(train, micro, ranks, count) == plain
        assert steps(train, micro, ranks, 2, start=24) == plain[2:4]


def test_resumed_with_another_cut(train: TokenDataset, validation: TokenDataset) -> None:
    blend = BlendedSamples([train, validation], [2, 1], seed=1)
    first = BatchStream(blend, 12, 3, 0, 2)
    for _ in range(5):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed_samples"] == 60
    second = BatchStream(blend, 4, 2, 1, 2)
    second.load_state_dict(state)
    assert torch.equal(second.next_step()[0].tokens, torch.tensor(np.stack([blend[62], blend[63]])))
    assert second.consumed_samples == 64


def test_resumed_on_other_data(prepared: Path, train: TokenDataset, validation: TokenDataset) -> None:
    state = BatchStream(BlendedSamples([train, validation], [2, 1], seed=1), 4, 4, 0, 1).state_dict()
    reseeded = TokenDataset(f"{prepared}_train", S, seed=8)
    short = [TokenDataset(f"{prepared}_{part}", S // 2, 7) for part in ("train", "validation")]
    for samples, message in (
        (BlendedSamples([train, validation], [2, 1], seed=2), "^run.seed 2 is not the checkpoint's 1"),
        (BlendedSamples(short, [2, 1], seed=1), "^model.sequence_length 8 is not the checkpoint's 16"),
        (BlendedSamples([train], [1], seed=1), "^data.train has 1 datasets, the checkpoint's run had 2"),
        (BlendedSamples([train, train], [2, 1], seed=1), r"^data.train\[1\] .* is not the checkpoint's data"),
        (BlendedSamples([reseeded, validation], [2, 1], seed=1), r"^data.train\[0\] .* read with seed 8"),
        (BlendedSamples([train, validation], [1, 1], seed=1), r"^data.train\[0\].weight: its share 1/2"),
    ):
        stream = BatchStream(samples, 4, 4, 0, 1)
        with pytest.raises(UserError, match=message):
            stream.load_state_dict(state)
        assert stream.consumed_samples == 0
    same = BatchStream(BlendedSamples([train, validation], [4, 2], seed=1), 4, 4, 0, 1)
    same.load_state_dict(state | {"consumed_samples": 8})
    assert same.consumed_samples == 8
    other = BatchStream(BlendedSamples([train], [1], seed=1), 4, 4, 0, 1, may_be_other_samples=True)
    other.load_state_dict(state | {"consumed_samples": 8})
    assert torch.equal(other.next_step()[0].tokens[0], torch.tensor(train[8]))
    reordered = BatchStream(BlendedSamples([train], [1], seed=2), 4, 4, 0, 1, may_be_other_samples=True)
    with pytest.raises(UserError, match=r"run\.seed 2 is not the checkpoint's 1"):
        reordered.load_state_dict(state)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 7, 12])
def test_validation_covers_each_sample_once(validation: TokenDataset, ranks: int, limit: int | None) -> None:
    passes = [list(validation_batches(validation, 4, rank, ranks, limit)) for rank in range(ranks)]
    assert len({len(batches) for batches in passes}) == 1
    seen = []
    for turn in zip(*passes, strict=True):
        for batch, weights in turn:
            tokens = batch.tokens
            assert tokens.shape == (4, S + 1) and weights.shape == (4,)
            seen += [row.tolist() for row, weight in zip(tokens, weights, strict=True) if weight == 1]
            assert set(weights.tolist()) <= {0.0, 1.0}
    count = min(len(validation), limit or len(validation))
    assert seen == [validation[index].tolist() for index in range(count)]


def test_large_vocabulary_is_stored_in_32_bits(text_dir: Path, tmp_path: Path) -> None:
    prepare_corpus([str(text_dir)], Words(), tmp_path / "x")
    dataset = TokenDataset(tmp_path / "x_train", 4, 0, shuffle=False)
    assert max(max(row) for row in (dataset[index].tolist() for index in range(len(dataset)))) == 99_999
    assert Path(f"{tmp_path}/x_train.bin").stat().st_size == 4 * dataset.tokens
    assert dataset[0][0] == 99_000


class Words:
    """A tokenizer of another kind, with more ids than 16 bits hold."""

    vocab_size = 100_000
    eod_id = 99_999
    fingerprint = "words"

    def encode(self, text: str) -> list[int]:
        return [99_000 + place for place, _ in enumerate(text.split())]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))
