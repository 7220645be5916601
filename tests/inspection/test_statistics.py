"""Loads, preferences and differences against counts made token by token."""

import math

import numpy as np
import pytest

from adamoe_dist.inspection import LayerRoutes, Routing, analyse, classify
from adamoe_dist.inspection.comparison import differences_by_class, differences_by_layer, differences_by_token
from adamoe_dist.inspection.experts import coactivation_EE, lift_EC, preferences, relative_loads_LE
from adamoe_dist.inspection.statistics import (
    explained_by_token,
    loads_by_class,
    loads_by_layer,
    loads_by_position,
    loads_by_token,
)
from tests.inspection.records import PHRASE, routing_of, slow_load, text_of

TEXT = text_of(PHRASE * 12, context=40)
ROUTING = routing_of(len(TEXT))


def same(load, tokens, routing=ROUTING):
    assert load.tokens == len(tokens)
    for name, value in slow_load(routing, tokens).items():
        assert getattr(load, name) == pytest.approx(value, nan_ok=True), (load.label, name)


def test_loads_by_layer():
    for number, load in enumerate(loads_by_layer(ROUTING)):
        alone = Routing.of("", ROUTING.num_null, ROUTING.top_k, [ROUTING.layers[number]])
        assert load.label == f"layer {2 * number + 1}"
        same(load, list(range(len(TEXT))), alone)
    means = [load.mean for load in loads_by_layer(ROUTING)]
    assert len(set(means)) == 3 and ROUTING.mean_loads_T.mean() == pytest.approx(sum(means) / 3)


def test_loads_by_class_cover_every_token_of_a_grouping():
    groupings = classify(TEXT.texts)
    assert groupings[0].name == "Characters"
    for grouping in groupings:
        for load in loads_by_class(ROUTING, grouping):
            number = grouping.labels.index(load.label)
            same(load, [token for token in range(len(TEXT)) if grouping.classes_T[token] == number])
    assert sum(load.tokens for load in loads_by_class(ROUTING, groupings[0])) == len(TEXT)


def test_loads_by_position():
    loads = loads_by_position(ROUTING, TEXT)
    assert [load.label for load in loads[:2]] == ["0 to 2", "3 to 5"] and loads[-1].label == "39"
    for load in loads:
        first, _, last = load.label.partition(" to ")
        wanted = range(int(first), int(last or first) + 1)
        same(load, [token for token in range(len(TEXT)) if TEXT.positions_T[token] in wanted])
    assert sum(load.tokens for load in loads) == len(TEXT)


def test_loads_by_token_are_sorted_and_need_repeats():
    tokens = [*PHRASE * 9, " once"]
    text, routing = text_of(tokens), routing_of(len(tokens))
    loads = loads_by_token(routing, text, minimum=9)
    assert {load.label for load in loads} == set(PHRASE)
    assert [load.mean for load in loads] == sorted(load.mean for load in loads)
    for load in loads:
        same(load, [place for place, token in enumerate(tokens) if token == load.label], routing)


def test_variance_between_tokens():
    tokens = PHRASE * 40
    text = text_of(tokens)
    by_chance, counted = explained_by_token(routing_of(len(tokens)), text)
    assert counted == len(tokens) and abs(by_chance) < 0.05, "loads that do not depend on the token"
    loads = np.array([PHRASE.index(token) % 3 for token in tokens])
    selected = np.arange(5)[None, :] < loads[:, None]
    of_token = Routing.of("", 4, 3, [LayerRoutes(0, selected, selected.astype(np.float16))])
    assert explained_by_token(of_token, text)[0] == pytest.approx(1.0)
    assert math.isnan(explained_by_token(routing_of(13), text_of(PHRASE))[0])


