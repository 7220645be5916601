"""Reading a ``config.json`` so that nothing in it is lost: each key is mapped, known to do nothing, or refused."""

import sys
from typing import Any

from adamoe_dist.errors import UserError

_GENERIC_KEYS = """
_attn_implementation_autoset _model_name_or_path _name_or_path architectures attn_implementation auto_map bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label label2id length_penalty max_length min_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
output_router_logits output_scores pad_token_id prefix problem_type remove_invalid_values repetition_penalty
return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
unk_token_id use_bfloat16 use_cache
"""
GENERIC = frozenset(_GENERIC_KEYS.split())
"""Keys of transformers that say nothing of what the model computes: how it was made, saved, sampled from, trained."""

_TRAINING_NOISE = {"attention_dropout": 0.0, "router_jitter_noise": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pretraining_tp": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "clip_qkv": (None,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "pruned_heads": ({},),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
}
"""What every family's model computes with; another value is another model."""
_MISSING = object()


class HFConfig:
    """The keys of one ``config.json``, each of which is to be taken or explained."""

    def __init__(self, values: dict[str, Any], source: str = "config.json") -> None:
        """Take the parsed file; ``source`` is what messages call it."""
        self._left = dict(values)
        self._source = source
        self._problems: list[str] = []
        self.notes: list[str] = []

    def has(self, name: str) -> bool:
        """Tell whether a key with a value is left."""
        return self._left.get(name) is not None

    def mentions(self, name: str) -> bool:
        """Tell whether a key is there, with a value or null."""
        return name in self._left

    def put(self, name: str, value: Any) -> None:
        """Give a key the value that the model's class has where the file says nothing."""
        self._left[name] = value

    def integer(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """Take a key that must be a whole number, at least ``least``; without ``default`` it must be there."""
        value = self._left.pop(name, None)
        if value is None:
            if default is _MISSING:
                self._problems.append(f"{name} is missing")
                return 1
            return int(default)
        value = _whole(value)
        if type(value) is not int or value < least:
            self._problems.append(f"{name}={value!r} must be a whole number, at least {least}")
            return least
        return value

    def optional_integer(self, name: str) -> int | None:
        """Take a key that is a positive whole number or null."""
        if not self.has(name):
            self._left.pop(name, None)
            return None
        return self.integer(name)

    def number(self, name: str, default: float) -> float:
        """Take a key that must be a positive number."""
        value = self.optional_number(name)
        if value == 0:
            self._problems.append(f"{name}={value!r} must be a positive number")
        return value or default

    def optional_number(self, name: str) -> float | None:
        """Take a key that is a number, not negative, or null."""
        value = self._left.pop(name, None)
        if value is not None and not (_is_finite(value) and value >= 0):
            self._problems.append(f"{name}={value!r} must be a number, not negative")
            return None
        return None if value is None else float(value)

    def word(self, name: str, default: str, *allowed: str) -> str:
        """Take a key that must be one of some words."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            self._problems.append(f"{name}={value!r} must be one of {', '.join(allowed)}")
        return default if value not in allowed else str(value)

    def flag(self, name: str, default: bool) -> bool:
        """Take a key that must be true or false."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._problems.append(f"{name}={value!r} must be true or false")
            return default
        return value

    def integers(self, name: str) -> list[int]:
        """Take a key that must be a list of whole numbers; missing: none."""
        value = self._left.pop(name, None) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            self._problems.append(f"{name}={value!r} must be a list of whole numbers")
            return []
        return value

    def take(self, name: str) -> Any:
        """Take a key's value, whatever it is; None where it is missing."""
        return self._left.pop(name, None)

    def ignore(self, *names: str) -> None:
        """Pass over keys that say nothing here, whatever their value."""
        for name in names:
            self._left.pop(name, None)

    def expect(self, name: str, *allowed: Any) -> None:
        """Take a key that may be missing, null or one of ``allowed``; any other value is refused by name."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed if item is not None)
            self.refuse(name, value, f"this model has {wanted or 'none'}")

    def refuse(self, name: str, value: Any, reason: str) -> None:
        """Note that a value is refused; :meth:`finish` says so."""
        self._problems.append(f"{name}={value!r} cannot be converted ({reason})")

    def rotary_base(self, default: float) -> int:
        """Take the base of the rotary angles, in the form of transformers 4 or 5; any scaling is refused."""
        theta, parameters, scaling = self.take("rope_theta"), self.take("rope_parameters"), self.take("rope_scaling")
        for name, given in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if given is None:
                continue
            rest = dict(given) if isinstance(given, dict) else {"?": given}
            is_plain = all(rest.pop(key, None) in (None, "default") for key in ("rope_type", "type"))
            theta = rest.pop("rope_theta", theta)
            if rest.pop("partial_rotary_factor", 1.0) != 1.0 or rest or not is_plain:
                self.refuse(name, given, "only plain rotary positions are known here, without any scaling")
        base = default if theta is None else theta
        if not _is_finite(base) or base < 1 or base != int(base):
            self.refuse("rope_theta", base, "the base must be a whole number")
            return 1
        return int(base)

    def full_attention(self, positions: int, is_used: bool = True) -> None:
        """Take the sliding window, which must be off or no narrower than ``positions``."""
        window, kinds = _whole(self.take("sliding_window")), self.take("layer_types")
        is_wide = not is_used or not window or (type(window) is int and window >= positions)
        if not is_wide:
            way_out = f"lower max_position_embeddings={positions} to it in config.json where no text is longer"
            self.refuse("sliding_window", window, f"every token sees all before it here; {way_out}")
        elif kinds is not None and not isinstance(kinds, list):
            self.refuse("layer_types", kinds, "it must be a list")
        elif kinds and any(kind != "full_attention" for kind in kinds) and not (window and is_used):
            self.refuse("layer_types", kinds, "every token sees all before it here")

    def finish(self, model_type: str, architecture: str) -> None:
        """Account for the keys that are left.

        Raises:
            UserError: naming every key that is refused, with its value.
        """
        made = self._left.get("architectures") or [architecture]
        if not isinstance(made, list) or architecture not in made:
            self.refuse("architectures", made, f"of {model_type} only {architecture} can be converted")
        for name, quiet in _TRAINING_NOISE.items():
            value = self._left.pop(name, None)
            if value:
                self.notes.append(f"{name}={value} acts in training only and is not taken over (here {quiet})")
        coefficient = self._left.pop("router_aux_loss_coef", None)
        if coefficient:
            self.notes.append(
                f"router_aux_loss_coef={coefficient} acts in training only and is not taken over: it weighs one loss "
                "over all layers, moe.router.balance.coefficient here one of each layer"
            )
        for name, allowed in _MUST_BE.items():
            self.expect(name, *allowed)
        for name, value in sorted(self._left.items()):
            if name not in GENERIC and value is not None and value != [] and value != {}:
                self.refuse(name, value, f"this key of {model_type} is not known here")
        if self._problems:
            listed = "; ".join(self._problems)
            raise UserError(f"{self._source}: {listed}; convert a model without, or change the file if it is wrong")


def _is_finite(value: Any) -> bool:
    """Tell whether a value of JSON is a number that a float can hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _whole(value: Any) -> Any:
    """Return a whole number that is written as 4096.0 as one; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
