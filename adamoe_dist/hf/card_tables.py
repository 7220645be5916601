"""The parts of a model card that are lists and tables: data, settings, measurements.

Axes: C numbers of true experts that a token may use (0 to k), E true experts.
"""

from pathlib import Path
from typing import Any

from adamoe_dist.hf.card_facts import CardFacts

_MOST_LISTED = 16
"""Experts of a layer that are all listed; of more, the busiest and the idlest are."""


def data_section(facts: CardFacts) -> str:
    """Return what it was trained on."""
    lines = []
    for part in facts.sets:
        line = f"- `{Path(part['prefix']).name}`, fingerprint `{part['fingerprint'][:16]}`, share {part['weight']}"
        if size := facts.data_sizes.get(part["fingerprint"]):
            line += f", {size[0]:,} documents, {size[1]:,} tokens"
        lines.append(line)
    seen = facts.state.get("tokens_seen")
    tokenizer = facts.state.get("tokenizer_fingerprint")
    lines.append(f"- tokens seen: {seen:,} in {facts.step} steps" if seen else "- tokens seen: none in this software")
    lines.append(f"- tokenizer: fingerprint `{tokenizer[:16]}`" if tokenizer else "- tokenizer: not recorded")
    heading = "## Data" if facts.sets else "## Data\n\nNo training data is recorded."
    return heading + "\n\n" + "\n".join(lines)


def settings_section(facts: CardFacts) -> str:
    """Return the sizes of the model and, where it was trained here, the settings of the run."""
    rows = _model_rows(facts) | (_training_rows(facts) if facts.step else {})
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _model_rows(facts: CardFacts) -> dict[str, str]:
    model, moe = facts.config.model, facts.config.moe
    return {
        "hidden size, layers, heads": f"{model.hidden_size}, {model.num_layers}, {model.num_attention_heads} "
        f"({model.num_query_groups or model.num_attention_heads} for keys and values)",
        "true experts, null experts, slots": f"{moe.num_experts}, {moe.num_null_experts}, {moe.top_k}",
        "null experts that return the token, a mixture": f"{moe.null_types.identity}, {moe.null_types.constant}",
        "scores, combine weights": f"{moe.router.score_function}, {moe.router.normalize}",
    }


def _training_rows(facts: CardFacts) -> dict[str, str]:
    config = facts.config
    balance, load, train = config.moe.router.balance, config.moe.router.target_load, config.train
    final = "" if balance.final_coefficient is None else f" to {balance.final_coefficient:g}"
    tokens = train.global_batch_size * config.model.sequence_length
    return {
        "balance loss": f"{balance.type}, coefficient {balance.coefficient:g}{final}",
        "target load": "none" if load is None else f"{load:g}",
        "optimizer": _optimizer(facts),
        "learning rate": _schedule(facts),
        "batch": f"{train.global_batch_size} samples, {tokens:,} tokens a step; micro-batch {train.micro_batch_size}",
        "precision": str(facts.layout.get("precision", train.precision)),
        "layout": _layout(facts),
        "seed": str(config.run.seed),
        "versions": _versions(facts),
    }


def _optimizer(facts: CardFacts) -> str:
    optimizer, clipping = facts.config.optimizer, facts.config.train.gradient_clipping
    betas = f", betas {optimizer.beta1:g} and {optimizer.beta2:g}" if optimizer.type == "adamw" else ""
    limit = f"gradient norm up to {clipping:g}" if clipping else "no limit of the gradient norm"
    return f"{optimizer.type}{betas}, weight decay {optimizer.weight_decay:g}, {limit}"


def _schedule(facts: CardFacts) -> str:
    config, schedule = facts.config, facts.config.schedule
    end = "" if schedule.decay == "constant" else f" to {schedule.final_fraction:g} of it at step {config.total_steps}"
    return f"{config.optimizer.learning_rate:g}, {schedule.warmup_steps} steps of warm-up, {schedule.decay}{end}"


def _layout(facts: CardFacts) -> str:
    degrees = [
        f"{name} {facts.layout[name]}" for name in ("tensor", "pipeline", "context", "expert") if name in facts.layout
    ]
    return f"{facts.layout.get('world_size', 1)} ranks, {', '.join(degrees)}, ZeRO stage {facts.config.zero.stage}"


