"""Where the experts' work goes: which tokens of a text use many experts, and which are left to null experts."""

from adamoe_dist.inspection.analysis import Analysis, Comparison, analyse
from adamoe_dist.inspection.classes import Grouping, classify
from adamoe_dist.inspection.collect import TextFile, collect_routing, cut_text, read_text_files
from adamoe_dist.inspection.figures import all_figures
from adamoe_dist.inspection.outputs import Outputs
from adamoe_dist.inspection.page import render_page
from adamoe_dist.inspection.png import to_png
from adamoe_dist.inspection.record import FilePart, LayerRoutes, Routing, TokenizedText
from adamoe_dist.inspection.report import Request, inspect_routing, write_report
from adamoe_dist.inspection.summary import left_out, summarise

__all__ = [
    "Analysis",
    "Comparison",
    "FilePart",
    "Grouping",
    "LayerRoutes",
    "Outputs",
    "Request",
    "Routing",
    "TextFile",
    "TokenizedText",
    "all_figures",
    "analyse",
    "classify",
    "collect_routing",
    "cut_text",
    "inspect_routing",
    "left_out",
    "read_text_files",
    "render_page",
    "summarise",
    "to_png",
    "write_report",
]
