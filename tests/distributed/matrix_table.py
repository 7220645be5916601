"""Puts what the layout matrix measured into docs/parallelism.md: ``python -m tests.distributed.matrix_table FILE``."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.matrix import LAYOUTS, STAGES, Cell, all_cells

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallelism.md"
START, END = "<!-- matrix -->", "<!-- end of matrix -->"
KINDS = (("fp32", "sgd"), ("fp32", "adamw"), ("bf16", "adamw"))

EXPLANATION = """Each cell: the largest relative deviation from one process over four steps, of losses /
gradient norms / the first step's gradients (of any weight) / all weights at the end. Four layers, 4 true and 4
null experts, top-3, a shared expert, 12 micro-batches a step, clipping active in every step, balance and z-loss
on; half of the layouts have a tied embedding. `A x B` gives each degree ranks of its own, `A B` shares them.
Made by `make parallelism-table`."""

BANDS = """Bands that the tests hold the cells to (losses / norms / gradients / weights): fp32 1e-5 each, but
after AdamW the weights may be twice as far apart as those of one process are when noise of 5e-7 of its norm, by
which layouts' gradients differ, is added to each gradient (AdamW divides by the root of the squared gradient,
so an element of a gradient that is rounding moves its weight like any other). bf16: three times the distance of
one process in bf16 from one process in fp32, since a layout rounds at other places and routes near ties to
other experts."""


def table(rows: dict[Cell, dict[str, Any]], precision: str, optimizer: str) -> list[str]:
    lines = [
        "| layout | " + " | ".join(f"stage {stage}" for stage in STAGES) + " |",
        "|---|" + "---|" * len(STAGES),
    ]
    for layout in LAYOUTS:
        cells = [entry(Cell(layout, stage, precision, optimizer), rows) for stage in STAGES]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return lines


def entry(cell: Cell, rows: dict[Cell, dict[str, Any]]) -> str:
    if cell.refusal is not None:
        return "refused"
    if cell not in rows:
        return "not run"
    found = rows[cell]
    return " / ".join(f"{found[name]:.0e}" for name in ("losses", "norms", "gradients", "weights"))


def document(content: dict[str, Any]) -> str:
    rows = {Cell(row["layout"], row["stage"], row["precision"], row["optimizer"]): row for row in content["cells"]}
    missing = [cell.name for cell in all_cells() if cell.refusal is None and cell not in rows]
    if missing:
        sys.stderr.write(f"warning: {len(missing)} cells were not run, {missing[0]} among them\n")
    parts = [EXPLANATION, BANDS]
    for precision, optimizer in KINDS:
        bands = {name: band for name, band in content["bands"].items() if name.startswith(f"{precision} {optimizer}")}
        largest = {
            name: max(band[name] for band in bands.values()) for name in ("losses", "norms", "gradients", "weights")
        }
        limits = " / ".join(f"{value:.0e}" for value in largest.values())
        title = {"sgd": "SGD", "adamw": "AdamW"}[optimizer]
        parts.append(f"### {precision}, {title} (largest band {limits})")
        parts.append("\n".join(table(rows, precision, optimizer)))
    return "\n\n".join(parts)


def main(path: str) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    made = document(json.loads(Path(path).read_text()))
    DOCUMENT.write_text(f"{before}{START}\n{made}\n{END}{after or chr(10)}")


if __name__ == "__main__":
    main(sys.argv[1])
