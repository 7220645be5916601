"""The report as one page that needs nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from adamoe_dist.inspection.analysis import Analysis
from adamoe_dist.inspection.comparison import Difference
from adamoe_dist.inspection.drawing import Drawing, escaped, palette, shown, to_svg
from adamoe_dist.inspection.payload import as_script_data, payload
from adamoe_dist.inspection.statistics import MINIMUM_COUNT, MINIMUM_REPEATS, Load
from adamoe_dist.inspection.summary import left_out, summarise
from adamoe_dist.inspection.tokens_html import text_html

LISTED = 20


def render_page(analysis: Analysis, figures: dict[str, Drawing]) -> str:
    """Return the report as HTML.

    Args:
        analysis: the numbers.
        figures: from :func:`all_figures`.
    """
    style = colour_rules() + _asset("report.css")
    script = _asset("report.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    sections = [
        _head(analysis),
        _section("summary", "In short", _summary(analysis)),
        _section("reading", "The text, by the experts that each token used", _text(analysis)),
        _section("layers", "By layer", _chart(figures["load_by_layer"])),
        _section("classes", "By kind of token", LOADS + _classes(analysis, figures, "load_by_class")),
        _section("positions", "By position in the window", _positions(analysis, figures)),
        _section("tokens", "Tokens with the fewest and the most experts", _tokens(analysis)),
        _section("experts", "Load of the experts", _chart(figures["expert_load"])),
        _section("preferences", "What experts prefer", _switched(figures, "preferences", PREFERENCES)),
        _section("coactivation", "Experts that go together", _switched(figures, "coactivation", COACTIVATION)),
    ]
    if analysis.comparison is not None:
        sections.insert(7, _section("comparison", "Compared with the other model", _comparison(analysis, figures)))
    sections.append(_section("method", "How this was counted", _method()))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(f'Routing of {analysis.routing.description}')}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(sections)}\n</main>\n"
        f'<script type="application/json" id="data">{as_script_data(payload(analysis))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


TOKENS = f"In brackets the tokens; * fewer than {MINIMUM_COUNT}."
LOADS = f"<p>{TOKENS} The dashed line is the mean of all tokens.</p>"
ABOVE_1 = "A triangle marks the orange cells, above 1, where colours are not seen."
PREFERENCES = (
    "Part of a class among the tokens of an expert, over its part in the text: 2 is twice as often as expected, 0.5 "
    f"half as often. Orange prefers, blue avoids. {ABOVE_1} A dot: too few tokens to tell."
)
COACTIVATION = (
    "How often two experts share a token, over what would be if each chose for itself. With few slots a token, numbers "
    f"somewhat below 1 are what chance gives: an expert takes a slot that the other cannot have. {ABOVE_1}"
)


def colour_rules() -> str:
    """Return the style sheet's colours, for the light scheme, the dark scheme and print."""
    light, dark = (_variables(palette(is_dark)) for is_dark in (False, True))
    rules = [f":root{{{light}}}", f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"]
    for name in palette():
        if name.startswith("on-"):
            rules.append(f"svg .{name}{{fill:var(--{name})}}")
            shade = name.removeprefix("on-")
            rules.append(f"i.{shade},b.{shade}{{background-color:var(--{shade});color:var(--{name})}}")
        else:
            rules.append(f"svg .{name}{{fill:var(--{name})}}svg .line-{name}{{stroke:var(--{name})}}")
    return "\n".join(rules) + "\n"


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def _asset(name: str) -> str:
    return files("adamoe_dist.inspection").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Return the source expression that lets a page use this very content and no other."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii") + "'"


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}\n</section>'


