"""Error rates and savings of the sequential comparison: by simulation of whole comparisons, and by Brownian motion."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from reinflow.paired import episodes_needed, tango_interval
from reinflow.sequential import (
    A_BETTER,
    B_BETTER,
    DRIFT,
    GO_ON,
    LONGEST,
    LOOK_EVERY,
    NO_DIFFERENCE,
    REJECT,
    REJECT_POWER,
    SEQUENTIAL_ALPHA,
    SEQUENTIAL_POWER,
    Monitor,
    Sequential,
)

SIMS, BATCH, SIZE = 2_000, 32, 0.03


def simulate(discordant, true, seed=0, size=SIZE):
    """Verdicts and pairs played (sims,) of comparisons whose true difference is ``true``."""
    rng, test = np.random.default_rng(seed), Sequential(size)
    won, lost, n = np.zeros(SIMS, int), np.zeros(SIMS, int), 0
    verdicts, played, looked = np.zeros(SIMS, int), np.zeros(SIMS, int), np.zeros(SIMS)
    share = (discordant + true) / 2
    while (open_ := verdicts == GO_ON).any():
        new = rng.multinomial(BATCH, [share, discordant - share, 1 - discordant], size=SIMS)
        won, lost, n = won + new[:, 0], lost + new[:, 1], n + BATCH
        t = test.information(n, won, lost)
        look = open_ & (t >= np.minimum(looked + LOOK_EVERY, 1.0))
        looked = np.where(look, t, looked)
        verdicts = np.where(look, test.verdict(t, won, lost), verdicts)
        played = np.where(open_, n, played)
    return verdicts, played


def fixed_number(discordant, difference=SIZE, power=SEQUENTIAL_POWER):
    """Pairs after which the exact McNemar test finds the difference with that power, its power summed exactly."""

    def found(n):
        m = np.arange(n + 1)
        weights = binom.pmf(m, n, discordant)
        m, weights = m[weights > 1e-12], weights[weights > 1e-12]
        least = binom.isf(SEQUENTIAL_ALPHA / 2, m, 0.5) + 1  # won pairs of m that are significant
        p = (discordant + difference) / 2 / discordant
        return weights @ (binom.sf(least - 1, m, p) + binom.cdf(m - least, m, p))

    low, high = 1, 2 * math.ceil(episodes_needed(difference, discordant, power))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high


@pytest.mark.parametrize(("discordant", "power", "share"), [(0.1, 0.89, 0.66), (0.2, 0.885, 0.62), (0.4, 0.885, 0.63)])
def test_error_rates_and_savings_of_whole_comparisons(discordant, power, share):
    """Between equals at most 5 % alarms; a true difference is found; both take some .61 to .66 of the fixed number."""
    same, length_same = simulate(discordant, 0.0)
    apart, length_apart = simulate(discordant, SIZE, seed=1)
    fixed = fixed_number(discordant)
    assert np.isin(same, (A_BETTER, B_BETTER)).sum() <= SEQUENTIAL_ALPHA * SIMS
    assert np.mean(apart == B_BETTER) >= power and not (apart == A_BETTER).any()
    assert length_same.mean() <= share * fixed and length_apart.mean() <= share * fixed
    assert max(length_same.max(), length_apart.max()) <= 1.6 * fixed
    assert np.mean(length_same > fixed) <= 0.12


@pytest.mark.parametrize(("discordant", "share"), [(0.03, 1.12), (0.05, 0.77)])
def test_where_pairs_seldom_differ_the_power_holds_and_little_is_saved(discordant, share):
    """Even where one side wins every discordant pair (.03)."""
    same, length_same = simulate(discordant, 0.0)
    apart, length_apart = simulate(discordant, SIZE, seed=1)
    assert np.isin(same, (A_BETTER, B_BETTER)).mean() <= 0.04
    assert np.mean(apart == B_BETTER) >= 0.89 and not (apart == A_BETTER).any()
    assert max(length_same.mean(), length_apart.mean()) <= share * fixed_number(discordant)


def test_a_handful_of_equal_seeds_rules_nothing_out():
    """20 points: after 14 seeds without a difference the interval still goes beyond them."""
    for n in (1, 7, 14):
        assert Monitor(Sequential(0.2)).look(n, 0, 0) == GO_ON
    assert Monitor(Sequential(0.2)).look(21, 0, 0) == NO_DIFFERENCE and tango_interval(0, 0, 21)[1] < 0.2


def test_print_the_table():
    """What it costs by true difference; `pytest tests/reinflow/test_sequential.py -s` shows it."""
    print("\ndiscordant | fixed | true, points | A, B, neither of 2,000 | mean of fixed | longest | over fixed")
    for discordant in (0.03, 0.05, 0.1, 0.2, 0.4):
        fixed, means = fixed_number(discordant), []
        for true in (0.0, SIZE / 2, SIZE, 2 * SIZE):
            if true <= discordant:
                verdicts, played = simulate(discordant, true, seed=int(true > 0))
                means.append(played.mean())
                counts = ", ".join(str((verdicts == end).sum()) for end in (A_BETTER, B_BETTER, NO_DIFFERENCE))
                print(f"{100 * discordant:.0f} % | {fixed:,} | {100 * true:.3g} | {counts} | "
                      f"{played.mean():,.0f} ({played.mean() / fixed:.0%}) | {played.max():,} | "
                      f"{np.mean(played > fixed):.1%}")  # fmt: skip
        if discordant > SIZE:
            assert max(means) == means[1] < 0.92 * fixed  # the hardest truth lies between none and the size asked for


@pytest.mark.parametrize(("size", "discordant"), [(0.01, 0.01), (0.01, 0.05), (0.1, 0.1), (0.1, 0.2), (0.2, 0.4)])
def test_other_sizes_hold_the_error_rates_too(size, discordant):
    same, _ = simulate(discordant, 0.0, size=size)
    apart, _ = simulate(discordant, size, seed=1, size=size)
    assert np.isin(same, (A_BETTER, B_BETTER)).sum() <= SEQUENTIAL_ALPHA * SIMS and np.mean(apart == B_BETTER) >= 0.88


def test_a_large_difference_is_seen_soon():
    verdicts, played = simulate(0.2, 2 * SIZE)
    assert np.mean(verdicts == B_BETTER) > 0.99 and played.mean() < 0.3 * fixed_number(0.2)


@pytest.mark.parametrize(("drift", "shown"), [(0.0, SEQUENTIAL_ALPHA), (DRIFT, SEQUENTIAL_POWER)])
def test_the_boundaries_hold_their_error_rates_for_brownian_motion(drift, shown):
    """What the constants were solved for, by paths instead of integration."""
    t = np.arange(1, round(1 / LOOK_EVERY) + 1) * LOOK_EVERY
    rng = np.random.default_rng(2)
    score = np.cumsum(rng.normal(drift * LOOK_EVERY, math.sqrt(LOOK_EVERY), (30_000, len(t))), axis=1)
    pairs = 10**12  # discordant ones: won - lost is the score's S / sqrt(t) * sqrt(pairs)
    half = score / np.sqrt(t) * math.sqrt(pairs) / 2
    verdicts = Sequential(SIZE).verdict(t, pairs / 2 + half, pairs / 2 - half)
    first = (verdicts != GO_ON).argmax(axis=1)
    ends = np.take_along_axis(verdicts, first[:, None], axis=1)[:, 0]
    assert (ends != GO_ON).all()
    assert np.isin(ends, (A_BETTER, B_BETTER)).mean() == pytest.approx(shown, abs=0.006)


def test_one_comparison_is_looked_at_as_many_are():
    rng, monitor, test = np.random.default_rng(3), Monitor(Sequential(SIZE)), Sequential(SIZE)
    won = lost = n = 0
    seen = []
    while not seen or seen[-1] == GO_ON:
        new = rng.multinomial(64, [0.11, 0.05, 0.84])
        won, lost, n = won + int(new[0]), lost + int(new[1]), n + 64
        seen.append(monitor.look(n, won, lost))
    assert seen[-1] == B_BETTER == test.verdict(test.information(n, won, lost), won, lost)
    assert won - lost >= REJECT * test.information(n, won, lost) ** (REJECT_POWER - 0.5) * math.sqrt(won + lost)
    assert test.most_episodes(0.1) == pytest.approx(LONGEST * episodes_needed(SIZE, 0.1, SEQUENTIAL_POWER), rel=0.01)
    assert Monitor(test).look(2_000, 0, 0) == NO_DIFFERENCE  # equal policies never differ
    assert Monitor(test).look(10, 10, 0) == GO_ON
