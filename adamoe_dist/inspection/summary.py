"""What a report's numbers say, in plain words. Nothing is said of what too few tokens show."""

import math
from collections.abc import Iterator, Sequence

from adamoe_dist.inspection.analysis import Analysis, Comparison
from adamoe_dist.inspection.comparison import Difference
from adamoe_dist.inspection.drawing import shown
from adamoe_dist.inspection.experts import Preference
from adamoe_dist.inspection.record import FilePart, TokenizedText
from adamoe_dist.inspection.statistics import MINIMUM_COUNT, Load

ERRORS = 3.0
"""A class is said to differ if it does by so many standard errors, which are those of independent tokens ..."""
PART = 0.05
"""... and by this part of the load of all tokens."""
FEW_TOKENS = 1000
_LISTED = 5


def summarise(analysis: Analysis) -> list[str]:
    """Return the sentences that lead a report."""
    sentences = [*_overall(analysis)]
    if partial := left_out(analysis.text):
        sentences.append(f"{partial[:1].upper()}{partial[1:]}.")
    if analysis.routing.num_null:
        sentences += _classes(analysis)
        sentences += _frequency(analysis)
        sentences += _others(analysis)
        sentences += _tokens(analysis)
        sentences += _positions(analysis.positions)
        sentences += _layers(analysis.layers)
    sentences += _experts(analysis)
    if analysis.comparison is not None:
        sentences += _comparison(analysis, analysis.comparison)
    return sentences


def left_out(text: TokenizedText) -> str:
    """Say which part of the files was read; "" where it was all."""
    whole = [part.source for part in text.parts if part.is_whole]
    cut = [part for part in text.parts if part.read and not part.is_whole]
    unread = [part.source for part in text.parts if not part.read]
    if not cut and not unread:
        return ""
    parts = [f"all of {_names(whole)}"] if whole else []
    parts += [_cut(part) for part in cut]
    parts += [f"not read: {_names(unread)}"] if unread else []
    return f"only part of the text was read: {'; '.join(parts)}"


def _cut(part: FilePart) -> str:
    if part.tokens is None:
        percent = f"{100 * part.bytes_share:{'.0f' if part.bytes_share > 0.1 else '.2g'}}"
        return f"the first {part.read:,} tokens of {part.source} ({percent} % of its bytes)"
    return f"the first {part.read:,} of {part.tokens:,} tokens of {part.source}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def differs(load: Load, overall: Load) -> bool:
    """Tell whether a class may be said to differ from all tokens: enough tokens, far apart in number and in error."""
    distance = abs(load.mean - overall.mean)
    return (
        MINIMUM_COUNT <= load.tokens < overall.tokens
        and distance >= PART * overall.mean
        and distance >= ERRORS * load.error
    )


def _overall(analysis: Analysis) -> Iterator[str]:
    routing, overall = analysis.routing, analysis.overall
    counted = f"{_count(overall.tokens, 'token')} and {_count(len(analysis.layers), 'layer')}"
    if not routing.num_null:
        yield (
            f"This model has no null experts: each token uses {routing.top_k} of {routing.num_experts} experts in "
            f"every layer ({counted})."
        )
    else:
        yield (
            f"A token used {overall.mean:.2f} of {routing.num_experts} true experts a layer on average, over "
            f"{counted}. It could use up to {routing.top_k}: null experts took {_percent(overall.null_share)} of the "
            f"slots, and in {_percent(overall.all_null_share)} of the cases a token used no expert in a layer."
        )
    if overall.tokens < FEW_TOKENS:
        yield f"That is a short text: under {FEW_TOKENS:,} tokens, look at what follows as a hint."


def _classes(analysis: Analysis) -> Iterator[str]:
    overall = analysis.overall
    found = [load for load in analysis.classes[0] if differs(load, overall)]
    low = sorted((load for load in found if load.mean < overall.mean), key=lambda load: load.mean)
    high = sorted((load for load in found if load.mean > overall.mean), key=lambda load: -load.mean)
    if low:
        yield f"Fewer experts than average go to: {_listed(low)}."
    if high:
        yield f"More experts than average go to: {_listed(high)}."
    if not found:
        yield (
            "By characters (words, digits, punctuation, white space) no class with "
            f"{MINIMUM_COUNT} tokens or more differs clearly from the average."
        )


def _frequency(analysis: Analysis) -> Iterator[str]:
    loads = {load.label: load for load in analysis.classes[1]}
    frequent, rare = loads.get("frequent words"), loads.get("rare words")
    if frequent is None or rare is None or min(frequent.tokens, rare.tokens) < MINIMUM_COUNT:
        return
    counts = f"({frequent.tokens:,} and {rare.tokens:,} tokens)"
    gap, error = frequent.mean - rare.mean, math.hypot(frequent.error, rare.error)
    means = f"{frequent.mean:.2f} and {rare.mean:.2f} experts {counts}"
    if abs(gap) < max(ERRORS * error, PART * analysis.overall.mean):
        yield f"Frequent and rare words use about as many: {means}."
    else:
        yield f"Frequent words use {'more' if gap > 0 else 'fewer'} experts than rare ones: {means}."


def _others(analysis: Analysis) -> Iterator[str]:
    """Speak of the pieces of words, and of prose and code, where their classes differ."""
    for grouping, loads in list(zip(analysis.groupings, analysis.classes, strict=True))[2:]:
        enough = [load for load in loads if load.tokens >= MINIMUM_COUNT]
        if any(differs(load, analysis.overall) for load in enough):
            ordered = sorted(enough, key=lambda load: load.mean)
            yield f"{grouping.name}, from the fewest experts to the most: {_listed(ordered)}."


