"""What single episodes of the evaluations say: where they fail, how they fail, and which ones training won and lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from reinflow.env import Extra
from reinflow.evaluate import EvalResult
from reinflow.paired import PairError, compare
from reinflow.regions import Region, worst_of
from reinflow_so101.report.charts import Chart, Trace, number

EPISODES_PER_CELL = 16  # on average, so that a cell's share means something
MOST_BINS, FEWEST_BINS = 6, 2
BEFORE, AFTER = "c4", "c0"  # their colours
MAP_NOTE = (
    "Healthy: every cell bright after training; where one stays dark, episodes still fail. Numbers are successes of "
    "episodes."
)


Axes = Mapping[str, Sequence[float]]
"""Fact -> the ends of its bins, from left to right; a second one goes upwards."""

KINDS = ("still failing", "lost", "won", "kept", "fails", "succeeds")


def kind_of(before: bool | None, after: bool) -> str:
    """What became of a seed, by its successes; ``before`` None where one policy alone played it."""
    return {
        (False, False): "still failing", (True, False): "lost", (False, True): "won", (True, True): "kept",
        (None, False): "fails", (None, True): "succeeds",
    }[before, after]  # fmt: skip


def kinds_of(before: EvalResult, after: EvalResult | None = None) -> dict[int, str]:
    """Seed -> what became of it, of one evaluation or of two on the same seeds; {} where their seeds differ."""
    if after is None:
        return {row.seed: kind_of(None, row.success) for row in before.episodes}
    try:
        paired = compare(before.episodes, after.episodes)
    except PairError:
        return {}
    changed = set(paired.lost) | set(paired.won)
    return {row.seed: kind_of(row.success ^ (row.seed in changed), row.success) for row in after.episodes}


def choose(kinds: Mapping[int, str], most: int) -> dict[int, str]:
    """At most so many seeds, failures first, with one of every kind that there is as long as there is room."""
    by_kind = {kind: [seed for seed, its in kinds.items() if its == kind] for kind in KINDS}
    present = [kind for kind in KINDS if by_kind[kind]][:most]
    left = most - len(present)
    chosen: dict[int, str] = {}
    for kind in present:
        extra = min(left, len(by_kind[kind]) - 1)
        left -= extra
        chosen |= dict.fromkeys(by_kind[kind][: 1 + extra], kind)
    return chosen


def label_of(name: str, fact: Extra | None) -> str:
    """A fact on an axis, with its unit."""
    unit = fact.unit if fact else ""
    words = name.replace("_", " ")
    return f"{words}, {unit}" if unit else words


def edges_of(values: Sequence[float], bins: int) -> list[float] | None:
    """Ends of so many equal bins; None where the values do not differ."""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        return None
    return [float(edge) for edge in np.linspace(low, high, bins + 1)]


def place_in(value: float, edges: Sequence[float]) -> int:
    """The bin that a value lies in; values beyond the ends count to the outer bins."""
    inside = int(np.searchsorted(edges, value, side="right")) - 1
    return min(max(inside, 0), len(edges) - 2)


def cells_of(result: EvalResult, axes: Axes) -> dict[tuple[int, ...], Region]:
    """The drawn cells that hold episodes, by their place along each axis."""
    held: dict[tuple[int, ...], list[bool]] = {}
    for row in result.episodes:
        held.setdefault(tuple(place_in(row.facts[name], ends) for name, ends in axes.items()), []).append(row.success)
    return {
        place: Region(
            {name: (ends[at], ends[at + 1]) for (name, ends), at in zip(axes.items(), place, strict=True)},
            sum(successes),
            len(successes),
        )
        for place, successes in held.items()
    }


def success_chart_data(result: EvalResult, axes: Axes) -> Trace:
    """A heat map of success over two facts."""
    cells, edges = cells_of(result, axes), list(axes.values())
    across, up = (len(ends) - 1 for ends in edges)
    table = [[cells.get((i, j)) for i in range(across)] for j in range(up)]
    spans = [[f"{a:.3g} to {b:.3g}" for a, b in pairwise(ends)] for ends in edges]
    return {
        "type": "heatmap", "x": _middles(edges[0]), "y": _middles(edges[1]), "zmin": 0, "zmax": 100,
        "z": [[number(100 * cell.rate) if cell else None for cell in row] for row in table],
        "text": [[_counts(cell) for cell in row] for row in table],
        "texttemplate": "%{text}", "colorscale": "Cividis", "xgap": 2, "ygap": 2,
        "customdata": [[[spans[0][i], spans[1][j]] for i in range(across)] for j in range(up)],
        "hovertemplate": "%{customdata[0]} by %{customdata[1]}<br>%{z:.0f} % (%{text})<extra></extra>",
        "colorbar": {"title": {"text": "%"}, "thickness": 12, "len": 0.9},
    }  # fmt: skip


def _counts(cell: Region | None) -> str:
    return f"{cell.successes}/{cell.episodes}" if cell else ""


def _middles(edges: Sequence[float]) -> list[float | None]:
    return [number((a + b) / 2) for a, b in pairwise(edges)]


def _explained(result: EvalResult, names: Sequence[str]) -> bool:
    return len(names) > 0 and all(name in row.facts for row in result.episodes for name in names)


def drawn_axes(results: Mapping[str, EvalResult]) -> list[Axes]:
    """What success is drawn over: a map of the first two facts of the start, and each further one for itself; [] where
    the evaluations do not tell them. Facts that are the same in every episode are left out."""
    names = next(iter(results.values())).start_facts
    if not all(_explained(result, names) for result in results.values()):
        return []
    pooled = {name: [row.facts[name] for result in results.values() for row in result.episodes] for name in names}
    episodes = min(len(result.episodes) for result in results.values())
    bins = min(max(round(math.sqrt(episodes / EPISODES_PER_CELL)), FEWEST_BINS), MOST_BINS)
    ends = {name: edges for name, values in pooled.items() if (edges := edges_of(values, bins))}
    on_map = names[:2] if len(names) > 1 and set(names[:2]) <= ends.keys() else ()
    groups = [on_map] if on_map else []
    groups += [(name,) for name in names if name in ends and name not in on_map]
    return [{name: ends[name] for name in group} for group in groups]


def worst_drawn(results: Mapping[str, EvalResult], when: str) -> Region | None:
    """The worst of the drawn cells; None without two, or where nothing fails."""
    return worst_of([cell for axes in drawn_axes(results) for cell in cells_of(results[when], axes).values()])


def map_charts(place: int, results: Mapping[str, EvalResult]) -> tuple[list[Chart], str]:
    """Success by where episodes start: a map a result, and a chart for every further fact of the start.

    Args:
        place: of the run, for the charts' keys.
        results: by when, "before" and "after".

    Returns:
        The charts, and what is missing, if anything is.
    """
    first = next(iter(results.values()))
    if not all(_explained(result, first.start_facts) for result in results.values()):
        return [], "the evaluations do not say where their episodes started"
    charts: list[Chart] = []
    drawn = drawn_axes(results)
    for axes in drawn:
        if len(axes) == 2:
            charts += [_map(place, when, result, axes) for when, result in results.items()]
        else:
            charts.append(_by_fact(place, results, axes))
    varied = {name for axes in drawn for name in axes}
    same = [name.replace("_", " ") for name in first.start_facts if name not in varied]
    return charts, f"the same in every episode: {', '.join(same)}" if same else ""


def _map(place: int, when: str, result: EvalResult, axes: Axes) -> Chart:
    across, up = (label_of(name, result.facts.get(name)) for name in axes)
    layout = {
        "xaxis": {"title": {"text": across}, "showgrid": False},
        "yaxis": {"title": {"text": up}, "showgrid": False},
    }
    trace, title = success_chart_data(result, axes), f"Success by start, {when} training"
    return Chart(f"map{place}{when}", title, "% of the episodes", MAP_NOTE, [trace], layout, height=380)


def _by_fact(place: int, results: Mapping[str, EvalResult], axes: Axes) -> Chart:
    """Success in bins of one fact, with its intervals."""
    ((name, edges),) = axes.items()
    data: list[Trace] = []
    for (when, result), shade in zip(results.items(), (BEFORE, AFTER), strict=False):
        held = cells_of(result, axes)
        cells = [held.get((at,)) for at in range(len(edges) - 1)]
        shares = [100 * cell.rate if cell else None for cell in cells]
        ends = [[100 * end for end in cell.interval] if cell else [0, 0] for cell in cells]
        data.append(
            {
                "type": "bar", "name": when, "x": _middles(edges), "y": [number(share) for share in shares],
                "marker": {"color": shade}, "text": [_counts(cell) or "0/0" for cell in cells],
                "textposition": "none",
                "hovertemplate": "%{y:.0f} % (%{text})", "error_y": {
                    "type": "data", "symmetric": False, "color": "ink", "thickness": 1.2, "width": 3,
                    "array": [number(high - (s or 0)) for s, (_, high) in zip(shares, ends, strict=True)],
                    "arrayminus": [number((s or 0) - low) for s, (low, _) in zip(shares, ends, strict=True)],
                },
            }
        )  # fmt: skip
    label = label_of(name, next(iter(results.values())).facts.get(name))
    note = "Healthy: bars of one height after training; the thin bars are 95 % intervals of that bin's episodes."
    layout = {
        "xaxis": {"title": {"text": label}, "tickvals": _middles(edges), "tickformat": ".3~g"},
        "barmode": "group", "hovermode": "x unified",
        "yaxis": {"range": [0, 105]},
    }  # fmt: skip
    title = f"Success by {name.replace('_', ' ')}"
    return Chart(f"by_{name}{place}", title, "% of the episodes", note, data, layout, wide=True, height=260)


@dataclass(frozen=True)
class OutcomeRow:
    """How often episodes ended in one way."""

    name: str
    explanation: str
    counts: tuple[int, ...]  # of each result


def outcome_rows(results: Sequence[EvalResult]) -> list[OutcomeRow]:
    """Every outcome that came about, in the environment's order; [] where the evaluations tell none."""
    counts = [result.outcome_counts() for result in results]
    if any(sum(count.values()) < len(result.episodes) for count, result in zip(counts, results, strict=True)):
        return []
    known = {name: text for result in results for name, text in result.outcomes.items()}
    names = dict.fromkeys([*known, *(name for count in counts for name in count)])
    rows = [OutcomeRow(name, known.get(name, ""), tuple(count.get(name, 0) for count in counts)) for name in names]
    return [row for row in rows if any(row.counts)]


