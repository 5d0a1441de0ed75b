"""What a chunk of control steps earned, and the record of an episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinflow.env import EpisodeStats, Extra
from so101_mujoco_utils import Array

EXTRAS = {
    "max_height": Extra("The block's greatest height, metres.", "max height {:.3f} m", "m"),
    "clipped_targets": Extra(
        "Control steps with a joint target beyond a joint limit, which was clipped.", "clipped targets {:.1f}"
    ),
}


@dataclass(frozen=True)
class ChunkScore:
    """What a chunk of n control steps earned in N environments, and which of its steps count."""

    rewards: Array  # (N, n), 0 after the end of the episode
    terms: dict[str, Array]  # (N, n) each; they add up to rewards
    active: NDArray[np.bool_]  # (N, n) steps of the episode, its last one included
    terminated: NDArray[np.bool_]  # (N,) lifted
    truncated: NDArray[np.bool_]  # (N,) time limit, not lifted
    lengths: NDArray[np.int64]  # (N,) number of active steps
    heights: Array  # (N, n) m, the block's centre
    clipped: NDArray[np.int64]  # (N, n) joints whose target was outside the limits
    environment_states: NDArray[np.float32] | None  # (N, n, S) after each active step, 0 elsewhere
    broken: NDArray[np.bool_]  # (N,) the simulation became unstable: the episode is cut off here and counts for nothing
    traces: Array  # (N, T) of the episodes after the chunk, see so101_sim.outcome

    def cut_off(self, unstable: NDArray[np.bool_], heights_m: Array, traces: Array) -> ChunkScore:
        """The score with the episodes of the rows ``unstable`` (N,) cut off after a first step that earned nothing, the
        block where it was before, at ``heights_m`` (N,), and the traces (N, T) as they were."""
        if not unstable.any():
            return self
        rows = unstable[:, None]
        first = np.arange(self.rewards.shape[1]) == 0
        states = self.environment_states
        return replace(
            self,
            rewards=np.where(rows, 0.0, self.rewards),
            terms={name: np.where(rows, 0.0, values) for name, values in self.terms.items()},
            active=np.where(rows, first, self.active),
            terminated=self.terminated & ~unstable,
            truncated=self.truncated | unstable,
            lengths=np.where(unstable, 1, self.lengths),
            heights=np.where(rows, heights_m[:, None], self.heights),
            environment_states=None if states is None else np.where(rows[..., None], np.float32(0.0), states),
            broken=unstable,
            traces=np.where(rows, traces, self.traces),
        )


@dataclass
class EpisodeLog:
    """The running sums of the current episode; plain values, so that a state can be written as JSON."""

    seed: int | None = None  # None: of a gymnasium environment that goes on with its own generator
    length: int = 0
    return_: float = 0.0
    max_height_m: float = 0.0
    clipped_targets: int = 0
    reward_terms: dict[str, float] = field(default_factory=dict)
    trace: list[float] = field(default_factory=list)  # see so101_sim.outcome; empty: nobody follows

    def begin(self, seed: int | None, height_m: float, trace: list[float] | None = None) -> None:
        """Starts over for the episode of `seed`, followed from the trace of its start if there is one."""
        self.seed = seed
        self.max_height_m, self.trace = height_m, trace or []
        self.length, self.return_, self.clipped_targets, self.reward_terms = 0, 0.0, 0, {}

    def record(self, score: ChunkScore, row: int) -> None:
        """Adds the executed steps of row `row` of a scored chunk."""
        steps = int(score.lengths[row])
        if self.trace:
            self.trace = score.traces[row].tolist()
        self.length += steps
        self.clipped_targets += int(np.count_nonzero(score.clipped[row, :steps]))
        self.max_height_m = max(self.max_height_m, *score.heights[row, :steps].tolist())
        # Added one by one: the sum must not depend on how a library blocks it.
        for reward in score.rewards[row, :steps].tolist():
            self.return_ += reward
        for name, values in score.terms.items():
            for value in values[row, :steps].tolist():
                self.reward_terms[name] = self.reward_terms.get(name, 0.0) + value

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> EpisodeLog:
        """From `dataclasses.asdict` of another one."""
        return cls(**{**values, "reward_terms": dict(values["reward_terms"])})

    def stats(
        self,
        env: int,
        success: bool,
        broken: bool = False,
        outcome: str = "",
        facts: Mapping[str, float] | None = None,
    ) -> EpisodeStats:
        """The finished episode as `EpisodeStats` of environment `env`."""
        assert self.seed is not None
        return EpisodeStats(
            env=env,
            seed=self.seed,
            return_=self.return_,
            length=self.length,
            success=success,
            broken=broken,
            reward_terms=dict(self.reward_terms),
            extras={"max_height": self.max_height_m, "clipped_targets": float(self.clipped_targets)},
            outcome=outcome,
            facts=dict(facts or {}),
        )