def _versions(facts: CardFacts) -> str:
    known = facts.measured.environment
    versions = {name: known.get(name) for name in ("adamoe_dist", "python")} | known.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "not recorded"


def load_section(facts: CardFacts) -> str:
    """Return losses and loads that the run recorded, or what a text showed before any training."""
    record, validation = facts.measured.record, facts.measured.validation
    if not record and facts.text_load is not None:
        return _text_load(facts.text_load)
    if not record:
        return "## Measured\n\nNot measured: the checkpoint does not lie among the checkpoints of its own run."
    lines = [
        f"At step {record['step']}: training loss {_number(record, 'lm_loss')} nats a token, "
        f"{_number(record, 'true_experts_per_token')} true experts a token, null share "
        f"{_number(record, 'null_share')}, {_number(record, 'all_null_share')} of the tokens with null experts only."
    ]
    if validation:
        lines.append(
            f"Validation loss at step {validation['step']}: {_number(validation, 'validation_loss')} nats a token, "
            f"{_number(validation, 'validation_bits_per_byte')} bits a byte."
        )
    text = "## Measured\n\n" + " ".join(lines) + " All are of the run itself; nothing else was evaluated.\n\n"
    return text + _expert_use(facts.measured.routing, facts.config.moe.top_k)


def _text_load(report: dict[str, Any]) -> str:
    """Return a table of what ``--text`` reported."""
    texts = ", ".join(f"`{text}`" for text in report["texts"])
    lines = [
        "## Measured",
        "",
        f"Measured on {report['tokens']:,} tokens of {texts} before any training; nothing else was evaluated.",
        "",
        "| layer | true experts a token | null share of the slots | tokens with null experts only |",
        "|---|---|---|---|",
    ]
    for one in report["layers"]:
        shares = f"{one['true_experts_per_token']:.3f} | {one['null_share']:.3f} | {one['all_null_share']:.3f}"
        lines.append(f"| {one['layer']} | {shares} |")
    return "\n".join(lines)


def _expert_use(routing: dict[str, Any], top_k: int) -> str:
    """Return a table of what each layer's experts did in one step."""
    if not routing:
        return "Load and use of experts by layer: not measured."
    lines = [
        f"Load and use of experts by layer in step {routing['step']}, over all its tokens. An expert's share is of the "
        "tokens that true experts of the layer got.",
        "",
        "| layer | true experts a token | null share of the slots | tokens with null experts only | "
        "share of each true expert, from the first (%) |",
        "|---|---|---|---|---|",
    ]
    counts = zip(routing["layers"], routing["tokens_by_true_experts"], routing["tokens_by_expert"], strict=True)
    for layer, tokens_C, tokens_E in counts:
        tokens = max(sum(tokens_C), 1)
        load = sum(number * chosen for number, chosen in enumerate(tokens_C)) / tokens
        lines.append(
            f"| {layer} | {load:.3f} | {1 - load / top_k:.3f} | {tokens_C[0] / tokens:.3f} | {_shares(tokens_E)} |"
        )
    return "\n".join(lines)


def _shares(tokens_E: list[int]) -> str:
    """Return each expert's share of a layer's tokens; of many experts the largest and the smallest by number."""
    total = max(sum(tokens_E), 1)
    if len(tokens_E) <= _MOST_LISTED:
        return " ".join(f"{100 * tokens / total:.1f}" for tokens in tokens_E)
    order = sorted(range(len(tokens_E)), key=tokens_E.__getitem__, reverse=True)
    most, least = (
        ", ".join(f"{100 * tokens_E[expert] / total:.1f} (expert {expert})" for expert in some)
        for some in (order[:3], order[-3:])
    )
    idle = sum(not tokens for tokens in tokens_E)
    return (
        f"{100 / len(tokens_E):.1f} at balance; most {most}; least {least}; {idle} of {len(tokens_E)} without a token"
    )


def _number(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return "not measured" if value is None else f"{value:.3f}"
