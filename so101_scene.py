"""The pick-up task without an interface: its configuration, its rules, the record of an episode.

`PickScene` holds what every form of the environment shares, so that reset, clipping, reward and the end of an episode
are written once; so101_gym_env.py and so101_vector_env.py build their interfaces on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from reinflow import UserError
from so101_mujoco_utils import (
    CAMERA_NAMES,
    FRAMES,
    NUM_JOINTS,
    REWARD_TERMS,
    Array,
    RewardConfig,
    SceneLayout,
    clip_to_limits,
    compute_reward,
    environment_state,
    is_success,
    load_model,
)
from so101_renderer import ParallelRenderer, SceneRenderer, gl_backend

INTEGRATION_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
BLOCK_YAW_DEG = math.degrees(0.4)


# --- Configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvConfig:
    """Everything that defines the task. Raises ValueError, naming the field and the remedy, when it is built wrong."""

    # MJCF file; None is the shipped model/scene.xml.
    model_path: str | None = None
    cameras: tuple[str, ...] = CAMERA_NAMES
    # Pixels, height and width of every image.
    image_size: int = 256
    # Off: observations have no pixels, for state-based policies.
    render_images: bool = True
    # On: observations carry the privileged simulator state as well.
    environment_state: bool = False
    # Physics substeps of 2 ms per control step: 10 is 50 Hz.
    steps_per_action: int = 10
    # Time limit in control steps: 150 is 3 s, three chunks of 50.
    max_steps_per_episode: int = 150
    # Metres above the floor.
    lift_threshold: float = RewardConfig.lift_threshold
    instruction: str = "pick up the block"
    # Metres; where the block starts unless randomised, and its height in any case.
    block_pos: tuple[float, float, float] = (0.0, 0.3, RewardConfig.block_rest_height)
    randomize_block: bool = False
    # Metres from the robot's base axis, degrees to either side of straight ahead, degrees of turn to either side.
    block_radius_range: tuple[float, float] = (0.20, 0.28)
    block_angle_deg: float = 30.0
    block_yaw_deg: float = BLOCK_YAW_DEG
    # MuJoCo degrees for all six joints, the gripper too; clipped to the joint limits.
    starting_position: tuple[float, ...] = (0.06, -100.21, 89.95, 66.46, 5.96, 1.0)
    # Uniform noise on every starting joint, degrees to either side.
    start_noise_deg: float = 0.0
    # "seed" is the documented formula; "staged" cannot be farmed by staying (so101_mujoco_utils.compute_reward).
    reward_mode: str = RewardConfig.mode
    contact_bonus: float = RewardConfig.contact_bonus
    height_alignment_bonus: float = RewardConfig.height_alignment_bonus
    # What each of these multiplies is in the table of compute_reward; their defaults and reasons in RewardConfig.
    reach_scale: float = RewardConfig.reach_scale
    reach_length: float = RewardConfig.reach_length
    grasp_scale: float = RewardConfig.grasp_scale
    lift_scale: float = RewardConfig.lift_scale
    success_bonus: float = RewardConfig.success_bonus
    # Units of actions and agent_pos: a key of so101_mujoco_utils.FRAMES.
    joint_frame: str = "lerobot"

    def __post_init__(self) -> None:
        _check_choice("joint_frame", self.joint_frame, FRAMES)
        _check_choice("reward_mode", self.reward_mode, REWARD_TERMS)
        for name in ("image_size", "steps_per_action", "max_steps_per_episode"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "use a whole number of at least 1")
        for name, size in (("block_pos", 3), ("block_radius_range", 2), ("starting_position", NUM_JOINTS)):
            value = getattr(self, name)
            numbers = len(value) == size and all(math.isfinite(number) for number in value)
            _require(numbers, name, value, f"give {size} finite numbers")
        for name in ("block_angle_deg", "block_yaw_deg", "start_noise_deg"):
            _require(0.0 <= getattr(self, name) <= 180.0, name, getattr(self, name), "use 0 to 180 degrees")
        bonuses = ("contact_bonus", "height_alignment_bonus")
        for name in (*bonuses, "reach_scale", "grasp_scale", "lift_scale", "success_bonus"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0.0, name, value, "use a finite number of at least 0")
        _require(self.reach_length > 0.0, "reach_length", self.reach_length, "use a distance above 0, such as 0.05 m")
        low, high = self.block_radius_range
        _require(0.0 < low <= high, "block_radius_range", (low, high), "order it as (nearest, farthest), above 0 m")
        above = self.block_pos[2] < self.lift_threshold
        _require(above, "lift_threshold", self.lift_threshold, f"use more than the block's start {self.block_pos[2]} m")
        _require(bool(self.instruction.strip()), "instruction", self.instruction, "say what to do")
        _require(len(set(self.cameras)) == len(self.cameras), "cameras", self.cameras, "name each camera once")
        seen = bool(self.cameras) or not self.render_images
        _require(seen, "cameras", self.cameras, "name at least one camera, or set render_images=False")

    @property
    def reward(self) -> RewardConfig:
        """The fields that `compute_reward` reads."""
        return RewardConfig(
            mode=self.reward_mode,
            contact_bonus=self.contact_bonus,
            height_alignment_bonus=self.height_alignment_bonus,
            lift_threshold=self.lift_threshold,
            block_rest_height=self.block_pos[2],
            reach_scale=self.reach_scale,
            reach_length=self.reach_length,
            grasp_scale=self.grasp_scale,
            lift_scale=self.lift_scale,
            success_bonus=self.success_bonus,
        )


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"EnvConfig.{name} is {value!r}: {remedy}")


def _check_choice(name: str, value: str, choices: Mapping[str, object]) -> None:
    _require(value in choices, name, value, f"choose one of {', '.join(repr(choice) for choice in choices)}")


# --- What one episode leaves behind ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeStats:
    """One finished episode. `env` is its row in a vector environment, `seed` the one its environment was reset with."""

    env: int
    seed: int | None
    return_: float
    length: int  # control steps
    success: bool
    max_height_m: float  # of the block's centre, after any control step
    clipped_targets: int  # control steps with a target outside the joint limits
    reward_terms: dict[str, float]  # sums over the episode; they add up to return_
    episode_index: int = 0  # 0 for the first episode after a seeded reset


@dataclass
class EpisodeLog:
    """The running sums of the current episode; plain values, so that a state can be written as JSON."""

    seed: int | None = None
    episode_index: int = -1
    length: int = 0
    return_: float = 0.0
    max_height_m: float = 0.0
    clipped_targets: int = 0
    reward_terms: dict[str, float] = field(default_factory=dict)

    def begin_after(self, seed: int | None, height_m: float) -> None:
        """Starts over: for the first episode of `seed`, or for the next one of the seed before if it is None."""
        self.episode_index = 0 if seed is not None else self.episode_index + 1
        self.seed = seed if seed is not None else self.seed
        self.max_height_m = height_m
        self.length, self.return_, self.clipped_targets, self.reward_terms = 0, 0.0, 0, {}

    def record(self, score: ChunkScore, row: int) -> None:
        """Adds the executed steps of row `row` of a scored chunk."""
        steps = int(score.lengths[row])
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

    def stats(self, env: int, success: bool) -> EpisodeStats:
        """The finished episode as `EpisodeStats` of environment `env`."""
        values = asdict(self)
        return EpisodeStats(env=env, success=success, **values)


# --- The scene, shared by every form of the environment -------------------------------------------------------------


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


class PickScene:
    """The model and the rules of the task: how an episode starts, what actions mean, what steps earn.

    Holds no episode: the same scene serves any number of environments in a process.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        self.model = load_model(config.model_path, tuple(config.cameras))
        self.layout = SceneLayout(self.model)
        self.frame = FRAMES[config.joint_frame]
        self.limits_rad = self.layout.limits_rad
        self.term_names = REWARD_TERMS[config.reward_mode]
        self.control_period_s = self.model.opt.timestep * config.steps_per_action

    def reset(self, data: mujoco.MjData, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> None:
        """Writes the start of an episode into `data`, drawing from `rng` what the configuration randomises.

        Args:
            options: `block_pos` (3,) m and `block_yaw_rad` override the draw, for evaluations on a grid.

        Raises:
            ValueError: an unknown option, or a start that already counts as a success.
        """
        position, yaw = self._draw_block(rng)
        options = dict(options or {})
        position = tuple(options.pop("block_pos", position))
        yaw = float(options.pop("block_yaw_rad", yaw))
        if options or len(position) != 3:
            raise ValueError(f"reset takes block_pos (3 numbers) and block_yaw_rad; got {position}, {sorted(options)}")
        start = self._draw_start(rng)
        mujoco.mj_resetData(self.model, data)
        data.qpos[self.layout.joint_qpos] = start
        data.qpos[self.layout.block_qpos] = (*position, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
        data.ctrl[self.layout.actuators] = start
        mujoco.mj_forward(self.model, data)
        if self.is_success(self.layout.row(data)):
            raise ValueError(f"block_pos {position} starts above lift_threshold {self.config.lift_threshold}: lower it")

    def _draw_block(self, rng: np.random.Generator) -> tuple[tuple[float, float, float], float]:
        config = self.config
        if not config.randomize_block:
            return config.block_pos, 0.0
        radius = rng.uniform(*config.block_radius_range)
        angle = math.radians(rng.uniform(-config.block_angle_deg, config.block_angle_deg))
        yaw = math.radians(rng.uniform(-config.block_yaw_deg, config.block_yaw_deg))
        return (radius * math.sin(angle), radius * math.cos(angle), config.block_pos[2]), yaw

    def _draw_start(self, rng: np.random.Generator) -> Array:
        start_deg = np.array(self.config.starting_position)
        if self.config.start_noise_deg > 0.0:
            start_deg = start_deg + rng.uniform(-1.0, 1.0, NUM_JOINTS) * self.config.start_noise_deg
        return clip_to_limits(np.deg2rad(start_deg), self.limits_rad)[0]

    def control(self, actions: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
        """Actions (..., 6) in the frame's units -> MuJoCo controls (..., nu), and clipped joints per target (...).

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        values = np.asarray(actions, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("actions contain NaN or infinity: the policy has diverged, or its normalisation is wrong")
        targets_rad, clipped = clip_to_limits(self.frame.to_rad(values), self.limits_rad)
        control = np.zeros((*targets_rad.shape[:-1], self.model.nu))
        control[..., self.layout.actuators] = targets_rad
        return control, clipped

    def score(self, before: Array, rows: Array, steps: NDArray[np.int64], clipped: NDArray[np.int64]) -> ChunkScore:
        """Rewards and the end of the episode, from the recorded rows of one chunk.

        Args:
            before: (N, R) rows before the chunk.
            rows: (N, n, R) rows after each control step; those after an episode's end are ignored.
            steps: (N,) control steps of the episode before the chunk.
            clipped: (N, n) from `control`.
        """
        config = self.config
        previous = np.concatenate([before[:, None], rows[:, :-1]], axis=1)
        state = self.layout.scene_state(rows)
        success = is_success(state, config.lift_threshold)
        used = steps[:, None] + np.arange(1, rows.shape[1] + 1)  # (N, n) control steps of the episode after each one
        ended_before = np.logical_or.accumulate(success, axis=1)[:, :-1]
        active = used <= config.max_steps_per_episode
        active[:, 1:] &= ~ended_before
        terminated = np.asarray((success & active).any(axis=1))
        timed_out = np.asarray((active & (used == config.max_steps_per_episode)).any(axis=1))
        terms = {
            name: np.where(active, values, 0.0)
            for name, values in compute_reward(self.layout.scene_state(previous), state, config.reward).items()
        }
        return ChunkScore(
            rewards=sum(terms.values(), np.zeros(active.shape)),
            terms=terms,
            active=active,
            terminated=terminated,
            truncated=timed_out & ~terminated,
            lengths=active.sum(axis=1),
            heights=state.block_pos[..., 2],
            clipped=clipped,
            environment_states=self._environment_states(rows, used, active) if config.environment_state else None,
        )

    def _environment_states(
        self, rows: Array, used: NDArray[np.int64], active: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        states = self.environment_state(rows, used)
        return np.where(active[..., None], states, np.float32(0.0))

    def is_success(self, row: Array) -> bool:
        """Whether the instant `row` (R,) counts as success."""
        return bool(is_success(self.layout.scene_state(row), self.config.lift_threshold))

    def block_height(self, row: Array) -> float:
        """Height of the block's centre at the instant `row` (R,), metres."""
        return float(self.layout.scene_state(row).block_pos[2])

    def agent_pos(self, rows: Array) -> NDArray[np.float32]:
        """Rows (..., R) -> joint positions (..., 6) in the frame's units."""
        return self.frame.from_rad(self.layout.joint_pos_rad(rows)).astype(np.float32)

    def environment_state(self, rows: Array, steps: ArrayLike) -> NDArray[np.float32]:
        """Rows (..., R) after `steps` (...) control steps of the episode -> privileged state (..., S)."""
        progress = np.asarray(steps) / self.config.max_steps_per_episode
        return environment_state(self.layout.scene_state(rows), progress)

    def make_renderer(self) -> SceneRenderer:
        """A renderer of the configured cameras and size. Raises RenderError when OpenGL cannot start."""
        return SceneRenderer(self.model, tuple(self.config.cameras), self.config.image_size)

    def make_parallel_renderer(self, num_threads: int) -> SceneRenderer | ParallelRenderer:
        """The same in `num_threads` threads, where OpenGL may be used outside of the main one."""
        if num_threads == 1 or gl_backend() not in ("egl", "osmesa"):
            return self.make_renderer()
        return ParallelRenderer(self.model, tuple(self.config.cameras), self.config.image_size, num_threads)

    def integration_state(self, data: mujoco.MjData) -> Array:
        """All that the next substep depends on, warm start included: (mj_stateSize,)."""
        state = np.empty(mujoco.mj_stateSize(self.model, INTEGRATION_STATE))
        mujoco.mj_getState(self.model, data, state, INTEGRATION_STATE)
        return state


class UnstableSimulationError(UserError, RuntimeError):
    """MuJoCo warned (bad numbers, full buffers): what it computed cannot be trusted."""

    def __init__(self, env: int, seed: int | None, length: int) -> None:
        super().__init__(
            f"the simulation of environment {env} (seed {seed}) became unstable around control step {length}. "
            "Check masses, gains and timestep of the model; the shipped scene should never do this"
        )
