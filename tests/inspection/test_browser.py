"""The page in a real browser: it draws without errors, changes with the layer, and is used by mouse and keyboard."""

import time

import numpy as np
import pytest

from adamoe_dist.inspection import all_figures, analyse, render_page
from adamoe_dist.inspection.drawing import palette
from tests.inspection.browser import Browser, needs_browser
from tests.inspection.records import PHRASE, routing_of, text_of
from tests.inspection.test_page import HOSTILE

pytestmark = needs_browser

TOKENS = PHRASE * 30
RIGHT, DOWN, END, TAB = "\ue014", "\ue015", "\ue010", "\ue004"
CHOOSE = (
    "const box = document.getElementById(arguments[0]); box.value = arguments[1]; box.checked = arguments[1];"
    "box.dispatchEvent(new Event(arguments[0] === 'slider' ? 'input' : 'change'))"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def analysis():
    return analyse(text_of(TOKENS), routing_of(len(TOKENS)), routing_of(len(TOKENS), seed=5))


@pytest.fixture(scope="module")
def file(analysis, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render_page(analysis, all_figures(analysis)), encoding="utf-8")
    return file


@pytest.fixture
def page(browser, file):
    browser.media(prefers_color_scheme="light")
    browser.open(file)
    browser.run("document.getElementById('reading').scrollIntoView()")
    return browser


def shades(browser):
    return browser.run("return Array.from(document.querySelectorAll('#text i'), (token) => token.className)")


def expected(loads_T, low, high, letter="s"):
    steps = np.clip(np.floor((np.asarray(loads_T, dtype=float) - low) / (high - low) * 8 + 0.5), 0, 8).astype(int)
    return [f"{letter}{step}" for step in steps]


def colour(name, is_dark=False):
    code = palette(is_dark)[name]
    return tuple(int(code[start : start + 2], 16) for start in (1, 3, 5))


def seen(picture, wanted):
    return int((picture == np.array(wanted)).all(axis=2).sum())


def test_it_draws_without_errors_and_as_without_scripts(page, file):
    assert page.log() == []
    static = [part.split(">")[0] for part in file.read_text(encoding="utf-8").split("<i class=")[1:]]
    assert shades(page) == static, "the script agrees with what stands in the page"
    picture = page.screenshot()
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_the_layer_changes_the_shades_where_loads_differ(page, analysis):
    routing = analysis.routing
    before = page.screenshot()
    for index in range(3):
        page.run(CHOOSE, "layer", str(index))
        assert shades(page) == expected(routing.loads_LT[index], 0, routing.top_k)
        assert page.run("return document.getElementById('slider').value") == str(index)
    after = page.screenshot()
    text = page.run("const box = document.querySelectorAll('#text i')[0].getBoundingClientRect(); return box.top")
    assert (before != after)[int(text) :].any(axis=2).mean() > 0.01
    for step in (0, 3, 5, 8):
        assert seen(after, colour(f"s{step}")) > 100, step
    page.run(CHOOSE, "slider", "-1")
    assert (page.screenshot() == before).mean() > 0.999
    assert page.log() == []


def test_each_token_has_the_colour_of_its_load(page, analysis):
    page.run(CHOOSE, "layer", "1")
    picture = page.screenshot()
    boxes = page.run(
        "return Array.from(document.querySelectorAll('#text i')).slice(0, 60).map((token) => {"
        "const box = token.getClientRects()[0]; return [box.left, box.top, box.width, box.height]; })"
    )
    checked = 0
    for token, (left, top, width, height) in enumerate(boxes):
        if width < 12 or top + height > picture.shape[0]:
            continue
        step = expected(analysis.routing.loads_LT[1], 0, 3)[token]
        box = picture[int(top) + 2 : int(top + height) - 6, int(left) + 1 : int(left + width) - 2]
        assert seen(box, colour(step)) > 0.3 * box.shape[0] * box.shape[1], (token, step)
        checked += 1
    assert checked > 20


def test_pointing_tells_token_position_experts_and_weights(page, analysis):
    page.run(CHOOSE, "layer", "1")
    token = next(token for token in range(2, 40) if analysis.routing.loads_LT[1, token] == 2 and len(TOKENS[token]) > 2)
    left, top = page.run(
        "const box = document.querySelectorAll('#text i')[arguments[0]].getBoundingClientRect();"
        "return [box.left + box.width / 2, box.top + box.height / 2]",
        token,
    )
    page.point(left, top)
    said = page.run("return document.getElementById('detail').textContent")
    layer = analysis.routing.layers[1]
    first, second = sorted(np.nonzero(layer.selected_TE[token])[0], key=lambda expert: -layer.weights_TE[token, expert])
    assert said.startswith(TOKENS[token]) and f"token {token + 1} of {len(TOKENS)}" in said
    assert f"position {analysis.text.positions_T[token]};" in said
    assert "Layer 3: 2 of 5 true experts" in said
    weights = [round(float(layer.weights_TE[token, expert]), 2) for expert in (first, second)]
    assert f"Expert (weight): {first} ({weights[0]:.2f}), {second} ({weights[1]:.2f})" in said


def test_the_keyboard_reaches_every_token(page):
    page.run("document.querySelector('#text i[tabindex]').focus()")
    number = "return Array.from(document.querySelectorAll('#text i')).indexOf(document.activeElement)"
    assert page.run(number) == 0
    page.press(RIGHT, RIGHT, DOWN)
    assert page.run(number) == 22
    assert "token 23 of" in page.run("return document.getElementById('detail').textContent")
    page.press(END)
    assert page.run(number) == len(TOKENS) - 1
    assert page.run("return document.querySelectorAll('#text [tabindex]').length") == 1, "one stop of the Tab key"
    page.press(TAB)
    assert page.run(number) == -1


def test_differences_and_numbers(page, analysis):
    comparison = analysis.comparison
    page.run(CHOOSE, "view", "difference")
    page.run(CHOOSE, "layer", "2")
    changes = analysis.routing.loads_LT[2].astype(int) - comparison.other.loads_LT[2]
    assert shades(page) == expected(changes, -3, 3, "d")
    page.run(CHOOSE, "numbers", True)
    written = page.run("return Array.from(document.querySelectorAll('#text i'), (token) => token.dataset.load)")
    assert written == [f"{change:+d}" if change > 0 else str(change) for change in changes]
    picture = page.screenshot()
    assert seen(picture, colour("d3")) > 100 and seen(picture, colour("d5")) > 100
    assert page.log() == []


def test_the_dark_scheme_has_its_own_shades(page):
    page.run(CHOOSE, "layer", "0")
    page.media(prefers_color_scheme="dark")
    picture = page.screenshot()
    assert seen(picture, colour("page", True)) > 0.2 * picture[..., 0].size
    assert seen(picture, colour("s3", True)) > 100 and seen(picture, colour("s3")) == 0


def test_it_prints(page):
    """Gradients under every token take a printer minutes; borders do not."""
    started = time.monotonic()
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000 and time.monotonic() - started < 60


def test_lists_and_boxes_are_not_printed(page):
    visible = (
        "return Array.from(document.querySelectorAll('select, input, #legend')).filter((one) => one.offsetParent)"
        ".map((one) => one.id || one.tagName)"
    )
    assert "numbers" in page.run(visible)
    page.run(CHOOSE, "layer", "1")
    page.media("print")
    assert page.run(visible) == ["legend"]
    assert page.run("return document.getElementById('legend').textContent").startswith("layer 3: experts a token")


def test_a_phone_shows_it_in_its_width(page):
    page.phone(390, 844)
    try:
        for view in ("load", "difference"):
            page.run(CHOOSE, "view", view)
            assert page.run("return document.documentElement.scrollWidth") <= 390, view
        page.run("document.querySelectorAll('#text i')[200].scrollIntoView()")
        top = page.run("return document.getElementById('controls').getBoundingClientRect().bottom")
        assert top < 0, "the controls do not stay over the text"
    finally:
        page.window()


def test_the_keyboard_scrolls_wide_pictures(page):
    page.phone(390, 844)
    try:
        page.run("document.querySelector('#preferences figure .scroll').focus()")
        page.press(RIGHT)
        time.sleep(0.5)
        assert page.run("return document.activeElement.scrollLeft") > 0
        names = page.run("return Array.from(document.querySelectorAll('.scroll'), (one) => one.ariaLabel)")
        assert len(names) > 10 and all(names)
    finally:
        page.window()


def test_one_picture_of_a_layer_at_a_time(page):
    visible = "return Array.from(document.querySelectorAll('#preferences figure'), (figure) => !figure.hidden)"
    assert page.run(visible) == [True, False, False]
    page.run(
        "const select = document.querySelector('#preferences select'); select.value = '2';"
        "select.dispatchEvent(new Event('change'))"
    )
    assert page.run(visible) == [False, False, True]


def test_a_hostile_text_does_not_run(browser, tmp_path):
    tokens = [*HOSTILE, "<script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">"] * 10
    analysis = analyse(text_of(tokens), routing_of(len(tokens)))
    (tmp_path / "hostile.html").write_text(render_page(analysis, all_figures(analysis)), encoding="utf-8")
    browser.open(tmp_path / "hostile.html")
    assert browser.log() == []
    assert browser.run("return document.title") == "Routing of a model"
    assert browser.run("return document.querySelectorAll('#text i').length") == len(tokens)
    assert browser.run("return document.querySelectorAll('#text i')[3].textContent") == HOSTILE[3]
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    time.sleep(0.2)
    assert browser.run("return document.title") == "Routing of a model", "the page's policy forbids what slips in"
    assert [entry for entry in browser.log() if "Content Security Policy" in entry["message"]]


def test_20000_tokens_of_32_layers_are_fluent(browser, tmp_path):
    tokens = (PHRASE * 1600)[:20000]
    routing = routing_of(len(tokens), layers=32, experts=16, num_null=16, top_k=4)
    analysis = analyse(text_of(tokens, context=2048), routing)
    file = tmp_path / "long.html"
    file.write_text(render_page(analysis, all_figures(analysis)), encoding="utf-8")
    assert file.stat().st_size < 20e6
    started = time.monotonic()
    browser.open(file)
    opened_s = time.monotonic() - started
    assert browser.run("return document.querySelectorAll('#text i').length") == 20000
    took_ms = browser.run(
        "const start = performance.now(); const box = document.getElementById('layer'); box.value = '31';"
        "box.dispatchEvent(new Event('change')); document.body.offsetHeight; return performance.now() - start"
    )
    assert shades(browser) == expected(routing.loads_LT[31], 0, 4)
    assert browser.log() == []
    # Ten times what an idle machine takes; a page that is laid out token by token takes minutes.
    assert opened_s < 30 and took_ms < 5000, (opened_s, took_ms)
