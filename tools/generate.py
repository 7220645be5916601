"""Generate text with a model from a checkpoint, a run directory or a Hugging Face directory."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adamoe_dist import platform
from adamoe_dist.console import ToolParser, fail, run_tool, say
from adamoe_dist.errors import UserError

platform.prepare()

from adamoe_dist.inference import (  # noqa: E402
    OpenedModel,
    Sample,
    Sampling,
    encode_chat,
    encode_prompt,
    fit_conversation,
    generate,
    open_model,
    require_unicode,
)

DEFAULTS = Sampling()


def _parser() -> ToolParser:
    parser = ToolParser("Generate text. The same prompt, options and seed give the same text on the same machine.")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, a run directory or a Hugging Face directory"
    )
    _add_prompts(parser)
    _add_sampling(parser)
    _add_output(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="another tokenizer than the checkpoint's")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or an accelerate map as balanced")
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the prompt; an empty one begins a text")
    prompts.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='a file whose whole text is the prompt; of a .jsonl file each line is one, a string or {"prompt": ...}',
    )
    prompts.add_argument("--interactive", action="store_true", help="read prompts line by line until the end of input")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="make a conversation of it by the tokenizer's chat template, or in the plain format of fine-tuning",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system says at the beginning; with --chat")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many tokens; without it 128")
    parser.add_argument("--temperature", type=float, default=DEFAULTS.temperature, metavar="T", help="0: greedy")
    parser.add_argument("--top-k", type=int, default=DEFAULTS.top_k, metavar="K", help="likeliest tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=DEFAULTS.top_p, metavar="P", help="their probability; 1: all")
    parser.add_argument("--repetition-penalty", type=float, default=DEFAULTS.repetition_penalty, metavar="R")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="samples of each prompt")
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed, metavar="S", help="sample i starts from S + i")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show text as it is made",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample instead")
    parser.add_argument("--stats", action="store_true", help="also report which experts the generated tokens use")


def _sampling(options: argparse.Namespace) -> Sampling:
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=tuple(options.stop),
    )
    sampling.check()
    if options.system is not None:
        require_unicode(options.system, "--system")
        if not options.chat:
            raise UserError(f"--system {options.system!r} is part of a conversation; add --chat")
    if options.num_samples < 1:
        raise UserError(f"--num-samples {options.num_samples}: give 1 or more")
    return sampling


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.interactive:
        return []
    if options.prompt is not None:
        require_unicode(options.prompt, "--prompt")
        return [options.prompt]
    path = Path(options.prompt_file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read ({error}); give a file in UTF-8") from error
    if path.suffix != ".jsonl":
        return [text]
    prompts = [_prompt_of(line, f"{path}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise UserError(f"--prompt-file {path} has no prompts; give one a line")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); mend or remove the line") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f'{where} is no prompt; give a string, or {{"prompt": a string}}')
    require_unicode(prompt, where)
    return prompt


def _typed_prompts() -> Iterator[str]:
    """Yield lines of standard input; on a terminal they are asked for."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error}); convert it (iconv -t UTF-8)") from error
        if not line:
            return
        require_unicode(line, "standard input")
        if line.strip():
            yield line.rstrip("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show(sample: Sample, streamed: bool, options: argparse.Namespace) -> None:
    if options.json:
        record = dataclasses.asdict(sample)
        say(json.dumps(record if options.stats else record | {"expert_use": None}, ensure_ascii=False))
        return
    say("" if streamed else sample.text)
    if options.stats:
        say(_stats_line(sample))


def _stats_line(sample: Sample) -> str:
    used = sample.expert_use
    line = f"[{sample.tokens} tokens after {sample.prompt_tokens}, {sample.finish_reason}, seed {sample.seed}"
    if used is None:
        return f"{line}; no router of a known kind in this model]"
    saved = f", {used['expert_flops_saved']:.1%} of the expert FLOPs of top-{used['reference_top_k']} saved"
    loads = " ".join(f"{layer['true_experts_per_token']:.2f}" for layer in used["layers"])
    return (
        f"{line}; {used['true_experts_per_token']:.2f} true experts a token (by layer {loads}), null share "
        f"{used['null_share']:.1%}, without a true expert {used['all_null_share']:.1%}{saved}]"
    )


def _answer(
    opened: OpenedModel, prompt: str, prompt_ids: list[int], sampling: Sampling, options: argparse.Namespace
) -> str:
    """Generate and show the samples of one prompt; return the last one's text."""
    text = ""
    for number in range(options.num_samples):
        if options.num_samples > 1 and not options.json:
            say(f"== sample {number + 1}, seed {sampling.seed + number}")
        streamed = options.stream and not options.json
        on_text: Callable[[str], Any] = _write if streamed else lambda piece: None
        sample = generate(opened, prompt, prompt_ids, sampling, number, on_text, options.stats)
        _show(sample, streamed, options)
        text = sample.text
    return text


def _beginning(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _converse(opened: OpenedModel, sampling: Sampling, options: argparse.Namespace) -> None:
    """Answer line by line; a line that is refused does not end it."""
    conversation = _beginning(options)
    for prompt in _typed_prompts():
        try:
            if not options.chat:
                _answer(opened, prompt, encode_prompt(opened, prompt), sampling, options)
                continue
            asked = [*conversation, {"role": "user", "content": prompt}]
            messages = fit_conversation(opened, asked, sampling)
            if len(messages) < len(asked):
                sys.stderr.write(
                    f"note: the first {len(asked) - len(messages)} messages no longer fit and are left out\n"
                )
            text = _answer(opened, prompt, encode_chat(opened, messages), sampling, options)
            conversation = [*messages, {"role": "assistant", "content": text}]
        except UserError as refusal:
            fail(str(refusal))


def main(argv: list[str]) -> None:
    """Generate as the command line says."""
    options = _parser().parse_args(argv)
    sampling, prompts = _sampling(options), _prompts(options)
    opened = open_model(options.checkpoint, options.dtype, options.device, options.tokenizer)
    if options.chat and not opened.tokenizer.chat_template:
        sys.stderr.write("note: the tokenizer has no chat template; the plain format of docs/finetuning.md is used\n")
    if options.interactive:
        _converse(opened, sampling, options)
    for prompt in prompts:
        messages = [*_beginning(options), {"role": "user", "content": prompt}]
        prompt_ids = encode_chat(opened, messages) if options.chat else encode_prompt(opened, prompt)
        _answer(opened, prompt, prompt_ids, sampling, options)


if __name__ == "__main__":
    run_tool(main)
