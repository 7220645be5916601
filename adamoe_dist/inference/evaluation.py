"""Everything that is measured of one model, and how two models differ on the same inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adamoe_dist.console import progress
from adamoe_dist.inference.choices import NORMALISATIONS, ItemScore, choices_report, score_items
from adamoe_dist.inference.expert_use import count_experts
from adamoe_dist.inference.intervals import paired_accuracy_report, paired_bits_report
from adamoe_dist.inference.items import Item
from adamoe_dist.inference.opening import OpenedModel
from adamoe_dist.inference.perplexity import CutDocument, cut_document, score_documents, text_report


@dataclass(frozen=True)
class Inputs:
    """What models are measured on, by the name of the file.

    Attributes:
        tasks: questions.
        texts: documents, each its text and where it came from.
    """

    tasks: dict[str, list[Item]] = field(default_factory=dict)
    texts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    Attributes:
        batch_size: sequences at a time.
        context: positions that the model reads at once, of text.
        stride: positions that each window of text scores.
        reference_top_k: see :class:`OpenedModel`; None: the model's own.
    """

    batch_size: int
    context: int
    stride: int
    reference_top_k: int | None = None


@dataclass(frozen=True)
class TextScore:
    """Documents and minus the log-likelihood of each, in nats."""

    documents: list[CutDocument]
    nats: list[float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        report: all of it as plain values.
        tasks: the score of each item, by file.
        texts: the score of each document, by file.
    """

    report: dict[str, Any]
    tasks: dict[str, list[ItemScore]]
    texts: dict[str, TextScore]


def evaluate(opened: OpenedModel, inputs: Inputs, settings: Settings) -> Evaluation:
    """Measure a model on questions and on text, with what its routers do on exactly these tokens."""
    tasks: dict[str, list[ItemScore]] = {}
    texts: dict[str, TextScore] = {}
    report: dict[str, Any] = {"model": opened.description, "tasks": {}, "text": {}}
    for name, items in inputs.tasks.items():
        tasks[name], used = _score_task(opened, name, items, settings)
        report["tasks"][name] = choices_report(tasks[name]) | {"expert_use": used}
    for name, documents in inputs.texts.items():
        texts[name], used = _score_text(opened, name, documents, settings)
        windows = {"context": settings.context, "stride": settings.stride}
        report["text"][name] = text_report(texts[name].documents, texts[name].nats) | windows | {"expert_use": used}
    return Evaluation(report, tasks, texts)


def compare(here: Evaluation, baseline: Evaluation) -> dict[str, Any]:
    """Return paired differences of a model to a baseline that was measured on the same inputs."""
    tasks = {
        name: {
            "accuracy": {kind: _paired_accuracy(scores, baseline.tasks[name], kind) for kind in NORMALISATIONS},
            **_load_difference(here.report["tasks"][name], baseline.report["tasks"][name]),
        }
        for name, scores in here.tasks.items()
    }
    text = {
        name: {
            "bits_per_byte": paired_bits_report(
                score.nats, baseline.texts[name].nats, [one.text_bytes for one in score.documents]
            ),
            **_load_difference(here.report["text"][name], baseline.report["text"][name]),
        }
        for name, score in here.texts.items()
    }
    return {"tasks": tasks, "text": text}


def _score_task(
    opened: OpenedModel, name: str, items: list[Item], settings: Settings
) -> tuple[list[ItemScore], dict[str, Any] | None]:
    choices = sum(len(item.choices) for item in items)
    with count_experts(opened.model) as use, progress(choices, "choice", name) as bar:
        scores = score_items(opened, items, settings.batch_size, use, bar.update)
    return scores, use.report(settings.reference_top_k or opened.reference_top_k)


def _score_text(
    opened: OpenedModel, name: str, documents: list[tuple[str, str]], settings: Settings
) -> tuple[TextScore, dict[str, Any] | None]:
    cut = [cut_document(opened, text, source, settings.context, settings.stride) for text, source in documents]
    windows = sum(len(document.windows) for document in cut)
    with count_experts(opened.model) as use, progress(windows, "window", name) as bar:
        nats = score_documents(opened, cut, settings.batch_size, use, bar.update)
    return TextScore(cut, nats), use.report(settings.reference_top_k or opened.reference_top_k)


def _paired_accuracy(scores: Sequence[ItemScore], baseline: Sequence[ItemScore], kind: str) -> dict[str, Any]:
    return paired_accuracy_report(
        [score.is_right(kind) for score in scores], [score.is_right(kind) for score in baseline]
    )


def _load_difference(here: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Return the difference of the loads where both models have experts."""
    if here["expert_use"] is None or baseline["expert_use"] is None:
        return {}
    name = "true_experts_per_token"
    return {name: here["expert_use"][name] - baseline["expert_use"][name]}
