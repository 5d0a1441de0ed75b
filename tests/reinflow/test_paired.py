"""Paired comparisons: counts, the exact test and the score interval against other ways to them, what N can show."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinflow.eval_result import EpisodeRow, EvalResult
from reinflow.evaluate import write_eval_info
from reinflow.paired import (
    PairError,
    change_since,
    compare,
    compare_returns,
    episodes_needed,
    say_p,
    smallest_difference,
    tango_interval,
)


def rows_of(successes, first_seed=100, returns=None):
    returns = returns or [float(success) for success in successes]
    return [EpisodeRow(first_seed + i, bool(s), r, 10, 1.0) for i, (s, r) in enumerate(zip(successes, returns))]  # noqa: B905


def test_counts_difference_and_who_won_which_seed():
    paired = compare(rows_of([1, 1, 1, 0, 0, 0, 0]), list(reversed(rows_of([1, 0, 1, 1, 1, 1, 0]))))
    assert (paired.both, paired.only_a, paired.only_b, paired.neither, paired.episodes) == (2, 1, 3, 1, 7)
    assert paired.lost == (101,) and paired.won == (103, 104, 105)
    assert paired.difference == pytest.approx(2 / 7) and paired.discordant == pytest.approx(4 / 7)
    assert paired.p_value == pytest.approx(2 * (1 + 4) / 16)  # of four fair coins, one head or none
    said = paired.summary("old", "new")
    assert said.startswith("new against old on the same 7 seeds: won 3, lost 1, difference +28.6 points, 95 % interval")
    assert said.endswith("p = .6250 (McNemar, exact)")


def test_a_policy_against_itself_shows_nothing():
    paired = compare(rows_of([1, 0, 1]), rows_of([1, 0, 1]))
    assert paired.difference == 0 and paired.p_value == 1 and "p = 1 " in paired.summary("a", "a")
    low, high = paired.interval
    assert low == pytest.approx(-high) and 0 < high < 1


@pytest.mark.parametrize("other", [rows_of([1, 1, 0], 101), rows_of([1, 1]), rows_of([1, 1, 0, 0]), []])
def test_other_seeds_are_no_pairs(other):
    for a, b in ((rows_of([1, 0, 1]), other), (other, rows_of([1, 0, 1]))):
        with pytest.raises(PairError, match="same seeds"):
            compare(a, b)
    with pytest.raises(PairError):
        compare(rows_of([1]) * 2, rows_of([1]) * 2)


def by_quartic(won, lost, n, z):
    """Both ends as roots of one polynomial: Yang, Sun and Hardin's form of Tango's interval (2013)."""
    g, d, m = z * z, won - lost, won + lost
    roots = np.roots([
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (m / g + 1),
        n * d * (2 * m / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - m) / g,
    ])  # fmt: skip
    real = roots[np.abs(roots.imag) < 1e-6].real
    return real.min(), real.max()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 300))
def test_the_score_interval_solves_the_published_quartic(won, lost, same):
    n = won + lost + same
    if n == 0 or won == lost:  # its roots coincide there
        return
    low, high = tango_interval(won, lost, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1
    if same:
        assert (low, high) == pytest.approx(by_quartic(won, lost, n, 1.959964), abs=2e-4)


def test_the_score_interval_of_published_examples_and_of_no_difference():
    """Airway hyper-responsiveness, 1 | 1 | 7 | 12 (Fagerland et al. 2014)."""
    assert tango_interval(1, 7, 21) == (pytest.approx(-0.517, abs=5e-4), pytest.approx(-0.026, abs=5e-4))
    z = 1.959964
    assert tango_interval(0, 0, 50)[1] == pytest.approx(
        z * z / (50 + z * z), abs=1e-5
    )  # as of one proportion, Wilson's
    assert tango_interval(20, 0, 20)[1] == 1.0 and tango_interval(0, 20, 20)[0] == -1.0
    for bad in ((1, 0, 0), (-1, 0, 3), (2, 2, 3)):
        with pytest.raises(ValueError, match="no interval"):
            tango_interval(*bad)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for won, lost, n in ((0.10, 0.05, 200), (0.06, 0.0, 100), (0.3, 0.1, 60)):
        draws = rng.multinomial(n, [won, lost, 1 - won - lost], size=1000)
        unique, counts = np.unique(draws[:, :2], axis=0, return_counts=True)
        ends = [tango_interval(int(b), int(c), n) for b, c in unique]
        covered = sum(count for (low, high), count in zip(ends, counts, strict=True) if low <= won - lost <= high)
        assert 930 <= covered <= 975


@pytest.mark.parametrize(("difference", "discordant"), [(0.03, 0.10), (0.05, 0.2), (0.1, 0.3)])
def test_what_n_can_show_is_what_simulated_tests_find(difference, discordant):
    n = math.ceil(episodes_needed(difference, discordant))
    assert smallest_difference(n, discordant) == pytest.approx(difference, rel=0.01)
    rng = np.random.default_rng(1)
    won = (discordant + difference) / 2
    b, c, _ = rng.multinomial(n, [won, discordant - won, 1 - discordant], size=20_000).T
    found = np.mean(np.abs(b - c) > 1.96 * np.sqrt(b + c))
    assert found == pytest.approx(0.8, abs=0.02)  # counts are whole


def test_few_episodes_show_nothing():
    assert smallest_difference(20, 0.1) is None
    assert smallest_difference(200, 0.1) == pytest.approx(0.0623, abs=5e-4)
    with pytest.raises(ValueError, match="discordant share"):
        episodes_needed(0.2, 0.1)
    assert [say_p(p) for p in (1.0, 0.0432, 1e-9)] == ["= 1", "= .0432", "< .0001"]


def test_returns_are_compared_by_pairs_too():
    paired = compare_returns(rows_of([1] * 4, returns=[1, 2, 3, 4]), rows_of([1] * 4, returns=[3, 3, 6, 8]))
    assert paired.difference == 2.5 and paired.interval == pytest.approx((0.4457, 4.5543), abs=1e-3)
    assert paired.p_value == pytest.approx(0.0305, abs=1e-4)  # t = 2.5 / (1.291 / 2), 3 degrees of freedom
    assert "mean difference of the returns +2.5, 95 % interval +0.4 to +4.6, p = .03" in paired.summary("a", "b")
    same = compare_returns(rows_of([1] * 4), rows_of([1] * 4))
    assert same.interval == (0, 0) and same.p_value == 1


def test_equal_differences_are_not_tested():
    paired = compare_returns(rows_of([1] * 3, returns=[1, 2, 3]), rows_of([1] * 3, returns=[3, 4, 5]))
    assert paired.difference == 2 and paired.p_value is None
    assert paired.summary("a", "b").endswith("returns +2.0, p not tested, all differences are equal (paired t)")


def test_returns_that_are_not_finite_are_left_out_and_counted():
    nan, inf = math.nan, math.inf
    before = rows_of([1] * 6, returns=[1, 2, 3, nan, 5, inf])
    after = rows_of([1] * 6, returns=[3, 3, 6, 8, -inf, inf])
    paired = compare_returns(before, after)
    assert paired.differences == (2, 1, 3) and paired.left_out == 3 and 0 < paired.p_value < 1
    assert "same 3 seeds" in paired.summary("a", "b")
    assert paired.summary("a", "b").endswith("; 3 more without a finite return are left out")
    nothing = compare_returns(before[3:4], after[3:4])
    assert math.isnan(nothing.difference) and nothing.p_value is None
    assert "mean difference of the returns +nan, p not tested" in nothing.summary("a", "b")


def test_the_change_since_a_file(tmp_path):
    def result(successes, objective="success"):
        return EvalResult(tuple(rows_of(successes)), 1.0, objective=objective)

    path = tmp_path / "eval_before.json"
    assert change_since(path, result([1, 1])) == ""
    write_eval_info(path, result([0, 0, 1]).to_lerobot_info("x"))
    assert "after against before on the same 3 seeds: won 2, lost 0" in change_since(path, result([1, 1, 1]))
    assert change_since(path, result([1, 1])) == ""
    assert "mean difference of the returns +0.7" in change_since(path, result([1, 1, 1], "return"))
    path.write_text("{")
    assert "no comparison with before" in change_since(path, result([1, 1, 1]))
