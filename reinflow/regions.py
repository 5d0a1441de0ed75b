"""Where a policy fails: success by region of the start, from the facts that an environment tells of it.

The first two start facts span a map, which is cut into cells of about as many episodes each; every further one is cut
into strips, and so are the first two where there are too few episodes for a map. Cells that hold too few episodes say
nothing and are not made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reinflow.env import Extra
from reinflow.eval_result import EpisodeRow, EvalResult, wilson_interval

LEAST_EPISODES = 20  # a cell; its interval is some 40 points wide then
MOST_PARTS = 5  # along one fact


@dataclass(frozen=True)
class Region:
    """Episodes that started within the bounds."""

    bounds: Mapping[str, tuple[float, float]]  # fact -> smallest and greatest value in it
    successes: int
    episodes: int

    @property
    def rate(self) -> float:
        """Success rate."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(self.successes, self.episodes)

    def describe(self, facts: Mapping[str, Extra]) -> str:
        """``x 0.21 to 0.24 m, y -0.05 to 0.01 m: success 40.0 % (10/25), 95 % interval 23.4-59.3 %``."""
        units = {name: f" {facts[name].unit}" if name in facts and facts[name].unit else "" for name in self.bounds}
        where = ", ".join(
            f"{name.replace('_', ' ')} {low:.3g} to {high:.3g}{units[name]}"
            for name, (low, high) in self.bounds.items()
        )
        low, high = self.interval
        return (
            f"{where}: success {100 * self.rate:.1f} % ({self.successes}/{self.episodes}), 95 % interval "
            f"{100 * low:.1f}-{100 * high:.1f} %"
        )


def success_by_region(result: EvalResult) -> list[Region]:
    """Cells of the map, row by row, then strips of each start fact that is on none; [] where nothing varies or is
    told."""
    rows = [row for row in result.episodes if all(name in row.facts for name in result.start_facts)]
    names = [name for name in result.start_facts if len({row.facts[name] for row in rows}) > 1]
    on_map = [name for name in result.start_facts[:2] if name in names]
    parts = min(MOST_PARTS, math.isqrt(len(rows) // LEAST_EPISODES)) if len(on_map) == 2 else 0
    regions = _cells(rows, on_map, parts)
    in_strips = [name for name in names if name not in on_map] if regions else names
    for name in in_strips:
        regions += _cells(rows, [name], min(MOST_PARTS, len(rows) // LEAST_EPISODES))
    return regions


def worst_region(result: EvalResult) -> Region | None:
    """`worst_of` the regions of an evaluation."""
    return worst_of(success_by_region(result))


def worst_of(regions: Sequence[Region]) -> Region | None:
    """The region that is surely bad rather than unlucky: the one whose interval ends lowest. None without two regions,
    or where nothing failed in it.

    It is the worst of several and was chosen by what happened in it, so it looks worse than it is.
    """
    worst = min(regions, key=lambda region: region.interval[1]) if len(regions) > 1 else None
    return worst if worst and worst.rate < 1 else None


def _cells(rows: Sequence[EpisodeRow], names: Sequence[str], parts: int) -> list[Region]:
    """The rows cut into ``parts`` along the first fact, each of them along the next; [] for fewer than 2."""
    if parts < 2:
        return []
    cells = [list(rows)]
    for name in names:
        cells = [piece for cell in cells for piece in _cut(cell, name, parts)]
    return [
        Region({name: _range(cell, name) for name in names}, sum(row.success for row in cell), len(cell))
        for cell in cells
        if len(cell) >= LEAST_EPISODES
    ]


def _cut(rows: Sequence[EpisodeRow], name: str, parts: int) -> list[list[EpisodeRow]]:
    """Pieces of about as many rows each, from the smallest value up; equal values stay together."""
    ordered = sorted(rows, key=lambda row: row.facts[name])
    pieces: list[list[EpisodeRow]] = [[] for _ in range(parts)]
    at = 0
    for i, row in enumerate(ordered):
        if i == 0 or row.facts[name] != ordered[i - 1].facts[name]:
            at = i * parts // len(ordered)
        pieces[at].append(row)
    return [piece for piece in pieces if piece]


def _range(rows: Sequence[EpisodeRow], name: str) -> tuple[float, float]:
    values = [row.facts[name] for row in rows]
    return min(values), max(values)
