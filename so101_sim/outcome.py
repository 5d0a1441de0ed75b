"""How an episode ended and what explains it, judged from the simulator's truth.

A task declares a `Taxonomy`: its outcomes and facts, and how they follow from an episode. What that needs is carried
from chunk to chunk in a *trace*, a short row of numbers for each episode, so that no instant has to be kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from reinflow.env import Extra
from so101_mujoco_utils import NUM_JOINTS, Array, SceneState, is_grasped

OPEN_RAD = math.radians(20.0)  # jaws touch the block's sides at 7 degrees: a finger's width more than that lets it in
CLOSED_RAD = math.radians(14.0)  # less than this they hold it, even across its diagonal, or nothing
REACHED_M = 0.025  # the block's width; in the embedded policies' successes the tool comes within 0.012
NEAR_M = 0.05  # closing farther away than the open jaws are wide is not about the block
PUSHED_M = 0.025  # its own width: where the policy aimed, the block is no longer. Closing jaws alone shove it less
HOLD_S = 0.1  # 5 control steps; a glance of both jaws takes 1 to 3, a grasp that lifts lasts 24 and more
RAISED_M = 0.015  # a block tipped onto an edge or a corner rises by up to 0.009
LEANING_SHARE = 0.5  # most of the episode

_COLUMNS = (
    "start_x", "start_y", "start_z", "start_yaw", "opened", "closest", "closing_distance", "pushed", "held_steps",
    "last_held", "height", "top", "leaning_steps", "jerk",
)  # fmt: skip
_NOT_YET = -1.0


class Taxonomy(ABC):
    """The outcomes and facts of a task's episodes, as `ChunkVectorEnv` declares them, and how they are found."""

    outcomes: ClassVar[Mapping[str, str]]
    facts: ClassVar[Mapping[str, Extra]]
    start_facts: ClassVar[tuple[str, ...]]
    trace_size: ClassVar[int]  # T

    def stack(self, traces: Iterable[list[float]]) -> Array:
        """Traces as an array (N, T); an empty one becomes zeros."""
        return np.array([trace or [0.0] * self.trace_size for trace in traces])

    @abstractmethod
    def begin(self, start: SceneState) -> list[float]:
        """The trace (T,) of an episode that starts at this instant (no leading dimensions)."""

    @abstractmethod
    def follow(
        self,
        traces: Array,
        before: SceneState,
        state: SceneState,
        used: NDArray[np.int64],
        active: NDArray[np.bool_],
        leaning: NDArray[np.bool_],
    ) -> Array:
        """Traces (N, T) before a chunk -> after it.

        Args:
            traces: (N, T).
            before: (N,) the instant before the chunk.
            state: (N, n) the instants after each control step.
            used: (N, n) control steps of the episode at each.
            active: (N, n) steps of the episode, of each row the first one at least and no gap.
            leaning: (N, n) steps with an arm joint's target beyond its limit.
        """

    @abstractmethod
    def judge(
        self, trace: Sequence[float], length: int, success: bool, broken: bool, control_period_s: float
    ) -> tuple[str, dict[str, float]]:
        """The outcome and the facts of an ended episode of `length` control steps. A trace that is empty, from a
        checkpoint of an episode that nobody followed, tells nothing: "" and no facts."""