def _tokens(analysis: Analysis) -> Iterator[str]:
    repeated = analysis.tokens
    if len(repeated) >= 2 * _LISTED:
        low, high = repeated[:_LISTED], repeated[: -_LISTED - 1 : -1]
        yield (
            f"Of the {len(repeated)} tokens that occur often enough to be compared, the fewest experts go to "
            f"{_quoted(low)}; the most go to {_quoted(high)}."
        )
    if not math.isnan(analysis.explained):
        part = max(analysis.explained, 0.0)
        yield (
            f"{_percent(part)} of the differences between tokens (variance of the mean over layers, "
            f"{analysis.explained_tokens:,} tokens) lie between different tokens, the rest between the places where "
            f"one token stands: the load follows {_follows(part)}."
        )


def _follows(part: float) -> str:
    if part >= 0.75:
        return "mostly the token itself, not its context"
    return "the token and its context alike" if part >= 0.25 else "mostly the context, not the token itself"


def _positions(loads: Sequence[Load]) -> Iterator[str]:
    if len(loads) < 4 or min(loads[0].tokens, *(load.tokens for load in loads[1:])) < MINIMUM_COUNT:
        return
    first, rest = loads[0], loads[1:]
    tokens = sum(load.tokens for load in rest)
    mean = sum(load.mean * load.tokens for load in rest) / tokens
    if abs(first.mean - mean) >= max(ERRORS * first.error, PART * mean):
        yield (
            f"The first positions of the window ({first.label}) use {'more' if first.mean > mean else 'fewer'} experts "
            f"than the later ones: {first.mean:.2f} and {mean:.2f} ({first.tokens:,} and {tokens:,} tokens)."
        )
    else:
        yield (
            f"The start of the window ({first.label}: {first.mean:.2f}, {first.tokens:,} tokens) is as the rest "
            f"({mean:.2f})."
        )


def _layers(loads: Sequence[Load]) -> Iterator[str]:
    if len(loads) > 1 and loads[0].tokens >= MINIMUM_COUNT:
        low, high = min(loads, key=lambda load: load.mean), max(loads, key=lambda load: load.mean)
        if high.mean - low.mean >= max(PART * high.mean, ERRORS * math.hypot(high.error, low.error)):
            yield (
                f"{high.label.capitalize()} uses most experts ({high.mean:.2f}), {low.label} fewest ({low.mean:.2f}; "
                f"{low.tokens:,} tokens each)."
            )


def _experts(analysis: Analysis) -> Iterator[str]:
    if analysis.overall.tokens < MINIMUM_COUNT:
        return
    relative_LE = analysis.relative_LE
    layer, expert = (int(index) for index in divmod(int(relative_LE.argmax()), relative_LE.shape[1]))
    number = analysis.routing.layers[layer].number
    yield (
        f"The busiest expert (layer {number}, expert {expert}) has {relative_LE[layer, expert]:.1f} times the tokens "
        f"of its layer's mean; {_idle(int((relative_LE == 0).sum()), relative_LE.size)}."
    )
    best: dict[str, Preference] = {}
    for one in analysis.preferences:
        best.setdefault(one.label, one)
    strongest = [one for one in best.values() if one.lift >= 2.0][:3]
    if strongest:
        listed = "; ".join(
            f"expert {one.expert} of layer {one.layer} for {one.label} ({one.lift:.1f} times their part in the text, "
            f"{one.count:,} of its {one.tokens:,} tokens)"
            for one in strongest
        )
        yield f"The most specialised experts: {listed}."


def _comparison(analysis: Analysis, comparison: Comparison) -> Iterator[str]:
    overall = comparison.overall
    yield (
        f"Compared with {comparison.other.description}, this model uses {_signed(overall)} on the same tokens "
        f"({overall.first:.2f} and {overall.second:.2f}, {overall.tokens:,} tokens)."
    )
    enough = [one for one in comparison.classes[0] if one.tokens >= MINIMUM_COUNT and one.tokens < overall.tokens]
    moved = [one for one in enough if abs(one.difference) >= max(ERRORS * one.error, PART * max(one.second, 1e-9))]
    if moved:
        largest = sorted(moved, key=lambda one: -abs(one.difference))[:_LISTED]
        listed = "; ".join(f"{one.label} {_signed(one)} ({one.tokens:,} tokens)" for one in largest)
        yield f"By class the largest changes are: {listed}."


def _signed(one: Difference) -> str:
    if abs(one.difference) < 0.005:
        return "as many experts"
    return f"{abs(one.difference):.2f} {'more' if one.difference > 0 else 'fewer'} experts a token"


def _listed(loads: Sequence[Load]) -> str:
    return "; ".join(f"{load.label} ({load.mean:.2f}, {load.tokens:,} tokens)" for load in loads[:_LISTED])


def _quoted(loads: Sequence[Load]) -> str:
    return ", ".join(f"\u201c{shown(load.label)}\u201d ({load.mean:.2f}, {load.tokens} times)" for load in loads)


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _idle(without: int, experts: int) -> str:
    if not without:
        return f"each of the {experts} experts had one at least"
    return f"{without} of {experts} experts had no token"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"
