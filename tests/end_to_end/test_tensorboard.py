"""What a user sees of a run: TensorBoard's answers over HTTP and its pages in a browser, and the CSV files."""

import csv
import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adamoe_dist.monitoring import QUESTIONS
from tests.end_to_end.conftest import REPOSITORY, metrics_of
from tests.end_to_end.nursery import text_of
from tests.inspection.browser import Browser, needs_browser

pytestmark = pytest.mark.end_to_end

STEPS = 12
SMALL = ["run.deterministic=true", "monitor.log_interval=2", "train.validation_interval=6", "schedule.total_steps=12"]
WATCHED = [
    "run.dir=board/watched",
    "monitor.csv=true",
    "monitor.image_interval=4",
    "monitor.sample_tokens=4",
    "monitor.sample_interval=3",
]
RUNS = {"watched/tensorboard", "plain/tensorboard"}
TEXTS = """
const found = []
const walk = (node) => {
  if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk)
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) found.push(node.textContent.trim())
  node.childNodes.forEach((child) => ["SCRIPT", "STYLE"].includes(child.nodeName) || walk(child))
}
walk(document.body)
return found
"""
PICTURES = """
const found = []
const walk = (node) => {
  if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk)
  if (node.nodeName === "IMG" && node.complete && node.naturalWidth > 100) {
    const box = node.getBoundingClientRect()
    if (box.width > 50) found.push([box.left, box.top, box.width, box.height])
  }
  node.childNodes.forEach(walk)
}
walk(document.body)
return found
"""


@pytest.fixture(scope="module")
def board(workspace: Path, nursery) -> Path:
    """Two runs of the same training: one with all that can be watched, stopped and resumed; one plain and unbroken."""

    def run(name: str, *overrides: str) -> None:
        folder = workspace / f"output_{name}"
        nursery.start(folder, *SMALL, *overrides)
        codes = nursery.codes()
        assert codes == [0, 0], text_of(folder)

    run("first", *WATCHED, "train.steps=6")
    run("second", *WATCHED, f"train.steps={STEPS}", "checkpoint.resume=auto")
    run("plain", "run.dir=board/plain", f"train.steps={STEPS}")
    return workspace / "board"


class Server:
    """TensorBoard on a directory of runs."""

    def __init__(self, directory: Path, log: Path) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory), "--port", "0"]
        with log.open("w") as file:
            self.process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=file, stderr=file)
        self.address = self._wait(lambda: re.search(r"at (http://[^ ]+?)/? ", log.read_text()))[1]
        self._wait(lambda: set(self.get("data/runs")) == RUNS)
        self._wait(lambda: all("loss/lm" in tags for tags in self.tags("scalars").values()))

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/{path}", data, headers), timeout=60) as got:
            content = got.read()
            return json.loads(content) if "json" in got.headers["Content-Type"] else content

    def tags(self, plugin: str) -> dict[str, dict[str, Any]]:
        return self.get(f"data/plugin/{plugin}/tags")

    def _wait(self, condition: Any) -> Any:
        end = time.monotonic() + 120
        while not (answer := condition()):
            assert time.monotonic() < end and self.process.poll() is None, "TensorBoard does not answer"
            time.sleep(0.2)
        return answer


@pytest.fixture(scope="module")
def server(board, tmp_path_factory):
    server = Server(board, tmp_path_factory.mktemp("server") / "log.txt")
    yield server
    server.process.terminate()
    server.process.wait(timeout=30)


def test_what_is_watched_leaves_the_training_as_it_is(board) -> None:
    """Samples, pictures and CSV files: the same numbers, and the same weights, moments and random states at the end."""
    watched, plain = metrics_of(board / "watched"), metrics_of(board / "plain")
    assert [record["step"] for record in watched] == [0, 2, 4, 6, 8, 10, 12]
    assert watched == plain
    last = Path("checkpoints") / f"iter_{STEPS:07d}"
    files = [path.name for path in (board / "plain" / last).iterdir()]
    content = [name for name in files if name.endswith(".distcp") or name in ("common.pt", "state.json")]
    assert len(content) == 4
    for name in content:
        assert (board / "watched" / last / name).read_bytes() == (board / "plain" / last / name).read_bytes(), name


