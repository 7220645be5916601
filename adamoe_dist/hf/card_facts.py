"""What the model card of an export says, as values."""

from dataclasses import dataclass, field
from typing import Any

from adamoe_dist.config import Config
from adamoe_dist.hf.run_facts import Measured

_EXAMPLES = (".jsonl", ".jsonl.gz")
"""Endings of what fine-tuning reads; prepared text has a prefix without one."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        title: the model's name.
        config: of its run.
        step: optimizer steps.
        state: of the checkpoint: tokens seen, the tokenizer's fingerprint, the data.
        measured: by the run.
        architecture: the class.
        dtype: of the weights.
        parameters: their number.
        brings_code: whether classes lie beside the weights.
        has_tokenizer: whether a tokenizer does.
        layout: how the run was cut, as the checkpoint's manifest says.
        data_sizes: documents and tokens of prepared sets, by fingerprint.
        text_load: what texts did at the experts before any training, as ``--text`` reported; None: nothing did.
        base_model: name on the hub of the model that it was made from; None: none was given.
        base_name: what that model's ``config.json`` calls it; None: it has no name there.
        base_family: ``model_type`` of an imported model; None: trained from new weights.
        license: its identifier; None: not set.
        license_files: names of files beside it that came with the model that it was made from.
        original_card: file beside it, the card of the model that it was made from; None: there is none.
    """

    title: str
    config: Config
    step: int
    state: dict[str, Any]
    measured: Measured
    architecture: str
    dtype: str
    parameters: int
    brings_code: bool
    has_tokenizer: bool = True
    layout: dict[str, Any] = field(default_factory=dict)
    data_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    text_load: dict[str, Any] | None = None
    base_model: str | None = None
    base_name: str | None = None
    base_family: str | None = None
    license: str | None = None
    license_files: tuple[str, ...] = ()
    original_card: str | None = None

    @property
    def sets(self) -> list[dict[str, Any]]:
        """The training sets that the checkpoint names."""
        return list(self.state.get("data", {}).get("datasets", []))

    @property
    def is_fine_tuned(self) -> bool:
        """Whether it was trained on examples, and not on text."""
        return any(str(part["prefix"]).endswith(_EXAMPLES) for part in self.sets)
