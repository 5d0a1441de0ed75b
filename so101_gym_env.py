"""`SO101PickEnv`: the pick-up task as a gymnasium environment whose unit of work is a chunk of control steps.

One control step is `steps_per_action` physics substeps of 2 ms (50 Hz by default). `step_chunk` runs several control
steps open loop and renders once, at their end; `step` is a chunk of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, NUM_JOINTS, Array
from so101_renderer import RenderError, SceneRenderer
from so101_scene import (
    INTEGRATION_STATE,
    ChunkScore,
    EnvConfig,
    EpisodeLog,
    PickScene,
    UnstableSimulationError,
)

__all__ = ["EnvConfig", "SO101PickEnv", "make_spaces"]

OBSERVED_LIMIT_MARGIN_RAD = 0.2  # joint limits are soft: a pressed joint is observed a little outside


class SO101PickEnv(gymnasium.Env[dict[str, Any], Any]):
    """An SO-101 arm picks up a red block.

    Observation: `agent_pos` (6,) float32 in the joint frame's units, `pixels` {camera: (h, w, 3) uint8} unless
    `render_images` is off, and `environment_state` (S,) float32 if asked for. Action: absolute joint targets (6,) in
    the same units; targets outside the limits are clipped and counted. Terminated: lifted (`info["is_success"]`).
    Truncated: `max_steps_per_episode` control steps.

    Args:
        config: None for the defaults.
        render_mode: None or "rgb_array".
        renderer: one to share between environments of the same scene; None makes one at the first image.
        overrides: fields of `EnvConfig`, for `gymnasium.make("so101/SO101Pick-v0", randomize_block=True)`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012, gymnasium's own form

    def __init__(
        self,
        config: EnvConfig | None = None,
        render_mode: str | None = None,
        *,
        scene: PickScene | None = None,
        renderer: SceneRenderer | None = None,
        **overrides: Any,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}: use None or 'rgb_array'")
        self.config = replace(config or EnvConfig(), **overrides)
        self.scene = scene or PickScene(self.config)
        self.model, self.data = self.scene.model, mujoco.MjData(self.scene.model)
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": round(1.0 / self.scene.control_period_s)}
        self.task = self.task_description = self.config.instruction
        self._max_episode_steps = self.config.max_steps_per_episode
        self.action_space, self.observation_space = make_spaces(self.scene)
        self.episode = EpisodeLog()
        self._row: Array | None = None
        self._ended = True
        self._renderer, self._owns_renderer = renderer, renderer is None
        self._viewer: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; without a seed the environment's own generator goes on. Options: see `PickScene.reset`."""
        super().reset(seed=seed)
        self.start_episode(seed, options)
        return self.observation(), {"is_success": False, "block_height_m": self.scene.block_height(self.row)}

    def start_episode(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """`reset` without the observation, for callers that render later."""
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)
        self.scene.reset(self.data, self.np_random, options)
        self._row, self._ended = self.scene.layout.row(self.data), False
        self.episode.begin_after(seed, self.scene.block_height(self._row))

    @property
    def row(self) -> Array:
        """(R,) the last recorded instant, see `SceneLayout`. Raises ResetNeeded before the first reset."""
        if self._row is None:
            raise gymnasium.error.ResetNeeded("call reset() before anything else")
        return self._row

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step with the target `action` (6,). Raises ValueError on NaN, ResetNeeded after the end."""
        observation, rewards, terminated, truncated, info = self.step_chunk(np.asarray(action)[None])
        info["reward_terms"] = {name: float(values[0]) for name, values in info["reward_terms"].items()}
        del info["active"]
        return observation, float(rewards[0]), terminated, truncated, info

    def step_chunk(self, actions: ArrayLike) -> tuple[dict[str, Any], Array, bool, bool, dict[str, Any]]:
        """Runs the targets (n, 6) one control step each, stops where the episode ends, and renders once.

        Returns:
            The observation after the last executed step; rewards (n,), 0 after the end; terminated; truncated; and info
            with `is_success`, `block_height_m`, `clipped_targets` (executed steps with a clipped target),
            `reward_terms` {name: (n,)} and `active` (n,) bool, the executed steps.

        Raises:
            ValueError: wrong shape, NaN or infinity.
            gymnasium.error.ResetNeeded: the episode has ended.
        """
        score = self.advance(actions)
        terminated, truncated = bool(score.terminated[0]), bool(score.truncated[0])
        info = {
            "is_success": terminated,
            "block_height_m": self.scene.block_height(self.row),
            "clipped_targets": int(np.count_nonzero(score.clipped[0, : score.lengths[0]])),
            "reward_terms": {name: values[0] for name, values in score.terms.items()},
            "active": score.active[0],
        }
        return self.observation(), score.rewards[0], terminated, truncated, info

    def advance(self, actions: ArrayLike) -> ChunkScore:
        """`step_chunk` without the observation: the score of the chunk, N = 1."""
        if self._ended:
            raise gymnasium.error.ResetNeeded("the episode has ended: call reset()")
        if np.ndim(actions) != 2 or len(np.asarray(actions)) == 0:
            raise ValueError(f"a chunk of actions has shape (n, {NUM_JOINTS}) with n >= 1, got {np.shape(actions)}")
        control, clipped = self.scene.control(actions)
        before = self.row
        rows = self._simulate(control)
        score = self.scene.score(before[None], rows[None], np.array([self.episode.length]), clipped[None])
        self._row = rows[score.lengths[0] - 1]
        self._ended = bool(score.terminated[0] or score.truncated[0])
        self.episode.record(score, 0)
        return score

    def _simulate(self, control: Array) -> Array:
        """Controls (n, nu) -> rows (n, R); stops where the episode ends and repeats its last row from there."""
        rows = np.empty((len(control), self.scene.layout.row_size))
        left = self.config.max_steps_per_episode - self.episode.length
        warnings = self.data.warning.number.sum()
        last = 0
        for last in range(min(len(control), left)):
            self.data.ctrl[:] = control[last]
            mujoco.mj_step(self.model, self.data, nstep=self.config.steps_per_action)
            rows[last] = self.scene.layout.row(self.data)
            if self._viewer is not None:
                self._viewer.sync()
            if self.scene.is_success(rows[last]):
                break
        if self.data.warning.number.sum() > warnings:
            raise UnstableSimulationError(0, self.episode.seed, self.episode.length + last)
        rows[last + 1 :] = rows[last]
        return rows

    def observation(self) -> dict[str, Any]:
        """The observation of the current instant, in fresh arrays."""
        observation: dict[str, Any] = {"agent_pos": self.scene.agent_pos(self.row)}
        if self.config.render_images:
            observation["pixels"] = self._images()
        if self.config.environment_state:
            observation["environment_state"] = self.scene.environment_state(self.row, self.episode.length)
        return observation

    def _images(self) -> dict[str, NDArray[np.uint8]]:
        if self._renderer is None:
            self._renderer = self.scene.make_renderer()
        return self._renderer.render(self.row[: self.model.nq])

    def render(self) -> NDArray[np.uint8] | None:
        """All cameras side by side (h, cameras * w, 3) uint8; None without render_mode="rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return np.concatenate(list(self._images().values()), axis=1)

    def open_viewer(self) -> None:
        """Show the simulation in MuJoCo's window from now on, a frame per control step.

        Raises:
            RenderError: there is no display.
        """
        import glfw
        import mujoco.viewer

        # Asked first: the viewer itself ends the process when there is no display.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not glfw.init():
                raise RenderError("the viewer cannot open a window: run on a machine with a display, or without render")
        self._viewer = mujoco.viewer.launch_passive(self.model, self.data)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: numpy arrays and JSON-able values."""
        return {
            "integration": self.scene.integration_state(self.data),
            "row": self.row.copy(),
            "ended": self._ended,
            "rng": self.np_random.bit_generator.state,
            "episode": asdict(self.episode),
        }

    def set_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Goes back to a `get_state`, of this or another environment with the same scene; returns the observation."""
        integration = np.asarray(state["integration"], dtype=np.float64)
        expected = mujoco.mj_stateSize(self.model, INTEGRATION_STATE)
        if integration.shape != (expected,):
            raise ValueError(f"state has {integration.shape}, this scene needs ({expected},): another model?")
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, integration, INTEGRATION_STATE)
        self._row, self._ended = np.array(state["row"], dtype=np.float64), bool(state["ended"])
        self._np_random = seeding.np_random(0)[0]
        self._np_random.bit_generator.state = state["rng"]
        self.episode = EpisodeLog.restored(state["episode"])
        return self.observation()

    def close(self) -> None:
        """Frees the renderer, unless it is shared, and closes the viewer."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        if self._renderer is not None and self._owns_renderer:
            self._renderer.close()
            self._renderer = None


def make_spaces(scene: PickScene) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Dict]:
    """Action and observation space of one environment, in the units of the scene's joint frame."""
    config, limits = scene.config, scene.limits_rad
    low, high = (scene.frame.from_rad(limits[:, side]).astype(np.float32) for side in (0, 1))
    margin = np.array([-OBSERVED_LIMIT_MARGIN_RAD, OBSERVED_LIMIT_MARGIN_RAD])
    seen_low, seen_high = (scene.frame.from_rad(limits[:, side] + margin[side]).astype(np.float32) for side in (0, 1))
    spaces: dict[str, gymnasium.Space[Any]] = {"agent_pos": gymnasium.spaces.Box(seen_low, seen_high, dtype=np.float32)}
    if config.render_images:
        image = gymnasium.spaces.Box(0, 255, (config.image_size, config.image_size, 3), dtype=np.uint8)
        spaces["pixels"] = gymnasium.spaces.Dict({camera: image for camera in config.cameras})
    if config.environment_state:
        spaces["environment_state"] = gymnasium.spaces.Box(-1e3, 1e3, (len(ENVIRONMENT_STATE_NAMES),), np.float32)
    return gymnasium.spaces.Box(low, high, dtype=np.float32), gymnasium.spaces.Dict(spaces)


gymnasium.register(id="so101/SO101Pick-v0", entry_point="so101_gym_env:SO101PickEnv")
