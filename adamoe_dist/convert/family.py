"""A family of Hugging Face models: its ``config.json`` as our sections and back, and its tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from adamoe_dist.config import Config, config_from_dict
from adamoe_dist.convert.hf_config import HFConfig
from adamoe_dist.convert.mapping import Names, Weight, standard_weights
from adamoe_dist.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """What a ``config.json`` says of a model.

    Attributes:
        model: the ``model`` section.
        moe: the ``moe`` section.
        vocab_size: rows of the embedding.
        notes: lines on what the file says and conversion does not take over.
    """

    model: dict[str, Any]
    moe: dict[str, Any]
    vocab_size: int
    notes: tuple[str, ...] = ()

    def config(self) -> Config:
        """Return a tree with the two sections, all else as by default."""
        model = {**self.model, "vocab_size": self.vocab_size}
        return config_from_dict({"model": model, "moe": self.moe})


class Family(ABC):
    """One ``model_type`` of transformers.

    Attributes:
        model_type: in ``config.json``.
        architecture: the class that ``config.json`` names.
        is_dense: it has no experts: a source for upcycling only.
        names: what its tensors are called.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    is_dense: ClassVar[bool] = False
    names: ClassVar[Names] = Names()

    def read(self, values: dict[str, Any], source: str = "config.json") -> Architecture:
        """Return what a ``config.json`` says.

        Raises:
            UserError: naming every key whose value the model here cannot have, or that is not known.
        """
        given = HFConfig(values, source)
        given.expect("model_type", self.model_type)
        model, moe = self.read_sections(given)
        vocab_size = given.integer("vocab_size")
        given.finish(self.model_type, self.architecture)
        architecture = Architecture(model, moe, vocab_size, tuple(given.notes))
        try:
            architecture.config()
        except UserError as problem:
            raise UserError(f"{source} makes no model that can be had here: {problem}") from None
        return architecture

    @abstractmethod
    def read_sections(self, given: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take the family's keys from ``given`` and return the sections ``model`` and ``moe``."""

    @abstractmethod
    def write(self, config: Config, vocab_size: int) -> dict[str, Any]:
        """Return the ``config.json`` of a model; whether it says all of the model is for :meth:`check` to find."""

    def weights(self, config: Config, vocab_size: int) -> Iterator[Weight]:
        """Yield every tensor of a model of the family."""
        yield from standard_weights(config, vocab_size, self.names)

    def inexpressible(self, config: Config, vocab_size: int) -> list[str]:
        """Return ``key=value`` of what a model of the family cannot have; none: the family expresses the model.

        It is found by writing the ``config.json`` and reading it again.
        """
        try:
            back = self.read(self.write(config, vocab_size)).config()
        except UserError as problem:
            return [str(problem)]
        there, here = meaning(back), meaning(config)
        return [f"{key}={here[key]}" for key in here if there[key] != here[key]]

    def extra_files(self, config: Config) -> dict[str, Path]:
        """Return files by the name that they are to have beside an exported model: code that its class needs."""
        return {}


def meaning(config: Config) -> dict[str, Any]:
    """Return the keys that say what a model computes, with one value for what is the same under several names."""
    model, moe, router = config.model, config.moe, config.moe.router
    layers = config.moe_layers
    dense = len(layers) < model.num_layers
    normalize: str = router.normalize
    if moe.num_null_experts == 0:
        normalize = {"all_selected": "true_experts", "all_true": "none"}.get(normalize, normalize)
    return {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups or model.num_attention_heads,
        "model.head_dim": model.head_width,
        "model.qk_norm": model.qk_norm,
        "model.qkv_bias": model.qkv_bias,
        "model.ffn_hidden_size": (model.ffn_hidden_size or 4 * model.hidden_size) if dense else None,
        "model.rotary_base": model.rotary_base,
        "model.norm_epsilon": model.norm_epsilon,
        "model.tie_embeddings": model.tie_embeddings,
        "MoE layers": layers,
        "moe.num_experts": moe.num_experts if layers else None,
        "moe.num_null_experts": moe.num_null_experts,
        "moe.top_k": moe.top_k if layers else None,
        "moe.expert_hidden_size": moe.expert_hidden_size if layers else None,
        "moe.shared_expert_hidden_size": moe.shared_expert_hidden_size,
        "moe.shared_expert_gate": moe.shared_expert_gate,
        "moe.router.score_function": router.score_function,
        "moe.router.normalize": normalize if layers else None,
        "moe.null_types": vars(moe.null_types),
        "moe.router.null_init": "shared" if router.null_init == "shared" and moe.num_null_experts else None,
        "moe.router.gating_residual": router.gating_residual,
        "moe.router.target_load": router.target_load,
        "moe.router.capacity_factor": router.capacity_factor,
    }
