"""What seeds are for. An episode is named by its seed: where it starts and its noise follow from it.

    0 .. 4,999         training, demonstrations
    5,000 .. 9,999     tuning: they choose checkpoints and settings
    10,000 .. 2^32-1   reporting: nothing is ever chosen by them

Above are the trainings' own: a training seed in the low 32 bits, the pass over them and the run's seed in the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

FIRST_TUNING_SEED = 5_000
FIRST_REPORTING_SEED = 10_000
PASS, RUN = 2**32, 2**48  # added once a pass and once for the run's seed: no two passes or runs share an episode


@dataclass(frozen=True)
class TrainingSeeds:
    """The seeds of a training's episodes 0, 1, 2, ...: shuffled passes over those below ``below``.

    Environment j of N plays the episodes j, j + N, j + 2 N, ..., so that any number of environments plays the same.
    """

    seed: int
    below: int = FIRST_TUNING_SEED

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(self.below)

    def of(self, episodes: NDArray[np.int64]) -> list[int]:
        """Seeds of the episodes with these numbers, (N,) each."""
        passes, places = np.divmod(episodes, self.below)
        return (self._order[places] + PASS * passes + RUN * self.seed).tolist()
