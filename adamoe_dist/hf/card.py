"""The model card: README.md of an exported model, from what its checkpoint and its run say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adamoe_dist import __version__
from adamoe_dist.config import Config

METRICS, ROUTING = "metrics.jsonl", "routing.jsonl"
_MOST_LISTED = 16
"""Experts of a layer that are all listed; of more, the busiest and the idlest are."""


@dataclass(frozen=True)
class Measured:
    """What a run recorded last, up to a checkpoint's step.

    Attributes:
        record: the last line of metrics.jsonl; empty: there is none.
        validation: the last one with a validation loss; empty: there is none.
        routing: the last line of routing.jsonl, counts of each MoE layer; empty: there is none.
    """

    record: dict[str, Any]
    validation: dict[str, Any]
    routing: dict[str, Any]


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
        base_model: name on the hub of the model that it was made from; None: none, or not known.
        base_family: ``model_type`` of an imported model; None: trained from new weights.
        license: its identifier; None: not set.
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
    base_model: str | None = None
    base_family: str | None = None
    license: str | None = None
    original_card: str | None = None


def read_measured(run: Path, step: int) -> Measured:
    """Return what a run directory recorded up to ``step``; nothing where it has no files."""
    records, counts = _lines(run / METRICS, step), _lines(run / ROUTING, step)
    trained = [record for record in records if "lm_loss" in record]
    validated = [record for record in records if "validation_loss" in record]
    return Measured(
        trained[-1] if trained else {},
        validated[-1] if validated else {},
        counts[-1] if counts else {},
    )


def _lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the records of a file up to ``step``; none where there is no file."""
    if not path.is_file():
        return []
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["step"] <= step]


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [_front_matter(facts), f"# {facts.title}", _summary(facts), _use(facts), _data(facts), _settings(facts)]
    parts += [_load(facts), _limits(facts), _citation()]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    values = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": facts.license,
        "base_model": facts.base_model,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    if facts.license is None:
        lines.append("# license: not set; name one before the model is shared")
    return "\n".join(["---", *lines, "tags: [mixture-of-experts, adamoe]", "---"])


def _summary(facts: CardFacts) -> str:
    moe, model = facts.config.moe, facts.config.model
    null = (
        f"{moe.num_null_experts} null experts, which cost nothing, compete with {moe.num_experts} true experts for "
        f"{moe.top_k} slots of each token, so that tokens choose how many true experts they use (AdaMoE)"
        if moe.num_null_experts
        else f"each token uses {moe.top_k} of {moe.num_experts} experts"
    )
    if facts.base_family is None:
        source = "It was trained from new weights."
    else:
        source = f"It was made from {facts.base_model or f'a {facts.base_family} model whose name is not recorded'}."
    if facts.original_card is not None:
        source += f" The card of that model is [{facts.original_card}]({facts.original_card})."
    return (
        f"A language model of {model.num_layers} layers, {len(facts.config.moe_layers)} of them mixtures of experts: "
        f"{null}. {facts.parameters:,} parameters, {facts.dtype}, class `{facts.architecture}`, context "
        f"{model.sequence_length} tokens. {source}\n\nLicense: {facts.license or 'not set'}."
    )


def _use(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.brings_code else ""
    return f"""## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})
model = AutoModelForCausalLM.from_pretrained(DIRECTORY{trust})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

It continues text. It is meant for research on mixtures of experts; before any other use it needs an evaluation for
that use."""


def _data(facts: CardFacts) -> str:
    state = facts.state
    sets = state.get("data", {}).get("datasets", [])
    lines = [
        f"- `{Path(part['prefix']).name}`, fingerprint `{part['fingerprint'][:16]}`, share {part['weight']}"
        for part in sets
    ]
    seen = state.get("tokens_seen")
    tokenizer = state.get("tokenizer_fingerprint")
    lines.append(f"- tokens seen: {seen:,} in {facts.step} steps" if seen else "- tokens seen: none in this software")
    lines.append(f"- tokenizer: fingerprint `{tokenizer[:16]}`" if tokenizer else "- tokenizer: not recorded")
    heading = "## Data" if sets else "## Data\n\nNo training data is recorded."
    return heading + "\n\n" + "\n".join(lines)


def _settings(facts: CardFacts) -> str:
    config = facts.config
    router, balance = config.moe.router, config.moe.router.balance
    rows = {
        "hidden size, layers, heads": f"{config.model.hidden_size}, {config.model.num_layers}, "
        f"{config.model.num_attention_heads} ({config.model.num_query_groups or config.model.num_attention_heads} "
        "for keys and values)",
        "true experts, null experts, slots": f"{config.moe.num_experts}, {config.moe.num_null_experts}, "
        f"{config.moe.top_k}",
        "null experts that return the token, a mixture": f"{config.moe.null_types.identity}, "
        f"{config.moe.null_types.constant}",
        "scores, combine weights": f"{router.score_function}, {router.normalize}",
        "balance loss": f"{balance.type}, coefficient {balance.coefficient:g}"
        + (f" to {balance.final_coefficient:g}" if balance.final_coefficient is not None else ""),
        "target load": "none" if router.target_load is None else f"{router.target_load:g}",
        "learning rate, tokens a step": f"{config.optimizer.learning_rate:g}, "
        f"{config.train.global_batch_size * config.model.sequence_length:,}",
        "seed": str(config.run.seed),
    }
    if not facts.step:
        rows = dict(list(rows.items())[:4])
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _load(facts: CardFacts) -> str:
    record, validation = facts.measured.record, facts.measured.validation
    if not record:
        return "## Measured\n\nNot measured: the checkpoint does not lie in the directory of a run."
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


def _limits(facts: CardFacts) -> str:
    points = [
        "It repeats what its training text says, errors and prejudices among it, and states falsehoods fluently.",
        "It was not trained to follow instructions or to refuse harmful ones, unless the data above are of that kind.",
        f"Texts longer than {facts.config.model.sequence_length} tokens were not seen in training.",
    ]
    factor = facts.config.moe.router.capacity_factor
    if factor is not None:
        points.append(
            f"Training dropped what exceeded an expert's capacity (factor {factor:g}); this class computes all of it."
        )
    if facts.config.moe.num_null_experts:
        points.append("How many experts a token uses depends on the text, and so does the time that it takes.")
    return "## Limits and risks\n\n" + "\n".join(f"- {point}" for point in points)


def _citation() -> str:
    return f"""## How to cite

The method: Zihao Zeng et al., AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models,
arXiv 2406.13233. The software: adamoe_dist, version {__version__}."""
