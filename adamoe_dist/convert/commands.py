"""Commands of ``tools/convert_checkpoint.py``: import, export, verify, and inspect for a Hugging Face directory."""

import argparse
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from adamoe_dist.console import given_path, progress, say
from adamoe_dist.convert.export_plan import plan_export
from adamoe_dist.convert.exporting import export_model
from adamoe_dist.convert.families import FAMILIES
from adamoe_dist.convert.family import Architecture
from adamoe_dist.convert.hf_directory import HFDirectory
from adamoe_dist.convert.importing import import_model, plan_import
from adamoe_dist.convert.null_choices import with_null_experts
from adamoe_dist.convert.null_commands import (
    add_null_options,
    add_paths,
    check_texts,
    describe_null_experts,
    null_choice,
    report_load,
    say_how_to_start,
)
from adamoe_dist.convert.outputs import check_output
from adamoe_dist.convert.tokenizer_files import count_ids
from adamoe_dist.convert.verifying import Comparing
from adamoe_dist.errors import UserError

_UNITS = {"": 1} | {f"{letter}{end}": 10 ** (3 * power) for end in ("", "B") for power, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)}
_MOST_BYTES = 10**18


def add_import(commands: Any) -> None:
    """Add the command ``import``."""
    parser = commands.add_parser(
        "import",
        help="make a checkpoint of a Hugging Face model with experts",
        description="Make a checkpoint of a Hugging Face model with experts. Its weights are all taken over, one at a "
        "time; a model that would not be the same here is refused.",
    )
    add_paths(parser)
    parser.add_argument(
        "--vocab-size-multiple", type=int, metavar="N", help="pad the vocabulary to a multiple of it (default: 128)"
    )
    add_null_options(parser, "slots a token; needed with null experts, unless the output is preserved")


def run_import(options: argparse.Namespace) -> None:
    """Do ``import``."""
    if options.vocab_size_multiple is not None and options.vocab_size_multiple < 1:
        raise UserError(f"--vocab-size-multiple {options.vocab_size_multiple} must be at least 1")
    original = plan_import(Path(options.source), options.vocab_size_multiple)
    plan = with_null_experts(original, null_choice(options, options.top_k))
    texts, target = check_texts(options, plan), Path(options.to)
    check_output(target, plan.bytes)
    for note in plan.notes:
        say(f"note: {note}")
    with progress(plan.bytes, "B", f"import {plan.source.path.name}") as bar:
        path = import_model(plan, target, on_bytes=bar.update)
    parameters = sum(weight.elements for weight in plan.weights if not weight.is_copy)
    say(f"{path}: {plan.source.family.model_type}, {parameters} parameters, {len(plan.weights)} tensors")
    say(describe_null_experts(plan))
    report_load(path, plan, options.text, texts)
    say_how_to_start(target)


def add_export(commands: Any) -> None:
    """Add the command ``export``."""
    parser = commands.add_parser(
        "export",
        help="make a Hugging Face directory of a checkpoint",
        description="Make a Hugging Face directory of a checkpoint: of a family that transformers has where the model "
        "is one of it, else with the classes of AdaMoE.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=given_path,
        required=True,
        metavar="DIR",
        help="a checkpoint; or a directory of checkpoints or a run directory, whose last complete one is meant",
    )
    parser.add_argument("--to", type=given_path, required=True, metavar="HF_DIR", help="a new directory")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: as they were where the model was imported, rows of null experts as the router; "
        "else fp32)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of a file, as 5GB or 500MB (default: the files of an imported model, else 5GB)",
    )
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="model_type to write (default: the first that has such a model)"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="V", help="rows of the embedding without padding, where nothing else says it"
    )
    parser.add_argument("--license", metavar="ID", help="licence that the model card names, as apache-2.0")
    parser.add_argument(
        "--base-model", metavar="ID", help="name on the hub of the imported model, for the model card, as owner/name"
    )


def run_export(options: argparse.Namespace) -> None:
    """Do ``export``."""
    from adamoe_dist.hf import finish_export, write_tokenizer

    _check_one_line("--license", options.license)
    _check_one_line("--base-model", options.base_model)
    most = None if options.max_shard_size is None else size_in_bytes(options.max_shard_size)
    plan = plan_export(options.source, options.dtype, most, options.family, options.vocab_size)
    target = Path(options.to)
    check_output(target, plan.bytes)
    with progress(plan.work_bytes, "B", f"export {plan.checkpoint.name}") as bar:
        notes = export_model(
            plan,
            target,
            write_tokenizer,
            bar.update,
            lambda plan, directory: finish_export(plan, directory, target.name, options.license, options.base_model),
        )
    for note in notes:
        say(f"note: {note}")
    family, files = plan.family, len(plan.shards)
    say(f"{target}: {family.architecture} ({family.model_type}), {plan.bytes} bytes of weights in {files} files")


def _check_one_line(option: str, value: str | None) -> None:
    if value is not None and not (value.strip() and value.isprintable()):
        raise UserError(f"{option} {value!r} is to stand in one line of the model card; give a plain identifier")


