"""Every layout under every ZeRO stage, precision and optimizer trains the model that one process trains.

Four steps of 12 micro-batches, 3 or more a data-parallel rank; clipping acts in every step; balance and z-losses are
on, experts unevenly loaded; half of the layouts have a tied embedding. :class:`References` explains the bands.
"""

from pathlib import Path

import pytest

from tests.distributed.cases import train
from tests.distributed.matrix import (
    CLIP,
    STEPS,
    Cell,
    Deviation,
    References,
    all_cells,
    deviation,
    within,
    write_results,
)

pytestmark = pytest.mark.distributed

RESULTS: dict[Cell, Deviation] = {}
BANDS: dict[str, Deviation] = {}


@pytest.fixture(scope="module")
def references(ranks_of) -> References:
    return References(ranks_of)


def parameters() -> list:
    return [
        pytest.param(cell, id=cell.name, marks=() if cell.is_quick else pytest.mark.slow)
        for cell in all_cells()
        if cell.refusal is None
    ]


@pytest.mark.parametrize("cell", parameters())
def test_a_cell_trains_as_one_process(ranks_of, references, cell, request):
    single = references.run(cell)
    assert min(single.norms) > CLIP, "clipping must act in every step"
    tokens_of_experts = [counts for _, counts in single.first_micro_batch]
    assert all(max(counts) > 1.2 * sum(counts) / len(counts) for counts in tokens_of_experts), tokens_of_experts
    outcomes = ranks_of(cell.world).run(train, cell.changes(), STEPS, cell.degrees, cell.precision)
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses and outcome.norms == outcomes[0].norms
        assert deviation(outcome, outcomes[0]).weights == 0
    found, band = deviation(outcomes[-1], single), references.band(cell)
    RESULTS[cell] = found
    BANDS[f"{cell.precision} {cell.optimizer} {'tied' if cell.is_tied else 'untied'}"] = band
    print(f"{cell.name}: {found}, {band}")
    if path := request.config.getoption("--matrix-results"):
        write_results(Path(path), BANDS, RESULTS)
    assert not within(found, band)


def test_what_cannot_work_is_refused_with_the_reason():
    from adamoe_dist.config import config_from_dict, resolve
    from adamoe_dist.errors import UserError
    from tests.distributed.cases import BASE, merged

    refused = [cell for cell in all_cells() if cell.refusal is not None]
    assert {(cell.layout, cell.stage) for cell in refused} == {
        ("PP2", 3),
        ("TP2 x PP2", 3),
        ("PP2 x EP2", 3),
        ("PP4", 3),
    }
    for cell in refused:
        tree = merged(merged(BASE, cell.changes()), {"parallel": cell.degrees})
        with pytest.raises(UserError, match=str(cell.refusal)):
            resolve(config_from_dict(tree), cell.world)
