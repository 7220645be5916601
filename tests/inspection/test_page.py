"""The page as a document: whole, closed to the outside, and never taking a text for markup."""

import base64
import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from adamoe_dist.inspection import all_figures, analyse, render_page, to_png
from adamoe_dist.inspection.charts import Column, bar_table, heat_map, shade_of
from adamoe_dist.inspection.drawing import Drawing, Line, to_svg
from adamoe_dist.inspection.payload import as_script_data, chosen_experts, payload
from adamoe_dist.inspection.summary import summarise
from adamoe_dist.inspection.tokens_html import text_html, token_html
from tests.inspection.records import PHRASE, routing_of, text_of

HOSTILE = [
    "<script>", "alert(1)", "</script>", "<img src=x onerror=alert(1)>", "&amp;", '"', "'", "<!--", "]]>", "\u2028",
    "</style>", "\x00", "\x1b", "\u202e", "", "\r\n", "\t", "</title>", "{{7*7}}",
]  # fmt: skip
VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """Elements, their attributes and the text of tokens, checking that all that opens is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.content: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "i":
            self.tokens.append("")
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if "i" in self.open:
            self.tokens[-1] += data
        elif self.open and self.open[-1] in ("script", "style", "h1", "title", "li"):
            name = "/".join(self.open[-2:])
            self.content[name] = self.content.get(name, "") + data


def analysis_of(tokens, other=False, **options):
    routing = routing_of(len(tokens), **options)
    return analyse(text_of(tokens, files=2), routing, routing_of(len(tokens), seed=9) if other else None)


def rendered(analysis):
    return render_page(analysis, all_figures(analysis))


@pytest.fixture(scope="module")
def page():
    return rendered(analysis_of(PHRASE * 30, other=True))


def test_nothing_comes_from_elsewhere(page):
    data = next(part for part in re.split(r"<script[^>]*>", page) if part.startswith("{"))
    own = page.replace(data.split("</script>")[0], "{}")
    assert len(own) < len(page) and not re.search(
        r"https?:|//[a-z]|@import|url\(|\bsrc=|\bfetch\(|XMLHttpRequest|\bimport\(|WebSocket", own
    )
    parsed = Page(page)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "action", "style", "xlink:href"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    policy = next(attributes["content"] for tag, attributes in parsed.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_the_page_is_whole(page):
    parsed = Page(page)
    sections = [attributes["id"] for tag, attributes in parsed.elements if tag == "section"]
    assert sections == [
        "summary", "reading", "layers", "classes", "positions", "tokens", "comparison", "experts", "preferences",
        "coactivation", "method",
    ]  # fmt: skip
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [attributes for tag, attributes in parsed.elements if tag == "svg"]
    assert labelled and all(attributes["role"] == "img" and attributes["aria-label"] for attributes in labelled)
    assert len(parsed.tokens) == 30 * len(PHRASE)


def test_a_hostile_text_stays_text():
    tokens = HOSTILE * 20
    analysis = analysis_of(tokens, other=True)
    page = rendered(analysis)
    parsed = Page(page)
    assert len([tag for tag, _ in parsed.elements if tag == "script"]) == 2, "the data and the page's own script"
    assert "img" not in {tag for tag, _ in parsed.elements}
    assert len(parsed.tokens) == len(tokens)
    assert parsed.tokens[:7] == HOSTILE[:7] and parsed.tokens[14] == "\u25ab"
    assert "\x00" not in page and "\x1b" not in page
    assert "\u202e" not in page and parsed.tokens[13] == "<U+202E>", "nothing turns the page's order"
    assert not set("\u202e\x1b") & set("".join(summarise(analysis)))


def test_hostile_names_stay_text():
    analysis = analysis_of(PHRASE)
    object.__setattr__(analysis.routing, "description", "</title><script>alert(1)</script>")
    object.__setattr__(analysis.text, "sources", ("<b>\"'", "</h3><script>"))
    parsed = Page(rendered(analysis))
    assert len([tag for tag, _ in parsed.elements if tag == "script"]) == 2
    assert parsed.content["head/title"] == "Routing of </title><script>alert(1)</script>"


def test_line_breaks_are_signs_and_stay_breaks():
    assert token_html("\n", 3) == "<i class=s3>\u21b5</i>\n"
    assert token_html("a\n\n", 0) == "<i class=s0>a\u21b5\n\u21b5</i>\n"
    assert token_html("\r\n  ", 0) == "<i class=s0>\u21b5\n  </i>"
    assert token_html("", 8) == "<i class=s8>\u25ab</i>"


def test_blocks_add_no_lines_to_the_text():
    analysis = analysis_of(PHRASE * 60)
    html = text_html(analysis.text, analysis.routing)
    assert html.count('<div class="block">') > 3
    visible = re.sub(r"<h3>.*?</h3>", "", html).replace("</div>", "\n")
    visible = unescape(re.sub(r"<[^>]*>", "", visible)).removesuffix("\n")
    assert visible == "".join(PHRASE * 60).replace("\n", "\u21b5\n").removesuffix("\n")


@pytest.mark.parametrize("experts", [5, 300])
def test_the_script_gets_every_number(experts):
    analysis = analysis_of(PHRASE * 3, other=True, experts=experts, top_k=4, num_null=experts)
    routing = analysis.routing
    data = json.loads(as_script_data(payload(analysis)))

    def read(text, is_wide):
        return np.frombuffer(base64.b64decode(text), dtype="<u2" if is_wide else np.uint8)

    loads = read(data["loads"], False).reshape(len(routing.layers), -1)
    numbers, weights = read(data["experts"], data["wide"]["experts"]), read(data["weights"], False)
    assert data["tokens"] == loads.shape[1] == len(analysis.text)
    place = 0
    for index, layer in enumerate(routing.layers):
        for token in range(loads.shape[1]):
            mine = slice(place, place + loads[index, token])
            place += int(loads[index, token])
            assert sorted(numbers[mine]) == np.nonzero(layer.selected_TE[token])[0].tolist()
            kept = layer.weights_TE[token, numbers[mine]]
            assert list(kept) == sorted(kept, reverse=True)
            assert np.abs(weights[mine] / 255 - kept).max(initial=0) <= 0.5 / 255 + 1e-6
    assert place == len(numbers) == len(weights)
    assert read(data["positions"], True).tolist() == analysis.text.positions_T.tolist()
    for grouping in analysis.groupings:
        assert (read(data["classes"][grouping.name], False).astype(int) - 1).tolist() == grouping.classes_T.tolist()


def test_a_long_text_of_a_deep_model_stays_small():
    experts, weights = chosen_experts(routing_of(20000, layers=4, experts=64, top_k=8, num_null=64))
    bytes_of_32_layers = 8 * (len(experts) + len(weights)) + 32 * 20000
    assert bytes_of_32_layers * 4 / 3 < 10e6


def test_bars_and_cells_have_their_numbers_in_proportion():
    columns = [
        Column("x", [1.0, 2.0], ["one", "two"], 2.0),
        Column("y", [-1.0, 0.5], ["-1", "+0.5"], 1.0, is_signed=True),
    ]
    svg = to_svg(bar_table("a <title>", ["first", "second"], columns))
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="[\d.]+" class="(\w+)"', svg)
    assert [(float(width), colour) for _, width, colour in bars] == [
        (75.0, "bar"), (150.0, "bar"), (75.0, "minus"), (37.5, "plus"),
    ]  # fmt: skip
    assert float(bars[2][0]) + 75.0 == float(bars[3][0]), "to the left and to the right of one line"
    assert "a &lt;title&gt;" in svg and ">one</text>" in svg
    assert [shade_of(value, 2.0) for value in (0.0, 1.0, 2.0, 9.0, float("nan"))] == ["s0", "s4", "s8", "s8", None]
    assert [shade_of(value, 2.0, True) for value in (-9.0, -1.0, 0.0, 2.0)] == ["d0", "d2", "d4", "d8"]
    cells = to_svg(heat_map("", ["r"], ["a", "b"], [[1.0, float("nan")]], [["1", ""]], 1.0))
    assert cells.count("<rect") == 1 and 'class="on-s8"' in cells and "<path" not in cells
    cells = to_svg(heat_map("", ["r"], ["a", "b", "c"], [[-2.0, 0.0, 2.0]], [["", "", ""]], 2.0, is_signed=True))
    places = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', cells)]
    (corner,) = re.findall(r'<path d="M[\d.]+ [\d.]+H([\d.]+)V[\d.]+Z" class="on-d8"/>', cells)
    assert float(corner) == places[2] + 43, "in the corner of the one cell above the middle"


def test_png_shows_the_bars():
    drawing = bar_table("loads", ["first", "second"], [Column("x", [0.2, 1.0], ["0.2", "1"], 1.0)])
    image = Image.open(io.BytesIO(to_png(drawing))).convert("RGB")
    bar = tuple(int(part) for part in image.getpixel((2 * (12 + 70), 2 * (12 + 26 + 26 + 22 + 11))))
    pixels = np.asarray(image)
    rows = [(pixels[2 * (38 + 26 + 22 * row + 11)] == bar).all(axis=1).sum() for row in range(2)]
    assert rows[1] == pytest.approx(300, abs=3) and rows[0] == pytest.approx(60, abs=3)


def test_png_shows_marks_and_dashes_as_the_page_does():
    maps = [heat_map("", ["r"], ["a"], [[value]], [[""]], 2.0, is_signed=True) for value in (-2.0, 2.0)]
    below, above = (np.asarray(Image.open(io.BytesIO(to_png(one))).convert("L")).astype(int) for one in maps)
    left, top = 2 * (12 + 19 + 44) - 5, 2 * (38 + 26) + 2
    assert abs(below[top, left] - below[top + 20, left]) < 5 < 50 < abs(above[top, left] - above[top + 20, left])
    plain, dashed = (
        np.asarray(Image.open(io.BytesIO(to_png(Drawing("", 40, 60, [Line(20, 0, 20, 60, "ink", one)]))))).min(axis=2)
        for one in (False, True)
    )
    titled = Image.open(io.BytesIO(to_png(Drawing("a title that is longer than its picture", 20, 20))))
    ends = np.asarray(titled.convert("L"))[: 2 * 38].min(axis=0)
    assert ends[-2 * 12 :].min() > 250 and titled.width > 2 * 200, "the title is not cut off"
    dark = [int((picture[2 * 38 : 2 * 98] < 100).any(axis=1).sum()) for picture in (plain, dashed)]
    assert dark[0] == pytest.approx(120, abs=3) and dark[1] == pytest.approx(60, abs=12)


def test_the_dashed_line_is_spoken_of_where_it_stands(page):
    parts = {part.split('"')[0]: part for part in page.split('<section id="')[1:]}
    assert {name: ("dashed line" in part, "stroke-dasharray" in part) for name, part in parts.items()}[
        "comparison"
    ] == (
        False,
        False,
    )
    assert "dashed line" in parts["classes"] and "stroke-dasharray" in parts["classes"]
    assert "Load by characters (tokens)" in parts["classes"]


def test_numbers_and_nouns_agree():
    analysis = analyse(text_of(["The"]), routing_of(1))
    assert "over 1 token and 3 layers" in summarise(analysis)[0]
    routing = routing_of(1300)
    said = " ".join(summarise(analyse(text_of(PHRASE * 100), routing)))
    assert "each of the 15 experts had one at least" in said and "0 experts" not in said


def test_the_summary_says_nothing_of_few_tokens():
    few = " ".join(summarise(analysis_of(PHRASE * 2)))
    assert "short text" in few and "digits (" not in few and "More experts" not in few and "Layer" not in few
    tokens = PHRASE * 100
    routing = routing_of(len(tokens))
    digits = np.array([token == " 12" for token in tokens])
    for layer in routing.layers:
        layer.selected_TE[digits] = False
    loads = np.stack([layer.selected_TE.sum(axis=1) for layer in routing.layers]).astype(np.uint8)
    object.__setattr__(routing, "loads_LT", loads)
    sentences = summarise(analyse(text_of(tokens), routing))
    assert "Fewer experts than average go to: digits (0.00, 100 tokens)." in sentences
    assert f"{loads.mean():.2f} of 5 true experts" in sentences[0] and "1,300 tokens" in sentences[0]


def test_a_model_without_null_experts_is_said_to_be_one():
    sentences = summarise(analysis_of(PHRASE * 10, num_null=0, top_k=2))
    assert sentences[0].startswith("This model has no null experts: each token uses 2 of 5 experts")
    assert not any("Fewer" in sentence for sentence in sentences)
    Page(rendered(analysis_of(PHRASE * 10, num_null=0, top_k=2)))
