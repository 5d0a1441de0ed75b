"""Success by region of the start, on made-up starts of which is known where a policy fails."""

import numpy as np

from reinflow.env import Extra
from reinflow.eval_result import EpisodeRow, EvalResult
from reinflow.regions import LEAST_EPISODES, success_by_region, worst_region

FACTS = {"east": Extra("", "{}", "m"), "north": Extra("", "{}", "m"), "turn": Extra("", "{}", "rad")}


def result_of(n, succeeds, rng=None, **given):
    rng = rng or np.random.default_rng(0)
    starts = [{name: float(rng.uniform(-1, 1)) for name in FACTS} | given for _ in range(n)]
    rows = [EpisodeRow(i, bool(succeeds(s)), 0.0, 1, 0.0, facts=s) for i, s in enumerate(starts)]
    return EvalResult(tuple(rows), 1.0, facts=FACTS, start_facts=tuple(FACTS))


def test_cells_hold_about_as_many_episodes_each_and_every_one_once():
    regions = success_by_region(result_of(500, lambda start: start["east"] > 0))
    cells = [r for r in regions if set(r.bounds) == {"east", "north"}]
    strips = [r for r in regions if set(r.bounds) == {"turn"}]
    assert len(cells) == 25 and len(strips) == 5 and len(regions) == 30
    for group in (cells, strips):
        assert sum(r.episodes for r in group) == 500 and max(r.episodes for r in group) == min(
            r.episodes for r in group
        )
    east = [r for r in cells if r.bounds["east"][0] > 0.05]
    assert east and all(r.rate == 1 for r in east)
    assert all(r.rate == 0 for r in cells if r.bounds["east"][1] < 0)


def test_the_worst_region_is_where_it_fails_and_says_so():
    result = result_of(400, lambda start: not (start["east"] > 0.4 and start["north"] < -0.4))
    worst = worst_region(result)
    assert worst.bounds["east"][0] > 0.3 and worst.bounds["north"][1] < -0.3
    said = worst.describe(FACTS)
    assert said.startswith("east 0.") and " m, north -" in said and f"({worst.successes}/{worst.episodes})" in said
    turned = worst_region(result_of(200, lambda start: start["turn"] < 0.6))
    assert set(turned.bounds) == {"turn"} and turned.bounds["turn"][0] > 0.5


def test_a_few_unlucky_episodes_are_no_region():
    assert success_by_region(result_of(2 * LEAST_EPISODES - 1, lambda _: True)) == []
    assert worst_region(result_of(10, lambda _: False)) is None
    regions = success_by_region(result_of(5 * LEAST_EPISODES, lambda _: True))
    assert {r.episodes for r in regions if "east" in r.bounds} == {25}
    assert all(r.episodes >= LEAST_EPISODES for r in regions)


def test_where_nothing_fails_no_region_is_the_worst():
    assert worst_region(result_of(200, lambda _: True)) is None
    assert len(success_by_region(result_of(200, lambda _: True))) > 1
    fails = result_of(200, lambda start: start["turn"] < 0.9)
    assert worst_region(fails).rate < 1


def test_too_few_episodes_for_a_map_are_cut_into_strips():
    for n, strips in ((2 * LEAST_EPISODES, 2), (4 * LEAST_EPISODES - 1, 3)):
        result = result_of(n, lambda start: start["north"] < 0.5)
        regions = success_by_region(result)
        assert [set(r.bounds) for r in regions] == [{name} for name in FACTS for _ in range(strips)]
        assert set(worst_region(result).bounds) == {"north"}
    assert {len(r.bounds) for r in success_by_region(result_of(4 * LEAST_EPISODES, lambda _: True))} == {1, 2}


def test_what_does_not_vary_is_no_region():
    fixed = result_of(200, lambda _: True, east=0.0, north=0.3)
    assert {name for r in success_by_region(fixed) for name in r.bounds} == {"turn"}
    line = result_of(200, lambda start: start["east"] > 0, north=0.3)
    assert [set(r.bounds) for r in success_by_region(line)] == [{"east"}] * 5 + [{"turn"}] * 5
    assert success_by_region(result_of(200, lambda _: True, east=0.0, north=0.3, turn=0.0)) == []
    untold = EvalResult(tuple(EpisodeRow(i, True, 0.0, 1, 0.0) for i in range(100)), 1.0)
    assert success_by_region(untold) == []


def test_equal_starts_stay_together():
    rng = np.random.default_rng(1)
    rows = [
        EpisodeRow(i, True, 0.0, 1, 0.0, facts={"east": float(rng.integers(2)), "north": float(rng.uniform())})
        for i in range(200)
    ]
    regions = success_by_region(EvalResult(tuple(rows), 1.0, facts=FACTS, start_facts=("east", "north")))
    assert {r.bounds["east"] for r in regions} == {(0.0, 0.0), (1.0, 1.0)}
    assert sum(r.episodes for r in regions) == 200
