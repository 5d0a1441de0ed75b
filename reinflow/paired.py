"""Two policies on the same episodes: who won which seed, whether the difference is more than luck, what N can show.

Every seed is a pair. Pairs in which both succeed or both fail say nothing of a difference; the test, the interval and
the power depend on the others, the discordant ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from reinflow import UserError
from reinflow.eval_result import CONFIDENCE, EpisodeRow, EvalResult
from reinflow.evaluate import read_eval_info

ALPHA, POWER = 0.05, 0.8
"""Error rates that sample sizes are told for: two-sided false alarms, and how often a true difference is found."""


class PairError(UserError, ValueError):
    """Two evaluations that are no pair."""


def tango_interval(won: int, lost: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a difference of paired proportions, (won - lost) / n.

    Tango 1998, Statistics in Medicine 17, 891-908: the differences that the score test does not reject. It stays
    within [-1, 1] and has a width where nothing is discordant.

    Raises:
        ValueError: counts below 0, more than n of them, n < 1, or confidence not within (0, 1).
    """
    if n < 1 or min(won, lost) < 0 or won + lost > n or not 0 < confidence < 1:
        raise ValueError(f"no interval for {won} won and {lost} lost of {n} pairs at confidence {confidence}")
    z = float(norm.isf((1 - confidence) / 2))

    def score(difference: float) -> float:
        """Of a supposed difference; falls from above z to below -z over [-1, 1]."""
        b = (2 * n - won + lost) * difference - won - lost
        least = (math.sqrt(max(b * b + 8 * n * lost * difference * (1 - difference), 0.0)) - b) / (4 * n)
        variance = n * (2 * least + difference * (1 - difference))  # of won - lost at the restricted estimate
        excess = won - lost - n * difference
        if abs(excess) < 1e-12:
            return 0.0
        return excess / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, excess)

    centre = (won - lost) / n
    ends = [
        end if abs(end - centre) < 1e-12 else brentq(lambda d, sign=sign: min(sign * score(d), 1e9) - z, end, centre)
        for end, sign in ((-1.0, 1), (1.0, -1))
    ]
    return ends[0], ends[1]


@dataclass(frozen=True)
class Paired:
    """Successes of policies A and B on the same seeds."""

    both: int
    neither: int
    lost: tuple[int, ...]  # seeds that only A won
    won: tuple[int, ...]  # seeds that only B won

    @property
    def only_a(self) -> int:
        return len(self.lost)

    @property
    def only_b(self) -> int:
        return len(self.won)

    @property
    def episodes(self) -> int:
        """Pairs."""
        return self.both + self.neither + self.only_a + self.only_b

    @property
    def discordant(self) -> float:
        """Share of the pairs that one of the two won."""
        return (self.only_a + self.only_b) / self.episodes

    @property
    def difference(self) -> float:
        """Success rate of B minus that of A."""
        return (self.only_b - self.only_a) / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the difference, by Tango's score interval."""
        return tango_interval(self.only_b, self.only_a, self.episodes)

    @property
    def p_value(self) -> float:
        """Two-sided, of McNemar's exact test: a discordant pair falls to either with probability 1/2."""
        discordant = self.only_a + self.only_b
        return float(binomtest(self.only_b, discordant).pvalue) if discordant else 1.0

    def summary(self, name_a: str, name_b: str) -> str:
        """One line: ``B against A on 500 seeds: won 61, lost 12, difference +9.8 points, ...``."""
        return (
            f"{name_b} against {name_a} on the same {self.episodes} seeds: won {self.only_b}, lost {self.only_a}, "
            f"difference {100 * self.difference:+.1f} points, 95 % interval {_points(self.interval)}, "
            f"p {say_p(self.p_value)} (McNemar, exact)"
        )


@dataclass(frozen=True)
class PairedReturns:
    """Returns of policies A and B on the same seeds; for tasks whose objective is the return."""

    differences: tuple[float, ...]  # B - A, by seed
    left_out: int = 0  # pairs in which a return is not finite, as the simulation broke down

    @property
    def difference(self) -> float:
        """Mean of the differences; NaN where no pair is left."""
        return fmean(self.differences) if self.differences else math.nan

    @property
    def _error(self) -> float:
        return stdev(self.differences) / math.sqrt(len(self.differences)) if len(self.differences) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the mean difference, Student's; without a width for a single pair or equal differences."""
        half = float(student.isf((1 - CONFIDENCE) / 2, len(self.differences) - 1)) * self._error if self._error else 0.0
        return self.difference - half, self.difference + half

    @property
    def p_value(self) -> float | None:
        """Two-sided, of the paired t test; 1 where no seed differs, None where all differ alike: without a spread
        nothing is tested."""
        if not self._error:
            return None if self.difference else 1.0
        return float(2 * student.sf(abs(self.difference) / self._error, len(self.differences) - 1))

    def summary(self, name_a: str, name_b: str) -> str:
        """One line."""
        low, high = self.interval
        out = f"; {self.left_out} more without a finite return are left out" if self.left_out else ""
        tested = f", 95 % interval {low:+.1f} to {high:+.1f}" if self.p_value is not None else ""
        return (
            f"{name_b} against {name_a} on the same {len(self.differences)} seeds: mean difference of the returns "
            f"{self.difference:+.1f}{tested}, p {say_p(self.p_value)} (paired t){out}"
        )