def size_in_bytes(text: str) -> int:
    """Return what ``5GB`` means.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\d+)?)\s*([KMGT](?:I?B)?)?", text.strip().upper(), re.ASCII)
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size <= _MOST_BYTES:
        raise UserError(f"--max-shard-size {text} is not a size; give one as 5GB or 500MB")
    return int(size)


def add_verify(commands: Any) -> None:
    """Add the command ``verify``."""
    parser = commands.add_parser(
        "verify",
        help="compare a Hugging Face directory with a checkpoint",
        description="Compare a Hugging Face directory with a checkpoint: every tensor, and the logits of the same "
        "tokens in fp32, for which the model must fit into memory. A difference above the tolerance ends with exit "
        "code 2.",
    )
    parser.add_argument("--hf", type=given_path, required=True, metavar="HF_DIR", help="the Hugging Face directory")
    parser.add_argument("--megatron", type=given_path, required=True, metavar="CKPT_DIR", help="the checkpoint")
    parser.add_argument("--text", metavar="FILE", help="text to compare with (default: a few sentences)")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="T", help="largest difference of two logits")
    parser.add_argument(
        "--tensors-only", action="store_true", help="compare no logits: tensor by tensor, in any memory"
    )


def run_verify(options: argparse.Namespace) -> None:
    """Do ``verify``."""
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance {options.tolerance} must be a number of at least 0")
    if options.tensors_only and options.text:
        raise UserError(f"--text {options.text} is for logits, which --tensors-only leaves out; give one of the two")
    pair = Comparing(Path(options.hf), options.megatron)
    text = None if options.text is None else Path(options.text)
    if text is not None:
        pair.sequences(text)  # refuses before tensors are compared
    if not options.tensors_only:
        pair.check_logits_possible()
    with progress(pair.work_bytes, "B", "compare tensors") as bar:
        tensors = pair.compare_tensors(on_bytes=bar.update)
    say(f"tensors: {tensors}, all equal in the types of {pair.directory.path}")
    if options.tensors_only:
        say("ok: the same tensors; logits were not compared (--tensors-only)")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights: it would stand before the line of a refusal
    source, tokens, largest, mean = pair.compare_logits(text, options.tolerance)
    say(f"logits: {tokens} tokens ({source}), largest difference {largest:.3g}, mean {mean:.3g}")
    say(f"ok: the same model within {options.tolerance:g}")


def describe_hf_directory(path: Path) -> dict[str, Any]:
    """Return what a Hugging Face directory holds, and what keeps it from being converted, as plain values."""
    directory = HFDirectory(path)
    ids, refused = _ids_and_refusals(directory)
    tensors = directory.tensors
    return {
        "path": str(path),
        "family": directory.family.model_type,
        "is_dense": directory.family.is_dense,
        "model": {} if refused else _sizes(directory.architecture),
        "parameters": sum(prod(stored.shape) for stored in tensors.values()),
        "tensors": {name: {"shape": list(one.shape), "dtype": one.dtype} for name, one in sorted(tensors.items())},
        "shards": {shard: (path / shard).stat().st_size for shard in directory.shards},
        "dtypes": dict(Counter(stored.dtype for stored in tensors.values())),
        "tokenizer_ids": ids,
        "notes": [] if refused else list(directory.architecture.notes),
        "refused": refused,
    }


def _sizes(architecture: Architecture) -> dict[str, Any]:
    """Return the sizes that say which model it is, by their configuration keys."""
    config = architecture.config()
    model, moe = config.model, config.moe
    experts = {
        "moe.num_experts": moe.num_experts,
        "moe.num_null_experts": moe.num_null_experts,
        "moe.top_k": moe.top_k,
        "moe.expert_hidden_size": moe.expert_hidden_size,
    }
    return {
        "model.num_layers": model.num_layers,
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups or model.num_attention_heads,
        "model.sequence_length": model.sequence_length,
        "model.vocab_size": architecture.vocab_size,
        "MoE layers": len(config.moe_layers),
        **(experts if config.moe_layers else {}),
    }


def _ids_and_refusals(directory: HFDirectory) -> tuple[int | None, list[str]]:
    """Return the size of the tokenizer, and what is wrong with the model and with its tokenizer."""
    ids, refused = None, []
    try:
        directory.weights(directory.config())
    except UserError as problem:
        refused.append(str(problem))
    try:
        ids = count_ids(directory.path)
        if not refused:
            directory.check_tokenizer()
    except UserError as problem:
        refused.append(str(problem))
    return ids, refused


def show_hf_directory(contents: dict[str, Any], shown: int) -> None:
    """Print what :func:`describe_hf_directory` found, with so many tensors."""
    say(f"{contents['path']}: Hugging Face model of family {contents['family']}")
    if contents["is_dense"]:
        say("it is dense: the command upcycle makes experts of its feed-forward layers")
    if contents["model"]:
        say("model: " + ", ".join(f"{name} {value}" for name, value in contents["model"].items()))
    types = ", ".join(f"{name} {count}" for name, count in contents["dtypes"].items())
    tensors = contents["tensors"]
    say(f"tensors: {len(tensors)} ({types}), parameters: {contents['parameters']}")
    for name, tensor in list(tensors.items())[:shown]:
        say(f"  {name}  {tensor['dtype']} {tuple(tensor['shape'])}")
    if len(tensors) > shown:
        say(f"  ... and {len(tensors) - shown} more (--tensors)")
    say(f"files: {len(contents['shards'])}, {sum(contents['shards'].values())} bytes")
    for name, size in contents["shards"].items():
        say(f"  {name}  {size}")
    say(f"tokenizer: {contents['tokenizer_ids'] or 'none'}" + (" ids" if contents["tokenizer_ids"] else ""))
    for note in contents["notes"]:
        say(f"note: {note}")
    for problem in contents["refused"]:
        say(f"cannot be converted: {problem}")
