"""One way to open a model that is to be used: a Hugging Face directory, a checkpoint or a run directory."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adamoe_dist import platform
from adamoe_dist.data import prefix_ids_of
from adamoe_dist.errors import UserError

HF_CONFIG = "config.json"
CHECKPOINT_MANIFEST = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
FALLBACK_CONTEXT = 2048


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model and its tokenizer, ready to be used.

    Attributes:
        model: a transformers model for causal language modelling, in evaluation mode.
        tokenizer: its transformers tokenizer.
        description: what was opened, in words, for reports.
        reference_top_k: experts a token in the model that ``expert_flops_saved`` compares with; None: a dense model.
    """

    model: Any
    tokenizer: Any
    description: str
    reference_top_k: int | None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        place = torch.device(self.model.get_input_embeddings().weight.device)
        # Weights that accelerate keeps elsewhere and fetches for each use are on no device; it computes on the first.
        return platform.device() if place.type == "meta" else place

    @property
    def context(self) -> int:
        """The longest sequence that the model was made for, in tokens."""
        return _longest_of(self.model.config)

    @property
    def prefix_id(self) -> int:
        """The id before the first token of a text: the one that the tokenizer puts there by itself, else the end's.

        A model whose tokenizer puts nothing there has seen texts behind the end of others, and nothing behind a
        bos_token, though its vocabulary may have one.

        Raises:
            UserError: the tokenizer has neither.
        """
        for token_id in (*prefix_ids_of(self.tokenizer), self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token_id is not None:
                return int(token_id)
        raise UserError(
            f"the tokenizer of {self.description} has no bos_token and no eos_token, so that nothing can stand before "
            "the first token of a text; name one in tokenizer_config.json"
        )


def open_model(
    path: str | Path, dtype: str = "auto", device: str = "auto", tokenizer: str | None = None
) -> OpenedModel:
    """Open a model.

    Args:
        path: a directory in Hugging Face's format, a checkpoint, or a run directory, whose last complete checkpoint is
            meant.
        dtype: ``fp32``, ``bf16``, ``fp16``; ``auto``: as it was saved in a Hugging Face directory, else bf16 on CUDA
            and fp32 on a CPU.
        device: a torch device; ``auto``: the GPU, spread over several where there are (accelerate's device map), else
            the CPU; or the name of one of accelerate's other maps (``balanced``, ``balanced_low_0``, ``sequential``).
        tokenizer: a directory with another tokenizer.

    Returns:
        The model, in evaluation mode, without gradients.

    Raises:
        UserError: there is no model at ``path``, no tokenizer, or the two do not fit.
    """
    check_placement(dtype, device)
    given = _directory(path)
    if _is_hugging_face(given):
        return _open_hugging_face(given, dtype, device, tokenizer)
    return _open_checkpoint(given, dtype, device, tokenizer)


def not_finite(opened: OpenedModel) -> str:
    """Return the refusal of a model whose output is no number."""
    return f"{opened.description}: its output is NaN or infinite; try --dtype fp32, or choose another checkpoint"


def longest_input(path: str | Path) -> int:
    """Return the longest sequence that the model at ``path`` was made for, from its configuration alone.

    Raises:
        UserError: there is no model at ``path``.
    """
    given = _directory(path)
    if _is_hugging_face(given):
        return _longest_of(_read_hf_config(given))
    platform.prepare()
    from adamoe_dist.checkpoint import checkpoint_at, read_config

    return int(read_config(checkpoint_at(str(given), "--checkpoint"))["model"]["sequence_length"])


def _longest_of(config: Any) -> int:
    """Return the length that a transformers configuration names, whatever its family calls it."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or FALLBACK_CONTEXT)


def _directory(path: str | Path) -> Path:
    given = Path(path)
    if not given.is_dir():
        raise UserError(
            f"--checkpoint {path} is not a directory; give a checkpoint, a run directory or a Hugging Face directory"
        )
    return given


def check_placement(dtype: str, device: str) -> None:
    """Refuse a type of numbers or a device that is not known, or not here.

    Raises:
        UserError: naming the option.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; give auto, {', '.join(DTYPES)}")
    if device == "auto" or device in DEVICE_MAPS:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not known; give auto, cpu, cuda, cuda:N or {', '.join(DEVICE_MAPS)}")
    if kind == "cuda" and not platform.is_cuda():
        raise UserError(f"--device {device}: there is no CUDA device here; give --device cpu")


def _placement(device: str) -> str | dict[str, str]:
    """Return accelerate's device map for a device."""
    if device in DEVICE_MAPS or (device == "auto" and platform.is_cuda() and torch.cuda.device_count() > 1):
        return device
    return {"": str(platform.device()) if device == "auto" else device}


def _is_hugging_face(path: Path) -> bool:
    """Tell a Hugging Face directory from a checkpoint, which has a config.json of its own."""
    return (path / HF_CONFIG).is_file() and not (path / CHECKPOINT_MANIFEST).exists()


def _open_hugging_face(path: Path, dtype: str, device: str, tokenizer: str | None) -> OpenedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from adamoe_dist.hf import transformers_tokenizer

    config = _read_hf_config(path)
    chosen = transformers_tokenizer(Path(tokenizer)) if tokenizer else _tokenizer_beside(path)
    try:
        with _transformers_at_error_level():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES.get(dtype, "auto"),
                device_map=_placement(device),
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except torch.OutOfMemoryError as error:
        raise UserError(f"--checkpoint {path} does not fit into the GPU's memory; try --dtype bf16") from error
    except RuntimeError as error:  # what transformers makes of several weights, as of a layer's experts
        raise UserError(
            f"--checkpoint {path}: weights are missing or have another shape than {HF_CONFIG} says, so that "
            f"transformers cannot join them; export or fetch the model again ({str(error).partition('. ')[0]})"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"--checkpoint {path} cannot be opened by transformers: {error}") from error
    _require_all_weights(path, loaded)
    return _finish(model, chosen, f"{path} ({config.model_type})")


@contextlib.contextmanager
def _transformers_at_error_level() -> Iterator[None]:
    """Leave out transformers' table of what a directory lacks: the refusal says it in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_all_weights(path: Path, loaded: dict[str, Any]) -> None:
    """Refuse a model with weights that were not read: they would be random numbers."""
    missing, mismatched = sorted(loaded["missing_keys"]), sorted(loaded["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise UserError(
            f"--checkpoint {path}: {len(mismatched)} weights have another shape than {HF_CONFIG} says, as {name}: "
            f"{tuple(found)}, not {tuple(expected)}; export or fetch the model again"
        )
    if missing:
        raise UserError(
            f"--checkpoint {path}: {len(missing)} weights of the model are not in its files, as {missing[0]}; export "
            "or fetch the model again"
        )


def _read_hf_config(path: Path) -> Any:
    """Return the configuration as transformers reads it."""
    # This registers AdaMoE's classes too, so that their copies in a directory are not run.
    from transformers import AutoConfig

    import adamoe_dist.hf  # noqa: F401

    _require_model_type(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--checkpoint {path} cannot be opened by transformers: {error}") from error


def _require_model_type(path: Path) -> None:
    try:
        config = json.loads((path / HF_CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path / HF_CONFIG} is not JSON ({error}); export the model again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(
            f"{path / HF_CONFIG} names no model_type; give a checkpoint, a run directory or a Hugging Face directory"
        )


def _tokenizer_beside(path: Path) -> Any:
    """Return the tokenizer that lies in a Hugging Face directory."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"--checkpoint {path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's there, or name a "
            "directory with --tokenizer"
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer in {path} cannot be opened by transformers: {error}") from error


def _open_checkpoint(path: Path, dtype: str, device: str, tokenizer: str | None) -> OpenedModel:
    platform.prepare()
    from adamoe_dist.checkpoint import checkpoint_at, read_config
    from adamoe_dist.config import config_from_dict
    from adamoe_dist.hf import model_from_checkpoint, tokenizer_from_checkpoint, transformers_tokenizer

    if device in DEVICE_MAPS:
        raise UserError(f"--device {device} is for Hugging Face directories; give auto, or export {path} first")
    source = checkpoint_at(str(path), "--checkpoint")
    config = config_from_dict(read_config(source))
    chosen = transformers_tokenizer(Path(tokenizer)) if tokenizer else tokenizer_from_checkpoint(source)
    precision = platform.compute_precision("auto") if dtype == "auto" else dtype
    model = model_from_checkpoint(source, DTYPES[precision], _placement(device))
    return _finish(model, chosen, str(source), config.reference_top_k)


def _finish(model: Any, tokenizer: Any, name: str, reference_top_k: int | None = None) -> OpenedModel:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} ids, the model {vocab_size}; give the model's own tokenizer "
            "with --tokenizer"
        )
    model.eval().requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    description = f"{name}, {parameters:,} parameters, {_words(model.dtype)}"
    opened = OpenedModel(model, tokenizer, description, reference_top_k or _reference_top_k(model.config))
    return dataclasses.replace(opened, description=f"{description} on {opened.device}")


def _words(dtype: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype).removeprefix("torch."))


def _reference_top_k(config: Any) -> int | None:
    """Return the rule of ``moe.reference_top_k``: as it was set, else top_k without null experts, else 2."""
    config = config.get_text_config()
    given = getattr(config, "reference_top_k", None)
    if given is not None:
        return int(given)
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None)
    if top_k is None:
        return None
    return 2 if getattr(config, "num_null_experts", 0) else int(top_k)
