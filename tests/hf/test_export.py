"""Checkpoints out to the class's files and back, and straight into the class."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hf.exports import VOCAB_OF_TOKENIZER, checkpoint_of, export, tensors_of
from tests.hf.pairs import VARIANTS

ALL = {
    "model": {"qk_norm": "head", "qkv_bias": True, "head_dim": 24},
    "moe": {
        "null_types": {"identity": 1, "constant": 2},
        "dense_layers": [1],
        "shared_expert_hidden_size": 40,
        "shared_expert_gate": True,
        "router": {
            "gating_residual": True,
            "target_load": 1.4,
            "capacity_factor": 100.0,
            "balance": {"type": "null_averaged", "coefficient": 0.1, "final_coefficient": 0.01},
        },
    },
}
CHANGES = {
    "all": ALL,
    "tied": {"model": {"tie_embeddings": True}, "moe": {"router": {"null_init": "copy"}}},
    "shared_row": VARIANTS["all_selected-shared_row"],
}
ELSEWHERE = """
import sys, json, torch
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("adamoe_dist", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer
place = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
ids = tokenizer("def alpha  beta", return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
made = model.generate(ids, max_new_tokens=12, do_sample=False)
model.save_pretrained(sys.argv[2])
print(json.dumps({"ids": ids.tolist(), "logits": logits.double().tolist(), "made": made.tolist(),
                  "module": type(model).__module__, "file": sys.modules[type(model).__module__].__file__}))
"""


@pytest.fixture(scope="module", params=CHANGES)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    checkpoint, megatron, config = checkpoint_of(root, CHANGES[request.param])
    assert export(checkpoint, root / "hf").family.model_type == "adamoe"
    return root, checkpoint, megatron.eval(), config


def test_out_and_back_gives_every_tensor_to_the_bit(made):
    from adamoe_dist.checkpoint import read_config
    from adamoe_dist.config import config_from_dict
    from adamoe_dist.convert import import_model, meaning, plan_import

    root, checkpoint, _, config = made
    back = import_model(plan_import(root / "hf"), root / "back")
    before, after = tensors_of(checkpoint), tensors_of(back)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    again = config_from_dict(read_config(back))
    assert meaning(again) == meaning(config)
    assert again.moe.null_types == config.moe.null_types and again.moe.router.null_init == config.moe.router.null_init
    assert export(back, root / "hf2").family.model_type == "adamoe"
    names = {file.name for file in (root / "hf").iterdir()}
    assert {file.name for file in (root / "hf2").iterdir()} == {*names, "README_original.md"}
    for name in names - {"README.md"}:
        assert (root / "hf" / name).read_bytes() == (root / "hf2" / name).read_bytes(), name


@pytest.mark.parametrize("made", ["all"], indirect=True)
def test_the_class_gives_the_logits_of_training_where_this_project_is_not_installed(made, tmp_path):
    root, _, megatron, _ = made
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(root / "hf"), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "transformers_modules" in answer["module"] and str(tmp_path) in answer["file"]
    expected = megatron.logits(torch.tensor(answer["ids"]))
    torch.testing.assert_close(torch.tensor(answer["logits"]).float(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert max(max(row) for row in answer["made"]) < VOCAB_OF_TOKENIZER, "rows that only fill up are not generated"
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"modeling_adamoe.py", "layers_adamoe.py", "routing_adamoe.py", "configuration_adamoe.py"} <= saved


def test_a_checkpoint_goes_straight_into_the_class(made):
    from adamoe_dist.hf import model_from_checkpoint, tokenizer_from_checkpoint

    _, checkpoint, megatron, config = made
    tokenizer = tokenizer_from_checkpoint(checkpoint)
    tokens = tokenizer("for alpha in beta:\n    return gamma", return_tensors="pt")["input_ids"]
    expected = megatron.logits(tokens).detach()
    for path in (checkpoint, checkpoint.parent, checkpoint.parents[1]):
        model = model_from_checkpoint(path)
        assert not model.training and not any(value.is_meta for value in model.state_dict().values())
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.model.tie_embeddings
    half = model_from_checkpoint(checkpoint, torch.bfloat16)
    kinds = {name: value.dtype for name, value in half.state_dict().items()}
    assert {kind for name, kind in kinds.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    assert all(kinds[name] == torch.float32 for name in kinds if name.endswith("expert_bias"))
    gap = (half(tokens).logits.float() - expected).abs().mean()
    assert 0 < float(gap) < 0.2 * float(expected.std())


def test_a_bf16_export_in_shards_keeps_the_selection_bias(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import adamoe_dist.hf  # noqa: F401

    checkpoint, _, _ = checkpoint_of(tmp_path, ALL)
    export(checkpoint, tmp_path / "hf", "bf16", 60_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    stored = {name: value for file in files for name, value in load_file(file).items()}
    before = tensors_of(checkpoint)
    bias = "model.layers.2.mlp.router.expert_bias"
    assert torch.equal(stored[bias], before["model.decoder.layers.2.mlp.router.expert_bias"])
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16 and torch.equal(model.state_dict()[bias], stored[bias])


@pytest.mark.parametrize("made", ["all", "tied"], indirect=True)
def test_devices_can_be_mapped(made, tmp_path):
    from transformers import AutoModelForCausalLM

    from adamoe_dist.errors import UserError
    from adamoe_dist.hf import model_from_checkpoint

    root, checkpoint, megatron, _ = made
    tokens = torch.arange(40).view(2, 20)
    expected = megatron.logits(tokens).detach()
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    away = parts | {"model.layers.1": "disk", "model.layers.2": "disk"}
    for how in ("auto", away):
        model = AutoModelForCausalLM.from_pretrained(root / "hf", device_map=how, offload_folder=tmp_path / "off")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert any(value.is_meta for value in model.state_dict().values()), "layers 1 and 2 are on disk"
    for how in ("auto", "balanced", "cpu", {"": "cpu"}):
        torch.testing.assert_close(model_from_checkpoint(checkpoint, device_map=how)(tokens).logits, expected)
    with pytest.raises(UserError, match="sends weights to disk"):
        model_from_checkpoint(checkpoint, device_map=away)
    with pytest.raises(UserError, match=r"no device for model\.layers\.1"):
        model_from_checkpoint(checkpoint, device_map=parts)


def test_a_checkpoint_that_is_not_of_its_configuration_is_refused(tmp_path):
    from adamoe_dist.checkpoint import read_config
    from adamoe_dist.errors import UserError
    from adamoe_dist.hf import model_from_checkpoint
    from tests.checkpoint.small import sign

    checkpoint, _, _ = checkpoint_of(tmp_path, {})
    tree = read_config(checkpoint)
    for key, value, problem in (
        ("num_null_experts", 3, "null_weight has shape"),
        ("num_null_experts", 0, "does not give it: .*null_weight"),
        ("shared_expert_hidden_size", 8, "lacks tensor .*shared_experts"),
    ):
        changed = {**tree, "moe": {**tree["moe"], key: value, "top_k": 2}}
        (checkpoint / "config.json").write_text(json.dumps(changed))
        sign(checkpoint)
        with pytest.raises(UserError, match=problem):
            model_from_checkpoint(checkpoint)


def test_a_vocabulary_below_the_tokenizers_is_refused(tmp_path):
    from adamoe_dist.convert import plan_export
    from adamoe_dist.errors import UserError

    checkpoint, _, _ = checkpoint_of(tmp_path, {})
    with pytest.raises(UserError, match=rf"--vocab-size 200 is less than the {VOCAB_OF_TOKENIZER} ids"):
        plan_export(str(checkpoint), vocab_size=200)


@pytest.mark.parametrize(("shared", "drawn"), [(True, "copy"), (False, "shared"), (False, "often")])
def test_a_draw_of_null_rows_that_the_model_cannot_have_had_is_refused(shared, drawn):
    from adamoe_dist.convert import FAMILIES
    from adamoe_dist.errors import UserError
    from tests.hf.pairs import SMALL
    from tests.model.layers import config_of

    written = FAMILIES["adamoe"].write(config_of(SMALL)[0], 96)
    with pytest.raises(UserError, match=f"null_init='{drawn}' cannot be converted"):
        FAMILIES["adamoe"].read(written | {"shared_null_row": shared, "null_init": drawn})
    del written["null_init"]
    assert FAMILIES["adamoe"].read(written).moe["router"]["null_init"] == "random"


def test_another_tokenizer_than_that_of_training_does_not_go_along(tmp_path):
    from adamoe_dist.data import Document, train_tokenizer
    from adamoe_dist.errors import UserError

    checkpoint, _, _ = checkpoint_of(tmp_path, {})
    train_tokenizer([Document("another text of other words " * 200, "0")], 290, tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path / "run" / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"run/tokenizer is not the tokenizer of .* was trained with"):
        export(checkpoint, tmp_path / "out")


@pytest.mark.end_to_end
def test_the_tool_exports_and_verifies(tmp_path):
    checkpoint, _, _ = checkpoint_of(tmp_path, ALL)
    tool = str(Path(__file__).parents[2] / "tools" / "convert_checkpoint.py")

    def run(*arguments: object) -> str:
        command = [sys.executable, tool, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("export", "--from", tmp_path / "run", "--to", tmp_path / "hf", "--license", "apache-2.0")
    assert "AdaMoEForCausalLM (adamoe)" in said
    assert 'license: "apache-2.0"' in (tmp_path / "hf" / "README.md").read_text()
    run("verify", "--hf", tmp_path / "hf", "--megatron", checkpoint)
