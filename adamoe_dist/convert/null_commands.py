"""The options of null experts at ``import`` and ``upcycle``, and the command ``upcycle``."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from adamoe_dist.console import given_path, progress, say, whole_number
from adamoe_dist.convert.importing import RUN_CONFIG, ImportPlan
from adamoe_dist.convert.load_report import cut_texts, keep_load_report, measure_load
from adamoe_dist.convert.null_choices import NullChoice
from adamoe_dist.convert.outputs import check_output
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.convert.upcycling import Upcycling, plan_upcycling, upcycle
from adamoe_dist.errors import UserError


def add_paths(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that makes a checkpoint of a Hugging Face model."""
    parser.add_argument(
        "--from", dest="source", type=given_path, required=True, metavar="HF_DIR", help="as save_pretrained writes it"
    )
    parser.add_argument(
        "--to", type=given_path, required=True, metavar="CKPT_DIR", help="a new directory of checkpoints"
    )


def add_null_options(parser: argparse.ArgumentParser, top_k: str) -> None:
    """Add the options that give a model null experts.

    Args:
        parser: of the command.
        top_k: what ``--top-k`` says of itself.
    """
    parser.add_argument("--num-null-experts", type=int, default=0, metavar="M", help="null experts a layer")
    parser.add_argument("--top-k", type=int, metavar="K", help=top_k)
    parser.add_argument(
        "--null-init",
        choices=("copy", "shared", "random"),
        help="rows that score null experts: noisy copies of the true experts' rows (the default), one row for all, or "
        "at random",
    )
    parser.add_argument(
        "--target-load", type=float, metavar="L", help="true experts a token that training is to hold in each layer"
    )
    parser.add_argument(
        "--preserve-output",
        action="store_true",
        help="start with all null experts shut out, so that the output is the model's own; training lets them in until "
        "the load is --target-load",
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="S", help="seed of what is drawn")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="report the load, the null share and the all-null share of each layer on a text; may be repeated",
    )


def null_choice(options: argparse.Namespace, top_k: int | None) -> NullChoice:
    """Return the null experts that were asked for, with ``top_k`` slots a token.

    Raises:
        UserError: an option says something of null experts and there are none.
    """
    if options.num_null_experts == 0 and options.null_init is not None:
        raise UserError(
            f"--null-init {options.null_init} needs null experts; give their number, --num-null-experts M, or leave it "
            "out"
        )
    return NullChoice(
        num_null=options.num_null_experts,
        top_k=top_k,
        null_init=options.null_init or "copy",
        seed=options.seed,
        target_load=options.target_load,
        preserves_output=options.preserve_output,
    )


def check_texts(options: argparse.Namespace, plan: ImportPlan) -> list[list[int]]:
    """Return the token ids of each text to report the load on, cut with the model's tokenizer.

    Raises:
        UserError: a text or the tokenizer cannot be read, or a text has no tokens.
    """
    if not options.text:
        return []
    if not has_tokenizer(plan.source.path):
        raise UserError(f"--text {options.text[0]}: {plan.source.path} has no tokenizer to cut it with; leave it out")
    return cut_texts(plan.source.path, [Path(text) for text in options.text])


def describe_null_experts(plan: ImportPlan) -> str:
    """Say in one line what null experts a model has and how it starts."""
    moe = plan.config.moe
    if moe.num_null_experts == 0:
        return "null experts: none"
    held = "none held" if moe.router.target_load is None else f"{moe.router.target_load:g} to be held"
    return (
        f"null experts: {moe.num_null_experts} beside {moe.num_experts}, top-k {moe.top_k}, rows: "
        f"{moe.router.null_init}, weights: {moe.router.normalize}, load: {held}"
    )


def report_load(path: Path, plan: ImportPlan, names: list[str], texts: list[list[int]]) -> None:
    """Print what the tokens of texts with these names do at each layer of the checkpoint just written."""
    if not texts:
        return
    loads, tokens = measure_load(path, plan.source.architecture.vocab_size, texts), sum(len(ids) for ids in texts)
    keep_load_report(path, names, tokens, loads)
    say(f"load on {tokens} tokens of {', '.join(names)}, before training:")
    say("  layer  true experts a token  null share  all-null share")
    rows = [(str(one.layer), one.true_experts_per_token, one.null_share, one.all_null_share) for one in loads]
    means = tuple(sum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:])
    for name, load, null_share, all_null_share in [*rows, ("mean", *means)]:
        say(f"  {name:>5}  {load:20.3f}  {null_share:10.3f}  {all_null_share:14.3f}")


def say_how_to_start(target: Path) -> None:
    """Print the arguments, as a shell reads them, with which a run starts from the checkpoint just written."""
    arguments = shlex.join(["--config", str(target / RUN_CONFIG), "data.train=[{path: PREFIX}]"])
    say(f"start a run from it with: {arguments}")


def add_upcycle(commands: Any) -> None:
    """Add the command ``upcycle``."""
    parser = commands.add_parser(
        "upcycle",
        help="make a checkpoint with experts of a dense Hugging Face model",
        description="Make a checkpoint with experts of a dense Hugging Face model: each layer's experts are copies of "
        "its feed-forward, or of pieces of it, and its router is drawn at random (arXiv 2212.05055).",
    )
    add_paths(parser)
    parser.add_argument("--num-experts", type=int, required=True, metavar="N", help="true experts a layer")
    parser.add_argument(
        "--expert-hidden-size",
        type=int,
        metavar="F",
        help="inner width of an expert, a divisor of the dense feed-forward's, which is cut into pieces of it "
        "(default: whole copies)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="add noise to every expert's matrices, of S times their standard deviation",
    )
    add_null_options(parser, "slots a token (default: 2)")


def run_upcycle(options: argparse.Namespace) -> None:
    """Do ``upcycle``."""
    top_k = 2 if options.top_k is None else options.top_k
    sizes = Upcycling(options.num_experts, top_k, options.expert_hidden_size, options.noise, options.seed)
    upcycling = plan_upcycling(Path(options.source), sizes, null_choice(options, None))
    plan = upcycling.checkpoint
    texts, target = check_texts(options, plan), Path(options.to)
    check_output(target, plan.bytes)
    for note in plan.notes:
        say(f"note: {note}")
    with progress(plan.bytes, "B", f"upcycle {plan.source.path.name}") as bar:
        path = upcycle(upcycling, target, on_bytes=bar.update)
    experts = "whole copies" if upcycling.pieces == 1 else f"pieces of {upcycling.pieces}"
    say(f"{path}: {plan.config.moe.num_experts} experts a layer, {experts}, top-k {plan.config.moe.top_k}")
    say(describe_null_experts(plan))
    say(f"output before training: {upcycling.output}")
    report_load(path, plan, options.text, texts)
    say_how_to_start(target)
