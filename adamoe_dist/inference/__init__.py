"""Using a model: opening it from any directory, generating text, and measuring it on text and on questions."""

from adamoe_dist.inference.choices import NORMALISATIONS, ItemScore, choices_report, score_items
from adamoe_dist.inference.evaluation import Evaluation, Inputs, Settings, compare, evaluate
from adamoe_dist.inference.expert_use import ExpertUse, RouterChoice, count_experts, routers_of, watch_routers
from adamoe_dist.inference.generation import (
    Sample,
    Sampling,
    encode_chat,
    encode_prompt,
    fit_conversation,
    generate,
)
from adamoe_dist.inference.items import QUESTION_TEMPLATE, Item, items_as_lines, read_items, require_unicode
from adamoe_dist.inference.opening import OpenedModel, check_placement, longest_input, open_model
from adamoe_dist.inference.perplexity import check_windows, cut_document, score_documents, text_report

__all__ = [
    "NORMALISATIONS",
    "QUESTION_TEMPLATE",
    "Evaluation",
    "ExpertUse",
    "Inputs",
    "Item",
    "ItemScore",
    "OpenedModel",
    "RouterChoice",
    "Sample",
    "Sampling",
    "Settings",
    "check_placement",
    "check_windows",
    "choices_report",
    "compare",
    "count_experts",
    "cut_document",
    "encode_chat",
    "encode_prompt",
    "evaluate",
    "fit_conversation",
    "generate",
    "items_as_lines",
    "longest_input",
    "open_model",
    "read_items",
    "require_unicode",
    "routers_of",
    "score_documents",
    "score_items",
    "text_report",
    "watch_routers",
]