def test_scalars_are_the_metrics(server, board) -> None:
    tags = server.tags("scalars")
    assert set(tags) == RUNS
    records = {record["step"]: record for record in metrics_of(board / "watched", drop=set())}
    for name, tag in {"lm_loss": "loss/lm", "score_entropy": "routing/score_entropy"}.items():
        points = server.get(f"data/plugin/scalars/scalars?tag={tag}&run=watched/tensorboard")
        assert [point[1] for point in points] == [2, 4, 6, 8, 10, 12], "once each, over the resumption"
        assert all(point[2] == pytest.approx(records[point[1]][name], rel=1e-6) for point in points)
    for name in ("rows_same_rank", "rows_other_node", "bytes_same_node", "expert_load_entropy", "score_entropy"):
        assert {f"layers/{name}/00", f"layers/{name}/01"} <= set(tags["plain/tensorboard"]), name


def test_layers_add_up(server, board) -> None:
    records = {record["step"]: record for record in metrics_of(board / "plain")}
    for name in ("rows_same_rank", "rows_same_node", "bytes_same_node"):
        layers = [
            server.get(f"data/plugin/scalars/scalars?tag=layers/{name}/{layer:02d}&run=plain/tensorboard")
            for layer in range(2)
        ]
        for points in zip(*layers, strict=True):
            assert sum(point[2] for point in points) == records[points[0][1]][f"dispatch_{name}"]


def test_histograms_hold_the_exact_counts(server) -> None:
    tags = server.tags("histograms")["watched/tensorboard"]
    of_layers = ["layers/true_experts_of_tokens/00", "layers/true_experts_of_tokens/01"]
    assert set(tags) == {*of_layers, "routing/true_experts_of_tokens"}
    found = {}
    for tag in tags:
        points = server.get(f"data/plugin/histograms/histograms?tag={tag}&run=watched/tensorboard")
        assert [point[1] for point in points] == [2, 4, 6, 8, 12]
        found[tag] = np.zeros(4)
        for left, right, count in points[-1][2]:
            assert right - left == 1
            found[tag][round((left + right) / 2)] = count
    assert (sum(found[tag] for tag in of_layers) == found["routing/true_experts_of_tokens"]).all()
    assert [found[tag].sum() for tag in of_layers] == [16 * 32] * 2
    (*_, (_, _, load)) = server.get(
        "data/plugin/scalars/scalars?tag=layers/true_experts_per_token/01&run=watched/tensorboard"
    )
    assert (found[of_layers[1]] * np.arange(4)).sum() / (16 * 32) == pytest.approx(load)


def test_counts_are_a_line_for_each_set_of_pictures(board) -> None:
    """Also over a resumption, and the same of a run that drew other pictures."""
    watched, plain = (
        [json.loads(line) for line in (board / name / "routing.jsonl").read_text().splitlines()]
        for name in ("watched", "plain")
    )
    assert [line["step"] for line in watched] == [2, 4, 6, 8, 12] and [line["step"] for line in plain] == [2, 12]
    assert watched[-1] == plain[-1]
    records = {record["step"]: record for record in metrics_of(board / "watched")}
    for line in watched:
        assert line["layers"] == [0, 1]
        chosen, rows = np.array(line["tokens_by_true_experts"]), np.array(line["tokens_by_expert"])
        assert chosen.sum(axis=1).tolist() == [16 * 32] * 2
        assert (chosen @ np.arange(4)).tolist() == rows.sum(axis=1).tolist()
        assert rows.sum() / (2 * 16 * 32) == pytest.approx(records[line["step"]]["true_experts_per_token"])


def test_heat_maps_are_pictures(server) -> None:
    tags = server.tags("images")["watched/tensorboard"]
    assert set(tags) == {"heat_map/expert_load", "heat_map/true_experts"}
    for tag in tags:
        images = server.get(f"data/plugin/images/images?tag={tag}&run=watched/tensorboard&sample=0")
        assert [image["step"] for image in images] == [2, 4, 6, 8, 12]
        picture = Image.open(io.BytesIO(server.get(f"data/plugin/images/individualImage?{images[-1]['query']}")))
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 8


def test_samples_are_texts(server) -> None:
    assert server.tags("text") == {"watched/tensorboard": ["sample/text_summary"]}
    texts = server.get("data/plugin/text/text?tag=sample/text_summary&run=watched/tensorboard")
    assert [text["step"] for text in texts] == [3, 6, 9, 12]
    assert all("def" in text["text"] and "<pre>" in text["text"] for text in texts)


