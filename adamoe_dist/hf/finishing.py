"""What an exported model has beside weights and configuration: settings of generation, and its card."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError
from adamoe_dist.hf.card import CardFacts, model_card, read_measured

if TYPE_CHECKING:
    from adamoe_dist.convert import ExportPlan

GENERATION = "generation_config.json"
CARD = "README.md"
ORIGINAL_CARD = "README_original.md"


def finish_export(plan: "ExportPlan", directory: Path, title: str, license_id: str | None = None) -> list[str]:
    """Write ``generation_config.json`` where a new model has none, and the model card.

    A model of the family that was imported has the settings that it came with, or none. The card that it came with is
    kept as ``README_original.md``; one of an earlier export, beside such a file, is replaced.

    Args:
        plan: of the export.
        directory: with everything else.
        title: of the card.
        license_id: identifier of the licence; None: not set.

    Returns:
        Lines on what could not be written.
    """
    notes = []
    is_new = plan.origin is None or plan.family is not plan.origin.family
    if plan.tokenizer is not None and is_new and not (directory / GENERATION).exists():
        try:
            settings = generation_settings(Tokenizer.load(plan.tokenizer), json.loads(plan.config_json)["vocab_size"])
            (directory / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except UserError as problem:
            notes.append(f"no {GENERATION} is in it: {problem}")
    _suppress_padding(directory / GENERATION, json.loads(plan.config_json))
    if (directory / CARD).exists() and not (directory / ORIGINAL_CARD).exists():
        (directory / CARD).rename(directory / ORIGINAL_CARD)
    (directory / CARD).write_text(model_card(card_facts(plan, directory, title, license_id)), encoding="utf-8")
    return notes


def generation_settings(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Return what ``generate`` is to know.

    Args:
        tokenizer: of the model.
        rows: of its embedding; those that no token has are never to be generated.
    """
    values: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id,
    }
    if rows > tokenizer.vocab_size:
        values["suppress_tokens"] = list(range(tokenizer.vocab_size, rows))
    return {key: value for key, value in values.items() if value is not None}


def _suppress_padding(file: Path, model: dict[str, Any]) -> None:
    """Have ``generate`` leave out the rows that only fill the embedding up; every other setting stays as it is.

    Args:
        file: ``generation_config.json``; where there is none, one with the ids of ``config.json`` is made.
        model: the content of ``config.json``; families without a padded embedding have no ``tokenizer_vocab_size``.
    """
    padding = set(range(model.get("tokenizer_vocab_size") or model["vocab_size"], model["vocab_size"]))
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: model[name] for name in ids if model.get(name) is not None}
    known = set(settings.get("suppress_tokens") or [])
    if not padding <= known:
        settings["suppress_tokens"] = sorted(known | padding)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def card_facts(plan: "ExportPlan", directory: Path, title: str, license_id: str | None = None) -> CardFacts:
    """Gather what the card of an export says."""
    from adamoe_dist.checkpoint import read_manifest, read_state

    step = read_manifest(plan.checkpoint)["step"]
    tensors = [item for shard in plan.shards.values() for item in shard]
    return CardFacts(
        title=title,
        config=plan.config,
        step=step,
        state=read_state(plan.checkpoint),
        measured=read_measured(plan.checkpoint.parent.parent, step),
        architecture=plan.family.architecture,
        dtype=str(tensors[0][1]).removeprefix("torch."),
        parameters=sum(weight.elements for weight, _ in tensors),
        brings_code=any(directory.glob("*.py")),
        base_model=_base_model(plan),
        base_family=plan.origin.family.model_type if plan.origin is not None else None,
        license=license_id,
        original_card=ORIGINAL_CARD if (directory / ORIGINAL_CARD).exists() else None,
    )


def _base_model(plan: "ExportPlan") -> str | None:
    """Return the name on the hub that an imported ``config.json`` gives; a path of some machine is none."""
    if plan.origin is None:
        return None
    values = json.loads((plan.origin.files / "config.json").read_text(encoding="utf-8"))
    name = values.get("_name_or_path")
    return name if isinstance(name, str) and name.count("/") == 1 and not name.startswith(("/", ".")) else None