def test_experts_against_counts_of_each_token():
    grouping = classify(TEXT.texts)[0]
    layer = ROUTING.layers[1]
    lifts, ratios = lift_EC(layer, grouping), coactivation_EE(layer)
    tokens = range(len(TEXT))
    for expert in range(5):
        mine = [token for token in tokens if layer.selected_TE[token, expert]]
        for number in range(len(grouping.labels)):
            part = sum(1 for token in tokens if grouping.classes_T[token] == number) / len(TEXT)
            here = sum(1 for token in mine if grouping.classes_T[token] == number) / len(mine)
            if part * len(mine) >= 5 and len(mine) >= 30:
                assert lifts[expert, number] == pytest.approx(here / part)
            else:
                assert math.isnan(lifts[expert, number])
        for other in range(5):
            together = sum(1 for token in mine if layer.selected_TE[token, other])
            expected = len(mine) * sum(1 for token in tokens if layer.selected_TE[token, other]) / len(TEXT)
            if other == expert:
                assert math.isnan(ratios[expert, other])
            elif expected >= 5:
                assert ratios[expert, other] == pytest.approx(together / expected)
        relative = len(mine) / (layer.selected_TE.sum() / 5)
        assert relative_loads_LE(ROUTING)[1, expert] == pytest.approx(relative)
    assert np.isfinite(lifts).any() and np.isnan(lifts).any()


def test_a_specialised_expert_is_found_and_a_rare_one_is_not():
    tokens = PHRASE * 40
    groupings = classify(tokens)
    selected = np.zeros((len(tokens), 4), dtype=bool)
    selected[:, 0] = [token == " 12" for token in tokens]
    selected[:, 1] = True
    selected[:5, 2] = True
    layer = LayerRoutes(7, selected, selected.astype(np.float16))
    first = preferences(Routing.of("", 2, 3, [layer]), groupings)[0]
    assert (first.layer, first.expert, first.label, first.count) == (7, 0, "digits", 40)
    assert first.lift == pytest.approx(13.0)
    assert np.isnan(lift_EC(layer, groupings[0])[2]).all(), "5 tokens say nothing"
    assert np.isnan(lift_EC(layer, groupings[0])[3]).all(), "and none neither"


def test_differences_are_those_of_the_same_tokens():
    other = routing_of(len(TEXT), top_k=2, seed=3)
    for one, first, second in zip(
        differences_by_layer(ROUTING, other), loads_by_layer(ROUTING), loads_by_layer(other), strict=True
    ):
        assert (one.first, one.second) == pytest.approx((first.mean, second.mean))
        assert one.difference == pytest.approx(first.mean - second.mean)
    grouping = classify(TEXT.texts)[0]
    for one, first, second in zip(
        differences_by_class(ROUTING, other, grouping),
        loads_by_class(ROUTING, grouping),
        loads_by_class(other, grouping),
        strict=True,
    ):
        assert (one.label, one.tokens) == (first.label, first.tokens)
        assert one.difference == pytest.approx(first.mean - second.mean)
    changes = [ROUTING.mean_loads_T[token] - other.mean_loads_T[token] for token in range(len(TEXT))]
    cats = [changes[token] for token in range(len(TEXT)) if TEXT.texts[token] == " cat"]
    found = {one.label: one for one in differences_by_token(ROUTING, other, TEXT)}
    assert found[" cat"].difference == pytest.approx(sum(cats) / 12)
    assert found[" cat"].error == pytest.approx(np.std(cats, ddof=1) / math.sqrt(12))
    elsewhere = Routing.of("", 4, 2, [other.layers[0]])
    assert differences_by_layer(ROUTING, elsewhere) == []


def test_json_has_every_number_and_no_nan():
    report = analyse(TEXT, ROUTING, routing_of(len(TEXT), seed=1)).as_json()
    assert report["overall"]["mean"] == pytest.approx(slow_load(ROUTING, list(range(len(TEXT))))["mean"])
    assert len(report["layers"]) == len(report["experts"]) == 3
    assert report["experts"][0]["coactivation"][0][0] is None
    assert report["comparison"]["overall"]["tokens"] == len(TEXT)
