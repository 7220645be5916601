"""Between Hugging Face directories and checkpoints, and what a checkpoint holds or is changed to."""

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, given_path, progress, run_tool, say, whole_number
from adamoe_dist.errors import UserError

platform.prepare()

from adamoe_dist.checkpoint import (  # noqa: E402
    bytes_of_files,
    bytes_to_copy,
    changed_keys,
    checkpoint_at,
    describe_checkpoint,
    holds_weights_only,
    plan_null_experts,
    read_config,
    set_null_experts,
    verify_files,
)
from adamoe_dist.convert import FILES, imported_family, is_hf_directory  # noqa: E402
from adamoe_dist.convert.commands import (  # noqa: E402
    add_export,
    add_import,
    add_verify,
    describe_hf_directory,
    run_export,
    run_import,
    run_verify,
    show_hf_directory,
)
from adamoe_dist.convert.null_commands import add_upcycle, run_upcycle  # noqa: E402

SHOWN_TENSORS = 12


def _parser() -> ToolParser:
    parser = ToolParser(
        "Convert between Hugging Face directories and checkpoints, look into either, change a checkpoint. Tensors are "
        "not read into memory at once."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_import(commands)
    add_upcycle(commands)
    add_export(commands)
    add_verify(commands)
    _add_inspect(commands)
    _add_set_null_experts(commands)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=given_path,
        required=True,
        metavar="DIR",
        help="a checkpoint; or a directory of checkpoints or a run directory, whose last complete one is meant",
    )


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what is in a checkpoint or a Hugging Face directory",
        description="Show what is in a checkpoint or a Hugging Face directory.",
    )
    _add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not only the first ones")
    parser.add_argument("--verify", action="store_true", help="check the size and the SHA-256 of every file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_set_null_experts(commands: Any) -> None:
    parser = commands.add_parser(
        "set-null-experts",
        help="copy a checkpoint with another number of null experts (0: none)",
        description="Copy a checkpoint with another number of null experts: 0 makes a model without, a model without "
        "becomes AdaMoE. All other weights, the optimizer's state and the position in the data stay, bit for bit.",
    )
    _add_source(parser)
    parser.add_argument(
        "--to",
        type=given_path,
        required=True,
        metavar="DIR",
        help="a new directory of checkpoints, or DIR/iter_N with the step's N",
    )
    parser.add_argument("--num-null-experts", type=int, required=True, metavar="M", help="null experts a layer")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="slots a token")
    parser.add_argument(
        "--null-init",
        choices=("copy", "shared", "random"),
        help="draw all rows that score null experts anew: noisy copies of the true experts' rows, one row for all, or "
        "at random; without it they are kept where M stays or they share one row, else drawn as moe.router.null_init "
        "in the checkpoint says, from M = 0 as copy",
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="S", help="seed of what is drawn")


def _verify(path: Path) -> None:
    with progress(bytes_of_files(path), "B", f"verify {path.name}") as bar:
        verify_files(path, on_bytes=bar.update)


def _inspect(options: argparse.Namespace) -> None:
    if is_hf_directory(Path(options.source)):
        _inspect_hf(options)
        return
    path = checkpoint_at(options.source, "--from")
    if options.verify:
        _verify(path)
    contents = describe_checkpoint(path) | {"imported_from": imported_family(path)}
    if options.json:
        say(json.dumps(contents | ({"verified": True} if options.verify else {}), indent=1))
        return
    _show(contents, options.tensors)
    if options.verify:
        say("ok: every file has the size and the SHA-256 that it was saved with")


def _inspect_hf(options: argparse.Namespace) -> None:
    if options.verify:
        raise UserError(f"--verify: {options.source} is a Hugging Face directory, which has no hashes; leave it out")
    contents = describe_hf_directory(Path(options.source))
    if options.json:
        say(json.dumps(contents, indent=1))
    else:
        show_hf_directory(contents, len(contents["tensors"]) if options.tensors else SHOWN_TENSORS)


def _show(contents: dict[str, Any], all_tensors: bool) -> None:
    say(
        f"{contents['path']}: step {contents['step']}, {contents['tokens_seen']} tokens seen, saved {contents['saved']}"
    )
    if contents["imported_from"]:
        say(f"imported from a {contents['imported_from']} model")
    for title in ("model", "layout", "versions"):
        say(f"{title}: " + ", ".join(f"{name} {value}" for name, value in contents[title].items()))
    files, tensors = contents["files"], contents["tensors"]
    say(f"tensors: {len(tensors)}, parameters: {contents['parameters']}")
    shown = list(tensors.items())[: len(tensors) if all_tensors else SHOWN_TENSORS]
    width = max((len(name) for name, _ in shown), default=0)
    for name, tensor in shown:
        say(f"  {name:{width}}  {tensor['dtype']} {tuple(tensor['shape'])}")
    if len(shown) < len(tensors):
        say(f"  ... and {len(tensors) - len(shown)} more (--tensors)")
    say(f"files: {len(files)}, {contents['bytes']} bytes")
    for name, size in files.items():
        say(f"  {name}  {size}")


def _set_null_experts(options: argparse.Namespace) -> None:
    source = checkpoint_at(options.source, "--from")
    change = plan_null_experts(source, options.num_null_experts, options.top_k, options.null_init, options.seed)
    before = read_config(source)["moe"]
    with progress(bytes_to_copy(source, change), "B", f"copy {source.name}") as bar:
        path = set_null_experts(source, Path(options.to), change, on_bytes=bar.update)
    rows = "kept" if change.num_null and change.null_init is None else change.null_init or "none"
    say(
        f"{path}: null experts {before['num_null_experts']} -> {options.num_null_experts}, top-k {before['top_k']} -> "
        f"{options.top_k}, null rows: {rows}, weights: {change.tree['moe']['router']['normalize']}"
    )
    changed = [f"{key}={value}" for key, value in changed_keys(source, change).items()]
    if not holds_weights_only(source):
        say(f"continue with: {shlex.join([f'checkpoint.resume={path}', *changed])}")
        return
    if (source.parent / FILES).is_dir():
        shutil.copytree(source.parent / FILES, path.parent / FILES)
    say(f"start a run with: {shlex.join([f'checkpoint.load_weights={path}', *changed])}")


def main(argv: list[str]) -> None:
    """Do as the command line says."""
    options = _parser().parse_args(argv)
    runs = {
        "import": run_import,
        "upcycle": run_upcycle,
        "export": run_export,
        "verify": run_verify,
        "inspect": _inspect,
        "set-null-experts": _set_null_experts,
    }
    runs[options.command](options)


if __name__ == "__main__":
    run_tool(main)
