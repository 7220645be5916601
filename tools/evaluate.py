"""Measure a model on text (perplexity, bits per byte) and on multiple-choice questions."""

import argparse
import dataclasses
import gc
import itertools
import json
from pathlib import Path
from typing import Any

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, run_tool, say
from adamoe_dist.data import iterate_documents
from adamoe_dist.errors import UserError
from adamoe_dist.files import check_output_files, write_files

platform.prepare()

from adamoe_dist.inference import (  # noqa: E402
    NORMALISATIONS,
    QUESTION_TEMPLATE,
    Evaluation,
    Inputs,
    Settings,
    check_placement,
    check_windows,
    compare,
    evaluate,
    items_as_lines,
    longest_input,
    open_model,
    read_items,
)


def _parser() -> ToolParser:
    parser = ToolParser("Measure a model on text and on questions, and what its experts do there.")
    parser.add_argument("--checkpoint", metavar="DIR", help="a checkpoint, a run directory or a Hugging Face directory")
    parser.add_argument("--baseline", metavar="DIR", help="a second model, to compare with item by item")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="FILE.jsonl", help="multiple-choice questions")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text: .txt .jsonl .parquet, directories")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON field or parquet column of --text")
    parser.add_argument("--template", default=QUESTION_TEMPLATE, help="what a question becomes before its choices")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items or documents of each file")
    parser.add_argument("--context", type=int, metavar="C", help="tokens of text read at once; without it up to 2048")
    parser.add_argument("--stride", type=int, metavar="S", help="tokens that each window scores; without it half of C")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="sequences at a time")
    parser.add_argument("--reference-top-k", type=int, metavar="K", help="top-k that saved FLOPs are compared with")
    parser.add_argument("--tokenizer", metavar="DIR", help="another tokenizer, of --checkpoint only")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or an accelerate map as balanced")
    parser.add_argument("--output", metavar="FILE.json", help="write everything there, each layer too")
    parser.add_argument(
        "--predictions", metavar="FILE.jsonl", help="write each item's log-likelihoods and choices there"
    )
    parser.add_argument("--json", action="store_true", help="print what --output would hold instead of the summary")
    parser.add_argument(
        "--write-items", metavar="FILE.jsonl", help="only bring --tasks into one layout, for lm-evaluation-harness"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.write_items is not None:
        _check_write_items(options)
    if not options.tasks and not options.text:
        raise UserError("nothing to measure: give --tasks FILE.jsonl or --text FILE")
    if options.checkpoint is None and options.write_items is None:
        raise UserError("--checkpoint is missing; give a checkpoint, a run directory or a Hugging Face directory")
    for name in ("limit", "batch_size", "reference_top_k"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    if options.predictions is not None and not options.tasks:
        raise UserError(f"--predictions {options.predictions} is about --tasks, which is missing; leave it out")
    given = (
        (f"--{name.replace('_', '-')}", getattr(options, name)) for name in ("output", "predictions", "write_items")
    )
    check_output_files((option, Path(value)) for option, value in given if value is not None)
    check_placement(options.dtype, options.device)


def _check_write_items(options: argparse.Namespace) -> None:
    """Refuse what says something about a model, since none is opened."""
    if not options.tasks:
        raise UserError(f"--write-items {options.write_items} brings --tasks into one layout; give --tasks FILE.jsonl")
    for name in ("checkpoint", "baseline", "text", "output", "predictions", "json"):
        if getattr(options, name):
            raise UserError(f"--{name} does nothing beside --write-items, which opens no model; leave one of them out")


def _read_inputs(options: argparse.Namespace) -> Inputs:
    tasks = {file: read_items(file, options.template, options.limit) for file in options.tasks}
    texts = {}
    for file in options.text:
        documents = itertools.islice(iterate_documents([file], options.text_key), options.limit)
        texts[file] = [(document.text, document.source) for document in documents]
    return Inputs(tasks, texts)


def _measure(place: str, inputs: Inputs, settings: Settings, options: argparse.Namespace) -> Evaluation:
    tokenizer = options.tokenizer if place == options.checkpoint else None
    opened = open_model(place, options.dtype, options.device, tokenizer)
    measured = evaluate(opened, inputs, settings)
    del opened
    gc.collect()
    return measured


def _write(options: argparse.Namespace, report: dict[str, Any], measured: dict[str, Evaluation]) -> None:
    files = []
    if options.output is not None:
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        files.append(("--output", Path(options.output), _encoded(text)))
    if options.predictions is not None:
        records = (
            {"model": model, "task": file, **score.as_record()}
            for model, evaluation in measured.items()
            for file, scores in evaluation.tasks.items()
            for score in scores
        )
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.append(("--predictions", Path(options.predictions), _encoded("".join(lines))))
    write_files(files)


def _encoded(text: str) -> bytes:
    """Return UTF-8; what is no character, as in a file's name that is not UTF-8, becomes an escape of JSON."""
    return text.encode("utf-8", "backslashreplace")


def _show(title: str, report: dict[str, Any]) -> None:
    say(f"{title}: {report['model']}")
    for file, task in report["tasks"].items():
        say(f"{file}: {task['items']} items, {task['choices']} choices")
        for name in NORMALISATIONS:
            one = task["accuracy"][name]
            low, high = one["interval_95"]
            error = "" if one["standard_error"] is None else f" +- {one['standard_error']:.4f}"
            say(f"  accuracy ({name}) {one['value']:.4f}{error}, 95 % {low:.4f} to {high:.4f} (Wilson)")
        _show_experts(task["expert_use"])
    for file, text in report["text"].items():
        say(
            f"{file}: {text['documents']} documents, {text['tokens']} tokens, {text['bytes']} bytes (context "
            f"{text['context']}, stride {text['stride']})"
        )
        say(
            f"  perplexity {text['perplexity']:.4f}, {text['nats_per_token']:.4f} nats a token, "
            f"{text['bits_per_byte']:.4f} bits a byte"
        )
        if text["unknown_tokens"]:
            say(f"  {text['unknown_tokens']} unknown tokens: what they stand for is not scored, so this is too low")
        _show_experts(text["expert_use"])


def _show_experts(used: dict[str, Any] | None) -> None:
    if used is None:
        say("  experts: no router of a known kind in this model")
        return
    saved = f", {used['expert_flops_saved']:.1%} of the expert FLOPs of top-{used['reference_top_k']} saved"
    say(
        f"  experts: {used['true_experts_per_token']:.3f} true experts a token over {used['tokens']} tokens and "
        f"{len(used['layers'])} layers, null share {used['null_share']:.1%}, without a true expert "
        f"{used['all_null_share']:.1%}{saved}"
    )
    say("  load by layer: " + " ".join(f"{layer['true_experts_per_token']:.2f}" for layer in used["layers"]))


def _show_comparison(comparison: dict[str, Any]) -> None:
    for file, task in comparison["tasks"].items():
        say(f"{file}: checkpoint minus baseline, the same items")
        for name in NORMALISATIONS:
            one = task["accuracy"][name]
            low, high = one["interval_95"]
            say(
                f"  accuracy ({name}) {one['difference']:+.4f}, 95 % {low:+.4f} to {high:+.4f} (Newcombe, paired); "
                f"only here right {one['only_here_right']}, only there {one['only_baseline_right']}, McNemar p "
                f"{one['mcnemar_p']:.4g}"
            )
    for file, text in comparison["text"].items():
        one = text["bits_per_byte"]
        interval = "one document: no interval"
        if one["interval_95"] is not None:
            interval = "95 % {:+.4f} to {:+.4f} (bootstrap over documents)".format(*one["interval_95"])
        say(f"{file}: checkpoint minus baseline: {one['difference']:+.4f} bits a byte, {interval}")


def main(argv: list[str]) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(argv)
    _check(options)
    if options.write_items is not None:
        items = [item for of_file in _read_inputs(options).tasks.values() for item in of_file]
        write_files([("--write-items", Path(options.write_items), _encoded(items_as_lines(items)))])
        say(f"{options.write_items}: {len(items)} items")
        return
    places = [options.checkpoint, *([options.baseline] if options.baseline else [])]
    context, stride = check_windows(min(map(longest_input, places)), options.context, options.stride)
    inputs = _read_inputs(options)
    settings = Settings(options.batch_size, context, stride, options.reference_top_k)
    measured = {place: _measure(place, inputs, settings, options) for place in places}
    report: dict[str, Any] = {
        "settings": {"limit": options.limit, "template": options.template, **dataclasses.asdict(settings)},
        "checkpoint": measured[options.checkpoint].report,
    }
    if options.baseline:
        report["baseline"] = measured[options.baseline].report
        report["comparison"] = compare(measured[options.checkpoint], measured[options.baseline])
    _write(options, report, measured)
    if options.json:
        say(json.dumps(report, indent=1, ensure_ascii=False))
        return
    for title in [name for name in ("checkpoint", "baseline") if name in report]:
        _show(title, report[title])
    if options.baseline:
        _show_comparison(report["comparison"])


if __name__ == "__main__":
    run_tool(main)
