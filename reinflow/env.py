"""The environment's contract: N environments that execute whole chunks of actions.

Rollouts, evaluations and runs know an environment by this page alone. N environments, n control steps in a chunk,
S the length of the privileged simulator state, A action dimensions.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from reinflow.launch import local_ranks

Array = NDArray[np.float64]


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's where a scheduler pins it, or where a launcher started
    several on one machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks())


class Observation(TypedDict, total=False):
    """What N environments show; which entries there are is the environment's to say and the policy's to ask for."""

    pixels: dict[str, Any]  # by view, (N, h, w, 3) uint8: numpy, or tensors of an environment that draws on a device
    agent_pos: NDArray[np.float32]  # (N, P) the robot's own state, in the policy's units
    environment_state: NDArray[np.float32]  # (N, S) privileged
    task: list[str]  # N instructions


def take_rows(observation: Observation, rows: NDArray[np.int64]) -> Observation:
    """The chosen rows (M,) of an observation, in their order."""
    taken: Observation = {}
    if "pixels" in observation:
        taken["pixels"] = {view: images[rows] for view, images in observation["pixels"].items()}
    if "agent_pos" in observation:
        taken["agent_pos"] = observation["agent_pos"][rows]
    if "environment_state" in observation:
        taken["environment_state"] = observation["environment_state"][rows]
    if "task" in observation:
        taken["task"] = [observation["task"][row] for row in rows.tolist()]
    return taken


def join_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """States (``ChunkVectorEnv.get_state``) of groups of environments as one of all, in the groups' order."""
    joined = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        lists = all(isinstance(part, list) for part in parts)
        joined[name] = [row for part in parts for row in part] if lists else np.concatenate(parts)
    return joined


def part_of_state(state: Mapping[str, Any], rows: range) -> dict[str, Any]:
    """The state of a contiguous part of the environments."""
    return {name: values[rows.start : rows.stop] for name, values in state.items()}


@dataclass(frozen=True)
class Extra:
    """A figure that an environment reports of every episode besides return, length and success."""

    explanation: str  # what it is and in which unit
    template: str  # its mean in a summary, e.g. "max height {:.3f} m"
    unit: str = ""  # ends its name in files that carry no explanations, e.g. "m"

    def key(self, name: str) -> str:
        """``name`` with its unit."""
        return f"{name}_{self.unit}" if self.unit else name


@dataclass(frozen=True)
class EpisodeStats:
    """One finished episode."""

    env: int  # its row
    seed: int  # names the episode: `reset` with it starts the same one again
    return_: float  # undiscounted
    length: int  # control steps
    success: bool
    reward_terms: dict[str, float] = field(default_factory=dict)  # sums over the episode; they add up to return_
    extras: dict[str, float] = field(default_factory=dict)  # by the names of ChunkVectorEnv.extras
    broken: bool = False  # the simulation broke down in it: it counts for nothing
    outcome: str = ""  # how it ended, a name of ChunkVectorEnv.outcomes
    facts: dict[str, float] = field(default_factory=dict)  # by the names of ChunkVectorEnv.facts


@dataclass(frozen=True)
class ChunkResult:
    """One chunk of n control steps in N environments.

    The observation is the one to decide on next: an environment whose episode ended shows its next episode if it was
    given a seed for one, and its last instant otherwise.
    """

    observation: Observation
    rewards: Array  # (N, n), 0 after the end of the episode
    reward_terms: dict[str, Array]  # (N, n) each; they add up to rewards
    active: NDArray[np.bool_]  # (N, n) executed steps of the episode, its last one included
    terminated: NDArray[np.bool_]  # (N,) the task ended in this chunk
    truncated: NDArray[np.bool_]  # (N,) the time limit struck in this chunk, or the simulation broke; never both
    final_indices: NDArray[np.int64]  # (M,) the truncated environments
    final_observation: Observation | None  # (M rows) their last instant, before any restart; None if M == 0
    environment_states: NDArray[np.float32] | None  # (N, n, S) after each active step, 0 elsewhere; if there are any
    episodes: list[EpisodeStats]  # that ended in this chunk, by environment


class ChunkVectorEnv(ABC):
    """N environments that run whole chunks; close them, or use them in a ``with``."""

    num_envs: int
    extras: ClassVar[Mapping[str, Extra]] = {}
    """What EpisodeStats.extras holds; every name becomes a metric."""
    objective: ClassVar[Literal["success", "return"]] = "success"
    """What an evaluation chooses the best policy by."""
    outcomes: ClassVar[Mapping[str, str]] = {}
    """How an episode can end, name -> explanation, successes first, then failures from the least to the most that a
    policy got done; judged by the simulator's truth."""
    facts: ClassVar[Mapping[str, Extra]] = {}
    """What EpisodeStats.facts holds: figures of single episodes that an evaluation keeps and that are no metrics, such
    as where the episode started."""
    start_facts: ClassVar[tuple[str, ...]] = ()
    """Those of ``facts`` that say where an episode started; the first two span a map of the task."""

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start the episode of its seed in every environment; it depends on nothing but the seed.

        Raises:
            ValueError: not one seed for each.
        """

    @abstractmethod
    def step_chunk(self, actions: NDArray[Any], next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """Execute actions (N, n, A), one control step each.

        Args:
            actions: of every environment; those of ended ones are ignored.
            next_seeds: N seeds; where an episode ends in this chunk, the one with this seed starts at once. None: an
                ended environment stays as it is until ``reset``.

        Raises:
            ValueError: wrong shape, NaN or infinity.
            RuntimeError: before the first reset.
        """

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, for a checkpoint: name -> array (N, ...), or a list of N JSON-able
        values; see ``join_states``."""

    @abstractmethod
    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """Go back to a ``get_state``; returns the observation to decide on. Raises ValueError if it does not fit."""

    def close(self) -> None:  # noqa: B027 - most environments hold nothing
        """Free renderers and processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
