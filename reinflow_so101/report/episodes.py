"""What single episodes of the evaluations say: where they fail, how they fail, and which ones training won and lost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from reinflow.env import Extra
from reinflow.evaluate import EpisodeRow, EvalResult, wilson_interval
from reinflow_so101.report.charts import Chart, Trace, number

EPISODES_PER_CELL = 16  # on average, so that a cell's share means something
MOST_BINS, FEWEST_BINS = 6, 2
BEFORE, AFTER = "c4", "c0"  # their colours
MAP_NOTE = (
    "Healthy: every cell bright after training; where one stays dark, episodes still fail. Numbers are successes of "
    "episodes."
)


@dataclass(frozen=True)
class Pair:
    """One seed before and after training."""

    before: EpisodeRow
    after: EpisodeRow

    @property
    def kind(self) -> str:
        """What became of it."""
        return {
            (False, False): "still failing", (True, False): "lost", (False, True): "won", (True, True): "kept",
        }[self.before.success, self.after.success]  # fmt: skip


KINDS = ("still failing", "lost", "won", "kept")


def pairs_of(before: EvalResult, after: EvalResult) -> list[Pair]:
    """The seeds of both, in their order."""
    played = {row.seed: row for row in before.episodes}
    return [Pair(played[row.seed], row) for row in after.episodes if row.seed in played]


def choose(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many, failures first, with one of every kind that there is as long as there is room."""
    by_kind = {kind: [pair for pair in pairs if pair.kind == kind] for kind in KINDS}
    kinds = [kind for kind in KINDS if by_kind[kind]][:most]
    left = most - len(kinds)
    chosen: list[Pair] = []
    for kind in kinds:
        extra = min(left, len(by_kind[kind]) - 1)
        left -= extra
        chosen += by_kind[kind][: 1 + extra]
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


def success_chart_data(result: EvalResult, names: tuple[str, str], edges: Sequence[Sequence[float]]) -> Trace:
    """A heat map of success over two facts."""
    across, up = (len(ends) - 1 for ends in edges)
    tries, wins = np.zeros((up, across), int), np.zeros((up, across), int)
    for row in result.episodes:
        cell = place_in(row.facts[names[1]], edges[1]), place_in(row.facts[names[0]], edges[0])
        tries[cell] += 1
        wins[cell] += row.success
    share: list[list[float | None]] = [
        [number(100 * w / t) if t else None for w, t in zip(*rows, strict=True)]
        for rows in zip(wins, tries, strict=True)
    ]
    text = [[f"{w}/{t}" if t else "" for w, t in zip(*rows, strict=True)] for rows in zip(wins, tries, strict=True)]
    spans = [[f"{a:.3g} to {b:.3g}" for a, b in pairwise(ends)] for ends in edges]
    return {
        "type": "heatmap", "x": _middles(edges[0]), "y": _middles(edges[1]), "z": share, "text": text, "zmin": 0,
        "zmax": 100, "texttemplate": "%{text}", "colorscale": "Cividis", "xgap": 2, "ygap": 2,
        "customdata": [[[spans[0][i], spans[1][j]] for i in range(across)] for j in range(up)],
        "hovertemplate": "%{customdata[0]} by %{customdata[1]}<br>%{z:.0f} % (%{text})<extra></extra>",
        "colorbar": {"title": {"text": "%"}, "thickness": 12, "len": 0.9},
    }  # fmt: skip


def _middles(edges: Sequence[float]) -> list[float | None]:
    return [number((a + b) / 2) for a, b in pairwise(edges)]


def _explained(result: EvalResult, names: Sequence[str]) -> bool:
    return len(names) > 0 and all(name in row.facts for row in result.episodes for name in names)


def map_charts(place: int, results: Mapping[str, EvalResult]) -> tuple[list[Chart], str]:
    """Success by where episodes start: a map a result, and a chart for every further fact of the start.

    Args:
        place: of the run, for the charts' keys.
        results: by when, "before" and "after".

    Returns:
        The charts, and what is missing, if anything is.
    """
    first = next(iter(results.values()))
    names = first.start_facts
    if not names or not all(_explained(result, names) for result in results.values()):
        return [], "the evaluations do not say where their episodes started"
    pooled = {name: [row.facts[name] for result in results.values() for row in result.episodes] for name in names}
    episodes = min(len(result.episodes) for result in results.values())
    bins = min(max(round(math.sqrt(episodes / EPISODES_PER_CELL)), FEWEST_BINS), MOST_BINS)
    ends = {name: edges for name, values in pooled.items() if (edges := edges_of(values, bins))}
    charts: list[Chart] = []
    if len(names) > 1 and set(names[:2]) <= ends.keys():
        pair = (names[0], names[1])
        axes = [label_of(name, first.facts.get(name)) for name in pair]
        for when, result in results.items():
            layout = {
                "xaxis": {"title": {"text": axes[0]}, "showgrid": False},
                "yaxis": {"title": {"text": axes[1]}, "showgrid": False},
            }
            trace = success_chart_data(result, pair, [ends[name] for name in pair])
            title = f"Success by start, {when} training"
            charts.append(Chart(f"map{place}{when}", title, "% of the episodes", MAP_NOTE, [trace], layout, height=380))
    rest = [name for name in names if name in ends and not (charts and name in names[:2])]
    charts += [_by_fact(place, name, results, ends[name]) for name in rest]
    same = [name.replace("_", " ") for name in names if name not in ends]
    return charts, f"the same in every episode: {', '.join(same)}" if same else ""


def _by_fact(place: int, name: str, results: Mapping[str, EvalResult], edges: Sequence[float]) -> Chart:
    """Success in bins of one fact, with its intervals."""
    data: list[Trace] = []
    for (when, result), shade in zip(results.items(), (BEFORE, AFTER), strict=False):
        counts = [[0, 0] for _ in edges[1:]]
        for row in result.episodes:
            cell = counts[place_in(row.facts[name], edges)]
            cell[0] += row.success
            cell[1] += 1
        shares = [100 * wins / tries if tries else None for wins, tries in counts]
        ends = [[100 * end for end in wilson_interval(*cell)] if cell[1] else [0, 0] for cell in counts]
        data.append(
            {
                "type": "bar", "name": when, "x": _middles(edges), "y": [number(share) for share in shares],
                "marker": {"color": shade}, "text": [f"{wins}/{tries}" for wins, tries in counts],
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
    counts = [Counter(row.outcome for row in result.episodes) for result in results]
    if not results or any(count[""] for count in counts):
        return []
    known = dict(results[-1].outcomes)
    names = [*known, *(name for count in counts for name in count if name not in known)]
    rows = [
        OutcomeRow(name, known.get(name, ""), tuple(count[name] for count in counts)) for name in dict.fromkeys(names)
    ]
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