def _chart(figure: Drawing) -> str:
    """Return a picture in a box of its own, which the keyboard can scroll where it is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escaped(figure.title)}">{to_svg(figure)}</div>'


def _head(analysis: Analysis) -> str:
    routing, text = analysis.routing, analysis.text
    partial = left_out(text)
    compared = ""
    if analysis.comparison is not None:
        compared = f"<dt>Other model</dt><dd>{escaped(analysis.comparison.other.description)}</dd>"
    return (
        "<header><h1>Where the experts' work goes</h1>\n<dl>"
        f"<dt>Model</dt><dd>{escaped(routing.description)}</dd>{compared}"
        f"<dt>Experts</dt><dd>{len(routing.layers)} layers of {routing.num_experts} true and {routing.num_null} null "
        f"experts, {routing.top_k} slots a token</dd>"
        f"<dt>Text</dt><dd>{escaped(', '.join(text.sources))}: {len(text):,} tokens, read in windows of "
        f"{text.context:,}{escaped(f'; {partial}' if partial else '')}</dd></dl></header>"
    )


def _summary(analysis: Analysis) -> str:
    return "<ul>" + "".join(f"<li>{escaped(sentence)}</li>" for sentence in summarise(analysis)) + "</ul>"


def _text(analysis: Analysis) -> str:
    layers = "".join(
        f'<option value="{index}">layer {layer.number}</option>' for index, layer in enumerate(analysis.routing.layers)
    )
    difference = ""
    if analysis.comparison is not None:
        difference = (
            '<label>Shades <select id="view"><option value="load">true experts</option>'
            '<option value="difference">this model minus the other</option></select></label>'
        )
    return (
        '<div id="controls" hidden>'
        f'<label>Layer <select id="layer"><option value="-1">mean over layers</option>{layers}</select></label>'
        f'<input id="slider" type="range" min="-1" max="{len(analysis.routing.layers) - 1}" value="-1" '
        f'aria-label="layer, from the mean to the last">{difference}'
        '<label><input id="numbers" type="checkbox"> numbers</label>'
        '<span id="legend"></span>'
        '<div id="detail" role="status"></div></div>'
        "<noscript><p>Without scripts the text shows the mean over layers.</p></noscript>"
        '<div id="text" role="group" aria-label="tokens of the text; arrow keys go from one to the next">'
        f"{text_html(analysis.text, analysis.routing)}</div>"
    )


def _pair(first: str, second: str) -> str:
    return f'<div class="pair scroll" tabindex="0" role="group" aria-label="Tokens">{first}{second}</div>'


def _classes(analysis: Analysis, figures: dict[str, Drawing], prefix: str) -> str:
    parts = []
    for number, grouping in enumerate(analysis.groupings, start=1):
        figure = figures.get(f"{prefix}_{number}")
        if figure is not None:
            parts.append(f"<h3>{escaped(grouping.name)}</h3><p>{escaped(_capital(grouping.rule))}.</p>{_chart(figure)}")
    return "".join(parts)


def _positions(analysis: Analysis, figures: dict[str, Drawing]) -> str:
    note = (
        f"<p>Positions from 0 in windows of {analysis.text.context:,} tokens. Each window is read without what stands "
        "before it.</p>"
    )
    return note + _chart(figures["load_by_position"])


def _tokens(analysis: Analysis) -> str:
    note = f"<p>Tokens that occur {MINIMUM_REPEATS} times or more. \u00b7 is a space, \u21b5 a line break.</p>"
    if not analysis.tokens:
        return note + "<p>There is none in this text.</p>"
    low, high = analysis.tokens[:LISTED], analysis.tokens[: -LISTED - 1 : -1]
    return note + _pair(_token_table("Fewest experts", low), _token_table("Most experts", high))


def _token_table(title: str, loads: Sequence[Load]) -> str:
    rows = "".join(
        f"<tr><th scope=row><code>{escaped(shown(load.label))}</code></th><td>{load.tokens:,}</td>"
        f"<td>{load.mean:.2f}</td><td>{100 * load.all_null_share:.0f} %</td></tr>"
        for load in loads
    )
    head = "<tr><th scope=col>token</th><th scope=col>times</th><th scope=col>experts</th><th scope=col>none</th></tr>"
    return f"<table><caption>{title}</caption><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _switched(figures: dict[str, Drawing], prefix: str, note: str) -> str:
    """Return figures of which the page's script shows one at a time, and which stand in a row without it."""
    chosen = {name: figure for name, figure in figures.items() if name.startswith(prefix)}
    parts = "".join(
        f'<figure data-name="layer {int(name.rsplit("_", 1)[1])}"><figcaption>{escaped(figure.title)}</figcaption>'
        f"{_chart(figure)}</figure>"
        for name, figure in chosen.items()
    )
    return f'<p>{note}</p><div class="switch">{parts}</div>'


def _comparison(analysis: Analysis, figures: dict[str, Drawing]) -> str:
    comparison = analysis.comparison
    assert comparison is not None
    layers = (
        _chart(figures["difference_by_layer"])
        if comparison.layers
        else "<p>The two have experts in other layers, so only means over layers are compared.</p>"
    )
    tables = ""
    if comparison.tokens:
        low, high = comparison.tokens[:LISTED], comparison.tokens[: -LISTED - 1 : -1]
        fewer = _difference_table("Fewer experts than in the other", low)
        tables = "<h3>Tokens</h3>" + _pair(fewer, _difference_table("More experts than in the other", high))
    note = (
        "<p>This model minus the other, on the same tokens: orange uses more, blue fewer. Behind each number both "
        f"loads. {TOKENS}</p>"
    )
    return f"{note}<h3>Layers</h3>{layers}{_classes(analysis, figures, 'difference_by_class')}{tables}"


def _difference_table(title: str, differences: Sequence[Difference]) -> str:
    rows = "".join(
        f"<tr><th scope=row><code>{escaped(shown(one.label))}</code></th><td>{one.tokens:,}</td>"
        f"<td>{one.difference:+.2f}</td><td>{one.first:.2f}</td><td>{one.second:.2f}</td></tr>"
        for one in differences
    )
    names = ("token", "times", "difference", "this", "other")
    head = "<tr>" + "".join(f"<th scope=col>{name}</th>" for name in names) + "</tr>"
    return f"<table><caption>{title}</caption><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _method() -> str:
    parts = (
        "A load is the number of true experts that a token used in a layer; null experts fill the other slots and "
        "cost nothing.",
        f"The sentences above name a class only if it has {MINIMUM_COUNT} tokens or more and differs by 5 % and by "
        "three standard errors, which are those of independent tokens: tokens of one text are not, so read them as "
        "rough.",
        "Files are cut into windows that do not overlap. The token that stands before a file is read and not counted.",
        "The numbers say what the routers did on this text, not whether the experts that were skipped would have "
        "helped.",
    )
    return "<ul>" + "".join(f"<li>{part}</li>" for part in parts) + "</ul>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
