"""An imported checkpoint in every layout, and a run's checkpoint as a Hugging Face model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adamoe_dist.hf  # noqa: F401  registers the class of this project
from adamoe_dist.convert import (
    Comparing,
    NullChoice,
    export_model,
    import_model,
    plan_export,
    plan_import,
    with_null_experts,
)
from adamoe_dist.errors import UserError
from tests.convert import layouts, models
from tests.distributed import checkpoint_checks as checks
from tests.distributed.cases import VOCAB
from tests.distributed.checkpoint_checks import Layout
from tests.distributed.harness import RanksOf

pytestmark = pytest.mark.distributed

RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor x pipeline": {"parallel": {"tensor": 2, "pipeline": 2, "expert": 2}},
    "expert x pipeline": {"parallel": {"expert": 2, "pipeline": 2}},
    "expert x expert tensor": {"parallel": {"expert": 2, "tensor": 2, "expert_tensor": 2}},
}
WIDTH = 300
"""Ids, no multiple of 128: the embedding has 384 rows, half of them on each tensor rank."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"tie_word_embeddings": True}),
        ("qwen2_moe", {}),
        pytest.param("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [2]}, marks=pytest.mark.slow),
        pytest.param("olmoe", {}, marks=pytest.mark.slow),
        ("adamoe", {}),
    ],
)
def test_every_layout_has_transformers_logits(
    ranks_of: RanksOf, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    source, target = tmp_path / "hf", tmp_path / "checkpoint"
    models.save(source, "mixtral" if family == "adamoe" else family, vocab_size=WIDTH, tokenizer=False, **changes)
    models.add_tokenizer(source, ids=280)
    plan = plan_import(source)
    if family == "adamoe":
        plan = with_null_experts(plan, NullChoice(3, top_k=3, null_init="random"))
    checkpoint = import_model(plan, target)
    if family == "adamoe":
        export_model(plan_export(str(target)), tmp_path / "adaptive")
        source = tmp_path / "adaptive"
    ids = AutoTokenizer.from_pretrained(source)(models.README.read_text())["input_ids"]
    tokens = torch.tensor(ids[:128]).view(4, 32)
    assert len(tokens.unique()) > 40
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = model(tokens).logits[:, :, :WIDTH]
    for name, cut in LAYOUTS.items():
        found = [
            one for one in ranks_of(RANKS).run(layouts.logits_in_layout, checkpoint, cut, tokens) if one is not None
        ]
        assert found, name
        for logits in found:
            assert (logits - expected).abs().max() < 1e-4, name


VANILLA = {"moe": {"num_null_experts": 0, "top_k": 2}}


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "mixtral"),
        ({"model": {"qk_norm": "all"}, "moe": {"router": {"normalize": "none"}}}, "olmoe"),
        ({"model": {"qk_norm": "head", "tie_embeddings": True}, "moe": {"dense_layers": [0]}}, "qwen3_moe"),
        (
            {"model": {"qkv_bias": True}, "moe": {"shared_expert_hidden_size": 32, "shared_expert_gate": True}},
            "qwen2_moe",
        ),
    ],
)
def test_a_run_becomes_a_model_of_transformers(
    ranks_of: RanksOf, tmp_path: Path, changes: dict[str, Any], family: str
) -> None:
    """Trained on four ranks with an optimizer, experts apart; no tokenizer is there, so the vocabulary is named."""
    whole = {**changes, "moe": {**VANILLA["moe"], **changes.get("moe", {})}}
    ranks_of(RANKS).run(checks.train_and_save, Layout(2, changes=whole), tmp_path / "run", 1, 0)
    with pytest.raises(UserError, match="--vocab-size"):
        plan_export(str(tmp_path / "run"))
    plan = plan_export(str(tmp_path / "run"), vocab_size=VOCAB, max_shard_bytes=60_000)
    assert plan.family.model_type == family and len(plan.shards) > 2
    notes = export_model(plan, tmp_path / "hf")
    assert len(notes) == 1 and "tokenizer" in notes[0]
    sizes = [file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors")]
    assert len(sizes) == len(plan.shards) and max(sizes) < 70_000
    pair = Comparing(tmp_path / "hf", str(tmp_path / "run"))
    pair.compare_tensors()
    assert pair.compare_logits(None, 1e-4)[2] < 1e-5
    halves = plan_export(str(tmp_path / "run"), "bf16", vocab_size=VOCAB)
    export_model(halves, tmp_path / "bf16")
    assert halves.bytes * 2 == plan.bytes
    assert {value.dtype for value in models.tensors_of(tmp_path / "bf16").values()} == {torch.bfloat16}
    pair = Comparing(tmp_path / "bf16", str(tmp_path / "run"))
    pair.compare_tensors()
    assert pair.compare_logits(None, 1e-4)[2] < 1e-5
