"""When to stop comparing two policies: a group-sequential test of paired successes.

The power family of two-sided designs with an inner wedge (Pampallona and Tsiatis 1994, Journal of Statistical Planning
and Inference 42, 19-35; Jennison and Turnbull 2000, Group Sequential Methods, chapter 5). With the information fraction
t in (0, 1] and the score S(t), a Brownian motion with drift:

    |S| >= REJECT t^.3           a difference is shown
    |S| <= DRIFT t - ACCEPT t^.6  one of the size asked for would have been shown

The information of n pairs is n^2 / (discordant pairs): it is measured as the pairs come in, so that nobody need know
beforehand how often two policies differ. Few discordant pairs say little of how many there will be, so FEW more than
seen are supposed, and at least as many as the difference asked for would make by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

SEQUENTIAL_ALPHA, SEQUENTIAL_POWER = 0.05, 0.9
"""False alarms between equals, two-sided; how often a true difference of the size asked for is shown."""
LONGEST = 1.4  # the information at t = 1 over that of the fixed test with the same error rates
REJECT_POWER, ACCEPT_POWER = 0.3, 0.6
REJECT, ACCEPT = 2.3011, 2.1566  # solved for both by integration over looks at t = .01, .02, ..., 1
LOOK_EVERY = 0.01  # of the information; looking more often than was integrated would be one false alarm more
DRIFT = math.sqrt(LONGEST) * float(norm.isf(SEQUENTIAL_ALPHA / 2) + norm.isf(1 - SEQUENTIAL_POWER))
FEW = 3.0  # discordant pairs supposed beside those seen
GO_ON, A_BETTER, B_BETTER, NO_DIFFERENCE = 0, -1, 1, 2

Counts = int | NDArray[np.int64]


@dataclass(frozen=True)
class Sequential:
    """The test that finds a difference of success rates of at least that size; of one comparison or of arrays of
    them."""

    difference: float  # a share, within (0, 1)

    def information(self, episodes: Counts, won: Counts, lost: Counts) -> Any:
        """t after so many pairs, at most 1."""
        discordant = np.maximum(won + lost + FEW, self.difference * episodes)
        return np.minimum(episodes**2 / discordant / (DRIFT / self.difference) ** 2, 1.0)

    def verdict(self, t: Any, won: Counts, lost: Counts) -> Any:
        """GO_ON, A_BETTER, B_BETTER or NO_DIFFERENCE of this size, at information t."""
        # As in `information`: solved for the pairs, t = n^2 / (difference n) / (DRIFT / difference)^2 is difference n =
        # DRIFT^2 t.
        discordant = np.maximum(won + lost + FEW, DRIFT**2 * t)
        score = (won - lost) / np.sqrt(discordant) * np.sqrt(t)
        reject = REJECT * t**REJECT_POWER
        accept = np.where(t >= 1, reject, np.minimum(DRIFT * t - ACCEPT * t**ACCEPT_POWER, reject))
        undecided = np.where(np.abs(score) < accept, NO_DIFFERENCE, GO_ON)
        return np.where(score >= reject, B_BETTER, np.where(-score >= reject, A_BETTER, undecided))

    def most_episodes(self, discordant: float) -> int:
        """Pairs at t = 1 where that share of them is discordant."""
        return math.ceil(discordant * (DRIFT / self.difference) ** 2)


@dataclass
class Monitor:
    """Says of every batch of one comparison whether to go on."""

    test: Sequential
    information: float = 0.0  # t after the pairs that were last told of
    looked_at: float = 0.0  # t of the last look

    def look(self, episodes: int, won: int, lost: int) -> int:
        """The verdict after so many pairs; GO_ON where too little came since the last look."""
        self.information = float(self.test.information(episodes, won, lost))
        if self.information < min(self.looked_at + LOOK_EVERY, 1.0):
            return GO_ON
        self.looked_at = self.information
        return int(self.test.verdict(self.information, won, lost))