def compare(a: Sequence[EpisodeRow], b: Sequence[EpisodeRow]) -> Paired:
    """Pair two policies' episodes by seed.

    Raises:
        PairError: they are not of the same seeds, one episode each.
    """
    pairs = _pairs(a, b)
    both = sum(one.success and other.success for one, other in pairs)
    lost = tuple(one.seed for one, other in pairs if one.success and not other.success)
    won = tuple(one.seed for one, other in pairs if other.success and not one.success)
    return Paired(both, len(pairs) - both - len(lost) - len(won), lost, won)


def compare_returns(a: Sequence[EpisodeRow], b: Sequence[EpisodeRow]) -> PairedReturns:
    """As ``compare``, by the episodes' returns; pairs without two finite ones are left out and counted."""
    differences = [other.return_ - one.return_ for one, other in _pairs(a, b)]
    finite = tuple(difference for difference in differences if math.isfinite(difference))
    return PairedReturns(finite, len(differences) - len(finite))


def compare_results(a: EvalResult, b: EvalResult) -> Paired | PairedReturns:
    """By what the task is judged by: success, or the return."""
    by_return = "return" in (a.objective, b.objective)
    return compare_returns(a.episodes, b.episodes) if by_return else compare(a.episodes, b.episodes)


def _pairs(a: Sequence[EpisodeRow], b: Sequence[EpisodeRow]) -> list[tuple[EpisodeRow, EpisodeRow]]:
    others = {row.seed: row for row in b}
    if not a or len(others) != len(b) or len({row.seed for row in a}) != len(a) or others.keys() != {r.seed for r in a}:
        raise PairError(
            f"evaluations of {len(a)} and {len(b)} episodes are not of the same seeds, one episode each, so there are "
            "no pairs: evaluate both with one --seed and --episodes"
        )
    return [(row, others[row.seed]) for row in a]


def change_since(path: Path, after: EvalResult) -> str:
    """One line on how an evaluation compares with the one that a file holds; "" without the file or its seeds."""
    if not path.is_file():
        return ""
    try:
        before = read_eval_info(path)
    except UserError as error:
        return f"no comparison with before: {error}"
    if {row.seed for row in before.episodes} != {row.seed for row in after.episodes}:
        return ""
    return compare_results(before, after).summary("before", "after")


# --- What N can show --------------------------------------------------------------------------------------------------


def episodes_needed(difference: float, discordant: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Pairs after which McNemar's two-sided test finds a difference of success rates with that power.

    Connor 1987, Biometrics 43, 207-211, without a correction for continuity: the exact test takes some per cent more
    (1 / difference of them, about).

    Raises:
        ValueError: not 0 < difference <= discordant <= 1.
    """
    if not 0 < difference <= discordant <= 1:
        raise ValueError(f"a difference of {difference} is not within 0 and the discordant share {discordant} <= 1")
    spread = norm.isf(alpha / 2) * math.sqrt(discordant) + norm.isf(1 - power) * math.sqrt(discordant - difference**2)
    return float((spread / difference) ** 2)


def smallest_difference(episodes: int, discordant: float, power: float = POWER, alpha: float = ALPHA) -> float | None:
    """The smallest difference that so many pairs show with that power; None where not even the whole discordant share
    would be enough."""
    if episodes_needed(discordant, discordant, power, alpha) > episodes:
        return None
    return float(brentq(lambda d: math.log(episodes_needed(d, discordant, power, alpha) / episodes), 1e-9, discordant))


def say_p(p: float | None) -> str:
    """A p-value for a line of text, behind "p"."""
    if p is None:
        return "not tested, all differences are equal"
    return "< .0001" if p < 1e-4 else f"= {p:.4f}".replace("0.", ".") if p < 1 else "= 1"


def _points(interval: tuple[float, float]) -> str:
    """Ends of an interval of shares, in percentage points."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"
