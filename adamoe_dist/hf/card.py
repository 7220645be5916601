"""The model card: README.md of an exported model, from what its checkpoint and its run say."""

import json

from adamoe_dist import __version__
from adamoe_dist.hf.card_facts import CardFacts
from adamoe_dist.hf.card_tables import data_section, load_section, settings_section
from adamoe_dist.hf.modeling_adamoe import AdaMoEForCausalLM


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md."""
    parts = [_front_matter(facts), f"# {facts.title}", _summary(facts), _use(facts), data_section(facts)]
    parts += [settings_section(facts), load_section(facts), _limits(facts), _citation()]
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
    return (
        f"A language model of {model.num_layers} layers, {len(facts.config.moe_layers)} of them mixtures of experts: "
        f"{null}. {facts.parameters:,} parameters, {facts.dtype}, class `{facts.architecture}`, context "
        f"{model.sequence_length} tokens. {_source(facts)}\n\nLicense: {_license(facts)}."
    )


def _source(facts: CardFacts) -> str:
    if facts.base_model is not None:
        source = f"It was made from {facts.base_model}."
    elif facts.base_family is None:
        return "It was trained from new weights."
    else:
        name = (
            "whose name is not recorded"
            if facts.base_name is None
            else f"that its configuration calls `{facts.base_name}`"
        )
        source = f"It was made from a model of family {facts.base_family} {name}."
    if facts.original_card is not None:
        source += f" The card of that model is [{facts.original_card}]({facts.original_card})."
    return source


def _license(facts: CardFacts) -> str:
    files = ", ".join(f"[{name}]({name})" for name in facts.license_files)
    terms = f"; the terms of the model that it was made from are in {files}" if files else ""
    return f"{facts.license or 'not set'}{terms}"


def _use(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.brings_code else ""
    needs = "transformers >= 5" if facts.architecture == AdaMoEForCausalLM.__name__ else "transformers"
    model = f"model = AutoModelForCausalLM.from_pretrained(directory{trust})"
    if facts.has_tokenizer:
        classes, note = "AutoModelForCausalLM, AutoTokenizer", ""
        lines = [
            f"tokenizer = AutoTokenizer.from_pretrained(directory{trust})",
            model,
            'inputs = tokenizer("Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    else:
        classes, lines, note = "AutoModelForCausalLM", [model], " No tokenizer lies beside the weights."
    code = "\n".join(lines)
    return f"""## How to use it

With torch and {needs}, in the directory of this file or with its name for `"."`:{note}

```python
from transformers import {classes}

directory = "."
{code}
```

{_purpose(facts)} It is meant for research on mixtures of experts; before any other use it needs an evaluation for that
use."""


def _purpose(facts: CardFacts) -> str:
    if not facts.is_fine_tuned:
        return "It continues text." if facts.step else "It does what the model does that it was made from."
    learnt = "the completions" if facts.config.finetune.loss_on == "completions" else "all tokens"
    return f"It was fine-tuned on examples, with loss on {learnt}: it answers prompts of the form that they have."


def _limits(facts: CardFacts) -> str:
    learnt = (
        "What it learnt of following instructions and of refusing harmful ones is what the examples above show."
        if facts.is_fine_tuned
        else "It was not trained here to follow instructions or to refuse harmful ones, unless the data above are of "
        "that kind."
    )
    points = [
        "It repeats what its training text says, errors and prejudices among it, and states falsehoods fluently.",
        learnt,
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