def outcome_chart(place: int, results: Mapping[str, EvalResult]) -> Chart | None:
    """How the episodes ended; None where the evaluations tell no outcomes."""
    rows = outcome_rows(list(results.values()))
    if not rows:
        return None
    names = [row.name.replace("_", " ") for row in rows]
    data: list[Trace] = []
    for index, ((when, result), shade) in enumerate(zip(results.items(), (BEFORE, AFTER), strict=False)):
        n = len(result.episodes)
        data.append(
            {
                "type": "bar", "orientation": "h", "name": when, "y": names, "marker": {"color": shade},
                "x": [number(100 * row.counts[index] / n) for row in rows],
                "text": [str(row.counts[index]) for row in rows], "textposition": "outside", "cliponaxis": False,
                "hovertemplate": f"{when}: %{{text}} of {n} (%{{x:.1f}} %)<extra></extra>",
            }
        )  # fmt: skip
    layout: dict[str, Any] = {
        "barmode": "group", "bargap": 0.25,
        "yaxis": {"autorange": "reversed", "automargin": True},
        "xaxis": {"ticksuffix": " %", "rangemode": "tozero"},
    }  # fmt: skip
    note = (
        "Healthy: the top bar grows and the failures below it shrink, those that come furthest last. Numbers are "
        "episodes; the table explains the names."
    )
    height = 120 + 46 * len(rows)
    return Chart(f"outcomes{place}", "How episodes ended", "% of the episodes", note, data, layout, True, height)
