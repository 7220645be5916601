"""What an exported model has beside weights and configuration: settings of generation, and its card."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamoe_dist.data import Tokenizer
from adamoe_dist.errors import UserError
from adamoe_dist.hf.card import model_card
from adamoe_dist.hf.card_facts import CardFacts
from adamoe_dist.hf.run_facts import data_sizes, read_measured, run_of

if TYPE_CHECKING:
    from adamoe_dist.convert import ExportPlan

GENERATION = "generation_config.json"
CARD = "README.md"
ORIGINAL_CARD = "README_original.md"


def finish_export(
    plan: "ExportPlan", directory: Path, title: str, license_id: str | None = None, base_model: str | None = None
) -> list[str]:
    """Write ``generation_config.json`` where a new model has none, and the model card.

    A model of the family that was imported has the settings that it came with, or none. The card that it came with is
    kept as ``README_original.md``; one of an earlier export, beside such a file, is replaced.

    Args:
        plan: of the export.
        directory: with everything else.
        title: of the card.
        license_id: identifier of the licence; None: not set.
        base_model: name on the hub of the model that an imported one is; None: not set.

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
            notes.append(f"{GENERATION} lacks the ids of the tokenizer: {problem}")
    _suppress_padding(directory / GENERATION, json.loads(plan.config_json))
    if (directory / CARD).exists() and not (directory / ORIGINAL_CARD).exists():
        (directory / CARD).rename(directory / ORIGINAL_CARD)
    facts = card_facts(plan, directory, title, license_id, base_model)
    (directory / CARD).write_text(model_card(facts), encoding="utf-8")
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


def card_facts(
    plan: "ExportPlan", directory: Path, title: str, license_id: str | None = None, base_model: str | None = None
) -> CardFacts:
    """Gather what the card of an export says."""
    from adamoe_dist.checkpoint import read_manifest, read_state
    from adamoe_dist.convert import TERMS, read_load_report

    manifest, state = read_manifest(plan.checkpoint), read_state(plan.checkpoint)
    tensors = [item for shard in plan.shards.values() for item in shard]
    return CardFacts(
        title=title,
        config=plan.config,
        step=manifest["step"],
        state=state,
        measured=read_measured(run_of(plan.checkpoint, plan.config), manifest["step"]),
        architecture=plan.family.architecture,
        dtype=str(tensors[0][1]).removeprefix("torch."),
        parameters=sum(weight.elements for weight, _ in tensors),
        brings_code=any(directory.glob("*.py")),
        has_tokenizer=plan.tokenizer is not None,
        layout=manifest["layout"],
        data_sizes=data_sizes(state),
        text_load=read_load_report(plan.checkpoint),
        base_model=base_model,
        base_name=_base_name(plan),
        base_family=plan.origin.family.model_type if plan.origin is not None else None,
        license=license_id,
        license_files=tuple(file.name for file in sorted(directory.iterdir()) if file.name.upper().startswith(TERMS)),
        original_card=ORIGINAL_CARD if (directory / ORIGINAL_CARD).exists() else None,
    )


def _base_name(plan: "ExportPlan") -> str | None:
    """Return what an imported ``config.json`` calls its model; of a path of some machine, the last part."""
    if plan.origin is None:
        return None
    values = json.loads((plan.origin.files / "config.json").read_text(encoding="utf-8"))
    name = values.get("_name_or_path")
    if not isinstance(name, str) or not name.isprintable():
        return None
    return (Path(name).name if name.startswith(("/", ".")) else name) or None