class LiftTaxonomy(Taxonomy):
    """Of the tasks that lift the block. An episode has the first outcome that fits, in the order of `_failure`."""

    outcomes: ClassVar = {
        "success": "The block was lifted.",
        "unstable": "The physics broke down.",
        "joint_limit": "An arm joint was driven beyond its limit most of the time, and the block was never grasped.",
        "never_reached": "The open jaws never came to the block.",
        "pushed_away": "The block was pushed by more than its width before the jaws closed.",
        "never_closed": "The jaws came to the block and never closed there.",
        "missed": "The jaws closed beside the block or above it and did not hold it.",
        "slipped": "Both jaws held the block, if only by an edge, and lost it before it rose.",
        "dropped": "Both jaws held the block, raised it and lost it.",
        "timed_out": "The block was held or in the air when time was up.",
    }
    facts: ClassVar = {
        "block_x": Extra("The block's place at the start, to the right of the base.", "block x {:.3f} m", "m"),
        "block_y": Extra("The block's place at the start, ahead of the base.", "block y {:.3f} m", "m"),
        "block_yaw": Extra(
            "The block's turn at the start, -45 to 45: it looks the same after a quarter.", "yaw {:.0f} deg", "deg"
        ),
        "closest": Extra(
            "The least distance between the point between the fingertips and the block's centre once the jaws had "
            "opened; the start's where they never did.", "closest {:.3f} m", "m",
        ),
        "closing_distance": Extra(
            "That distance when the jaws first closed near the block; only where they did.", "closed at {:.3f} m", "m"
        ),
        "pushed": Extra(
            "How far the block was pushed along the floor before the jaws closed near it.", "pushed {:.3f} m", "m"
        ),
        "jerk": Extra("Root mean square of the joints' jerk.", "jerk {:.0f} rad/s^3", "rad_s3"),
        "time_to_success": Extra("Time until the lift; only where there was one.", "lifted after {:.2f} s", "s"),
    }  # fmt: skip
    start_facts: ClassVar = ("block_x", "block_y", "block_yaw")
    trace_size: ClassVar = len(_COLUMNS) + NUM_JOINTS  # and the joints' speeds a control step earlier

    def begin(self, start: SceneState) -> list[float]:
        """See `Taxonomy.begin`."""
        x, y, z = start.block_pos.tolist()
        w, *_, k = start.block_quat.tolist()
        values = {
            "start_x": x, "start_y": y, "start_z": z, "start_yaw": 2.0 * math.atan2(k, w), "height": z, "top": z,
            "closest": float(_distance(start)), "closing_distance": _NOT_YET,
        }  # fmt: skip
        # The arm rests before the first control step, so the speeds before it are 0.
        return [values.get(name, 0.0) for name in _COLUMNS] + [0.0] * NUM_JOINTS

    def follow(
        self,
        traces: Array,
        before: SceneState,
        state: SceneState,
        used: NDArray[np.int64],
        active: NDArray[np.bool_],
        leaning: NDArray[np.bool_],
    ) -> Array:
        """See `Taxonomy.follow`."""
        old = dict(zip(_COLUMNS, traces.T, strict=False))
        order, last = np.arange(len(traces)), active.sum(axis=1) - 1
        distance, jaw, height = _distance(state), state.joint_pos_rad[..., -1], state.block_pos[..., 2]
        wide = jaw > OPEN_RAD
        wide[:, 0] |= old["opened"] > 0.0
        opened = np.logical_or.accumulate(wide, axis=1) & active
        # The first opening replaces the start's distance.
        least = np.where(opened, distance, np.inf).min(axis=1)
        known = np.where(old["opened"] > 0.0, old["closest"], np.inf)
        closing = opened & (jaw < CLOSED_RAD) & (distance < NEAR_M)
        held = is_grasped(state) & active
        motion, earlier = self._jerk(traces[:, len(_COLUMNS) :], before.joint_vel, state.joint_vel, active, last)
        new = old | {
            "opened": opened[order, last],
            "closest": np.where(opened[order, last], np.minimum(known, least), old["closest"]),
            "held_steps": old["held_steps"] + held.sum(axis=1),
            "last_held": np.maximum(old["last_held"], (used * held).max(axis=1)),
            "height": height[order, last],
            # Not before the jaws opened: a block that starts under them is thrown up at once.
            "top": np.maximum(old["top"], np.where(opened, height, -np.inf).max(axis=1)),
            "leaning_steps": old["leaning_steps"] + (leaning & active).sum(axis=1),
            # Added one after the other, so that the sum depends neither on the chunks nor on how a library blocks it.
            "jerk": np.concatenate([old["jerk"][:, None], motion], axis=1).cumsum(axis=1)[:, -1],
        }
        new |= self._closing(old, state, distance, closing, active)
        return np.concatenate([np.stack([new[name] for name in _COLUMNS], axis=1), earlier], axis=1, dtype=np.float64)

    @staticmethod
    def _closing(
        old: Mapping[str, Array],
        state: SceneState,
        distance: Array,
        closing: NDArray[np.bool_],
        active: NDArray[np.bool_],
    ) -> dict[str, Array]:
        """How far the block was when the jaws first closed near it, and how far it had been pushed until then."""
        order, first = np.arange(len(closing)), closing.argmax(axis=1)
        closed_before, closes = old["closing_distance"] >= 0.0, closing.any(axis=1)
        until = np.where(closes, first, active.shape[1])[:, None]
        counts = active & (np.arange(active.shape[1]) <= until) & ~closed_before[:, None]
        x = state.block_pos[..., 0] - old["start_x"][:, None]
        y = state.block_pos[..., 1] - old["start_y"][:, None]
        pushed = np.sqrt(np.where(counts, x * x + y * y, 0.0).max(axis=1))
        return {
            "closing_distance": np.where(~closed_before & closes, distance[order, first], old["closing_distance"]),
            "pushed": np.maximum(old["pushed"], pushed),
        }

    @staticmethod
    def _jerk(
        earlier: Array, before: Array, velocity: Array, active: NDArray[np.bool_], last: NDArray[np.int64]
    ) -> tuple[Array, Array]:
        """Second differences of joint velocities, squared and summed over the joints (N, n), and the velocities (N, 6)
        one step before the last."""
        velocities = np.concatenate([earlier[:, None], before[:, None], velocity], axis=1)  # (N, n + 2, 6)
        change = np.diff(velocities, axis=1)
        change = change[:, 1:] - change[:, :-1]
        squares = change * change
        total = sum((squares[..., joint] for joint in range(1, NUM_JOINTS)), squares[..., 0])
        return np.where(active, total, 0.0), velocities[np.arange(len(last)), last + 1]

    def judge(
        self, trace: Sequence[float], length: int, success: bool, broken: bool, control_period_s: float
    ) -> tuple[str, dict[str, float]]:
        """See `Taxonomy.judge`."""
        if not trace:
            return "", {}
        found = dict(zip(_COLUMNS, trace, strict=False))
        yaw_deg = math.degrees(found["start_yaw"])
        facts = {
            "block_x": found["start_x"],
            "block_y": found["start_y"],
            "block_yaw": (yaw_deg + 45.0) % 90.0 - 45.0,
            "closest": found["closest"],
            "pushed": found["pushed"],
            "jerk": math.sqrt(found["jerk"] / (NUM_JOINTS * length)) / control_period_s**2,
        }
        if found["closing_distance"] >= 0.0:
            facts["closing_distance"] = found["closing_distance"]
        if success:
            facts["time_to_success"] = length * control_period_s
            return "success", facts
        return "unstable" if broken else self._failure(found, length, control_period_s), facts

    @staticmethod
    def _failure(found: Mapping[str, float], length: int, control_period_s: float) -> str:
        """The farthest that the episode got, then what stood in the way."""
        hold_steps = HOLD_S / control_period_s
        held = found["held_steps"] >= hold_steps
        risen = found["height"] - found["start_z"] > RAISED_M
        if risen or (held and length - found["last_held"] < hold_steps):
            return "timed_out"
        if held:
            return "dropped" if found["top"] - found["start_z"] > RAISED_M else "slipped"
        if found["leaning_steps"] > LEANING_SHARE * length:
            return "joint_limit"
        if found["pushed"] > PUSHED_M:
            return "pushed_away"
        if found["closing_distance"] >= 0.0:
            return "missed"
        return "never_closed" if found["opened"] and found["closest"] < REACHED_M else "never_reached"


def _distance(state: SceneState) -> Array:
    """(...) m, between the point between the fingertips and the block's centre."""
    offset = state.tool_pos - state.block_pos
    # Written out, as in so101_mujoco_utils: the vector forms must agree to the last bit.
    return np.sqrt(offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1] + offset[..., 2] * offset[..., 2])


LIFT = LiftTaxonomy()
