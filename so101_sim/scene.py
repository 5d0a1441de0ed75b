"""The pick-up task without an interface: how an episode starts, what actions mean, what steps earn.

`PickScene` holds what every form of the environment shares, so that reset, clipping, reward and the end of an episode
are written once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from reinflow import ConfigError, UserError
from so101_mujoco_utils import (
    FRAMES,
    LIMIT_TOLERANCE_RAD,
    REWARD_TERMS,
    Array,
    SceneLayout,
    SceneState,
    clip_to_limits,
    compute_reward,
    environment_state,
    is_success,
    load_model,
)
from so101_sim.config import EnvConfig
from so101_sim.episode import ChunkScore, EpisodeLog
from so101_sim.randomize import draw_block, draw_start_deg
from so101_sim.renderer import ParallelRenderer, SceneRenderer, gl_backend
from so101_sim.tasks.registry import taxonomy_of

CONTROL_HZ, RATE_TOLERANCE = 50.0, 0.01
INTEGRATION_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


OPTIONS = ("block_pos", "block_yaw_rad")  # of reset


class PickScene:
    """The model and the rules of the task: how an episode starts, what actions mean, what steps earn.

    Holds no episode: the same scene serves any number of environments in a process.
    """

    def __init__(self, config: EnvConfig) -> None:
        self.config = config
        try:
            self.model = load_model(config.model_path, tuple(config.cameras))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error
        self.layout = SceneLayout(self.model)
        self.frame = FRAMES[config.joint_frame]
        self.limits_rad = self.layout.limits_rad
        self.term_names = REWARD_TERMS[config.reward_mode]
        self.taxonomy = taxonomy_of(config)
        self.substeps = self._set_rate()
        self.control_period_s = self.model.opt.timestep * self.substeps

    def _set_rate(self) -> int:
        """Physics substeps per control step, so that a control step takes what the task asks for; the time step is
        shortened or lengthened until they fit. Raises ConfigError where the scene cannot follow."""
        config, timestep = self.config, self.model.opt.timestep
        wanted_s = 1.0 / (config.control_hz or CONTROL_HZ)
        if not config.control_hz:
            if abs(timestep * config.steps_per_action / wanted_s - 1.0) > RATE_TOLERANCE:
                raise ConfigError(
                    f"steps_per_action={config.steps_per_action} time steps of {timestep:g} s in "
                    f"{config.model_path or 'the shipped scene'} are not the {wanted_s:g} s of a control step at "
                    f"{CONTROL_HZ:g} Hz: change steps_per_action or the scene's timestep, or say control_hz"
                )
            return config.steps_per_action
        substeps = round(wanted_s / timestep)
        if substeps < 1 or abs(wanted_s / substeps / timestep - 1.0) > 0.2:
            raise ConfigError(
                f"control_hz={config.control_hz:g}: {wanted_s:g} s are no whole number of the scene's time steps of "
                f"{timestep:g} s: lower the scene's timestep"
            )
        self.model.opt.timestep = wanted_s / substeps
        return substeps

    def reset(self, data: mujoco.MjData, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> None:
        """Writes the start of an episode into `data`, drawing from `rng` what the configuration randomises.

        Args:
            options: `block_pos` (3,) m and `block_yaw_rad` override the draw, for evaluations on a grid. Others are
                somebody else's (LeRobot marks a new rollout by one) and left alone.

        Raises:
            ValueError: a slip in one of these names, a block_pos of other than 3 numbers, or a start that already
                counts as a success.
        """
        position, yaw = draw_block(self.config, rng)
        options = options or {}
        position = tuple(options.get("block_pos", position))
        yaw = float(options.get("block_yaw_rad", yaw))
        for name in options.keys() - set(OPTIONS):
            if meant := difflib.get_close_matches(name, OPTIONS, 1, 0.8):
                raise ValueError(f"reset option {name}: is {meant[0]} meant?")
        if len(position) != 3:
            raise ValueError(f"reset takes a block_pos of 3 numbers; got {position}")
        start = clip_to_limits(np.deg2rad(draw_start_deg(self.config, rng)), self.limits_rad)[0]
        mujoco.mj_resetData(self.model, data)
        data.qpos[self.layout.joint_qpos] = start
        data.qpos[self.layout.block_qpos] = (*position, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2))
        data.ctrl[self.layout.actuators] = start
        mujoco.mj_forward(self.model, data)
        if self.is_success(self.layout.row(data)):
            raise ValueError(f"block_pos {position} starts above lift_threshold {self.config.lift_threshold}: lower it")

    def control(self, actions: ArrayLike) -> tuple[Array, NDArray[np.int64], NDArray[np.bool_]]:
        """Actions (..., 6) in the frame's units -> MuJoCo controls (..., nu), clipped joints per target (...), and
        whether one of them is the arm's (...): the gripper is often driven beyond its limit, to press.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        values = np.asarray(actions, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("actions contain NaN or infinity: the policy has diverged, or its normalisation is wrong")
        wanted_rad = self.frame.to_rad(values)
        targets_rad, clipped = clip_to_limits(wanted_rad, self.limits_rad)
        leaning = clipped > (np.abs(wanted_rad[..., -1] - targets_rad[..., -1]) > LIMIT_TOLERANCE_RAD)
        control = np.zeros((*targets_rad.shape[:-1], self.model.nu))
        control[..., self.layout.actuators] = targets_rad
        return control, clipped, leaning

    def score(
        self,
        before: Array,
        rows: Array,
        steps: NDArray[np.int64],
        clipped: NDArray[np.int64],
        leaning: NDArray[np.bool_],
        traces: Array,
    ) -> ChunkScore:
        """Rewards and the end of the episode, from the recorded rows of one chunk.

        Args:
            before: (N, R) rows before the chunk.
            rows: (N, n, R) rows after each control step; those after an episode's end are ignored.
            steps: (N,) control steps of the episode before the chunk.
            clipped, leaning: (N, n) from `control`.
            traces: (N, T) of the episodes before the chunk; all zeros where nobody follows them.
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
            broken=np.zeros(len(rows), dtype=bool),
            traces=self._follow(traces, before, state, used, active, leaning),
        )

    def _environment_states(
        self, rows: Array, used: NDArray[np.int64], active: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        states = self.environment_state(rows, used)
        return np.where(active[..., None], states, np.float32(0.0))

    def is_success(self, row: Array) -> bool:
        """Whether the instant `row` (R,) counts as success."""
        return bool(is_success(self.layout.scene_state(row), self.config.lift_threshold))

    def _follow(self, traces: Array, before: Array, state: SceneState, *steps: NDArray[Any]) -> Array:
        if not traces.any():  # nobody wants to know: the gymnasium face, whose single steps it would slow down
            return traces
        return self.taxonomy.follow(traces, self.layout.scene_state(before), state, *steps)

    def begin_trace(self, row: Array) -> list[float]:
        """The trace of an episode whose first instant is `row` (R,)."""
        return self.taxonomy.begin(self.layout.scene_state(row))

    def judge(self, log: EpisodeLog, success: bool, broken: bool) -> tuple[str, dict[str, float]]:
        """How an ended episode ended, and its facts."""
        return self.taxonomy.judge(log.trace, log.length, success, broken, self.control_period_s)

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
        """The same in threads, where OpenGL may be used outside of the main one and draws on the CPU; a GPU
        is 7 to 18 times as fast with one context as with eight (notes/performance.md)."""
        one = self.make_renderer()
        if num_threads == 1 or gl_backend() not in ("egl", "osmesa") or not one.in_software:
            return one
        one.close()
        return ParallelRenderer(self.model, tuple(self.config.cameras), self.config.image_size, num_threads)

    def integration_state(self, data: mujoco.MjData) -> Array:
        """All that the next substep depends on, warm start included: (mj_stateSize,)."""
        state = np.empty(mujoco.mj_stateSize(self.model, INTEGRATION_STATE))
        mujoco.mj_getState(self.model, data, state, INTEGRATION_STATE)
        return state


def check_scene(config: EnvConfig) -> None:
    """Refuse settings that the scene cannot follow, such as a camera that it lacks, before anything large is loaded.

    Raises:
        ConfigError: naming what is missing.
    """
    PickScene(config)


class UnstableSimulationError(UserError, RuntimeError):
    """MuJoCo warned (bad numbers, full buffers): what it computed cannot be trusted."""

    def __init__(self, seed: int | None, length: int) -> None:
        super().__init__(
            f"the simulation of seed {seed} became unstable after control step {length}. "
            "Check masses, gains and timestep of the model; the shipped scene should never do this"
        )