def test_hyperparameters_tell_the_runs_apart(server) -> None:
    asked = {"experimentName": "", "includeMetrics": True}
    experiment = server.get("data/plugin/hparams/experiment", asked)
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"moe.num_experts", "moe.router.normalize", "optimizer.learning_rate", "zero.stage"} <= names
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    asked = {"experimentName": "", "colParams": columns, "allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10}
    groups = server.get("data/plugin/hparams/session_groups", asked)["sessionGroups"]
    assert {group["sessions"][0]["name"] for group in groups} == RUNS
    for group in groups:
        assert group["hparams"]["moe.top_k"] == 3 and group["hparams"]["moe.router.normalize"] == "true_experts"
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert values["loss/validation"] > 1 and values["speed/tokens_per_second"] > 0


def test_the_first_page_asks_four_questions_and_its_charts_have_data(server) -> None:
    page = server.get("data/plugin/custom_scalars/layout")
    assert [category["title"] for category in page["category"]] == list(QUESTIONS)
    for category in page["category"]:
        filled = 0
        for chart in category["chart"]:
            for tag in chart["multiline"]["tag"]:
                query = urllib.parse.urlencode({"tag": tag, "run": "plain/tensorboard"})
                answer = server.get(f"data/plugin/custom_scalars/scalars?{query}")
                assert answer["regex_valid"]
                filled += bool(answer["tag_to_events"])
        assert filled >= 3, category["title"]


def test_csv_goes_on_without_double_lines(board) -> None:
    records = {record["step"]: record for record in metrics_of(board / "watched", drop=set())}
    for tag, name in (("loss_lm", "lm_loss"), ("dispatch_bytes_same_node", "dispatch_bytes_same_node")):
        head, *lines = list(csv.reader((board / "watched" / "csv" / f"{tag}.csv").open()))
        assert head[0] == "step" and [int(step) for step, _ in lines] == [2, 4, 6, 8, 10, 12]
        assert [float(value) for _, value in lines] == [records[int(step)][name] for step, _ in lines]
    assert not (board / "plain" / "csv").exists()


def test_every_tag_that_is_written_is_explained(server) -> None:
    """Those of docs/monitoring.md that this run has not are such of other hardware, precisions and options."""
    explained = set(re.findall(r"^\| `([^`.]+)` \|", (REPOSITORY / "docs" / "monitoring.md").read_text(), re.MULTILINE))
    plugins = ("scalars", "images", "histograms", "text")
    written = {tag for plugin in plugins for tag in server.tags(plugin)["watched/tensorboard"]}
    tags = {re.sub(r"/\d\d$", "/NN", tag.removesuffix("/text_summary")) for tag in written}
    assert tags <= explained and len(tags) >= 40


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def seen(browser: Browser, script: str, enough: Any) -> list[Any]:
    end = time.monotonic() + 90
    while not enough(found := browser.run(script)):
        assert time.monotonic() < end, found
        time.sleep(0.5)
    return list(found)


@needs_browser
def test_the_first_page_in_a_browser(server, browser) -> None:
    browser.visit(f"{server.address}/#custom_scalars")
    texts = seen(browser, TEXTS, lambda texts: set(QUESTIONS) <= set(texts))
    assert [text for text in texts if text in QUESTIONS] == list(QUESTIONS)
    assert set(QUESTIONS["Is it learning?"]) <= set(texts)

    def lines() -> int:
        """Coloured picture elements right of the list of runs and below the page's head."""
        part = browser.screenshot()[120:, 320:].astype(int)
        return int((part.max(axis=2) - part.min(axis=2) > 100).sum())

    end = time.monotonic() + 60
    while lines() < 1000:
        assert time.monotonic() < end, "no lines are drawn"
        time.sleep(0.5)


@needs_browser
def test_the_heat_maps_in_a_browser(server, browser) -> None:
    browser.visit(f"{server.address}/#images")
    boxes = seen(browser, PICTURES, lambda boxes: len(boxes) >= 2)
    picture = browser.screenshot()
    left, top, width, height = (round(number) for number in boxes[0])
    part = picture[max(top, 0) : top + height, left : left + width].reshape(-1, 3)
    assert len(np.unique(part, axis=0)) > 8, "the map's shades"
