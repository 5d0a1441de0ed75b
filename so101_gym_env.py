"""`SO101PickEnv`: the pick-up task as a gymnasium environment whose unit of work is a chunk of control steps.

One control step is `steps_per_action` physics substeps of 2 ms: 50 Hz, or what `control_hz` says. `step_chunk` runs
several control steps open loop and renders once, at their end; `step` is a chunk of one. Many arms at once:
so101_sim/vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, Array
from so101_sim.config import EnvConfig
from so101_sim.episode import EpisodeLog
from so101_sim.scene import PickScene, UnstableSimulationError
from so101_sim.simulation import Simulation

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
        overrides: fields of `EnvConfig`, for `gymnasium.make("so101/SO101Pick-v0", randomize_block=True)`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012, gymnasium's own form

    def __init__(
        self,
        config: EnvConfig | None = None,
        render_mode: str | None = None,
        **overrides: Any,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode is {render_mode!r}: use None or 'rgb_array'")
        self.config = replace(config or EnvConfig(), **overrides)
        self.scene = PickScene(self.config)
        self.simulation = Simulation(self.scene)
        self.render_mode = render_mode
        self.metadata = {**type(self).metadata, "render_fps": round(1.0 / self.scene.control_period_s)}
        self.task = self.task_description = self.config.instruction
        self._max_episode_steps = self.config.max_steps_per_episode
        self.action_space, self.observation_space = make_spaces(self.scene)

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model."""
        return self.simulation.model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's state."""
        return self.simulation.data

    @property
    def row(self) -> Array:
        """(R,) the last recorded instant, see `SceneLayout`. Raises ResetNeeded before the first reset."""
        return self.simulation.row

    @property
    def episode(self) -> EpisodeLog:
        """The record of the current episode."""
        return self.simulation.episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; without a seed the environment's own generator goes on. Options: see `PickScene.reset`."""
        super().reset(seed=seed)
        self.simulation.start_episode(self.np_random, seed, options)
        height = self.scene.block_height(self.row)
        return self.simulation.observation(), {"is_success": False, "block_height_m": height}

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
            UnstableSimulationError: the physics broke down; the episode is over.
        """
        score = self.simulation.advance(actions)
        if score.broken[0]:
            raise UnstableSimulationError(self.simulation.episode.seed, self.simulation.episode.length)
        terminated, truncated = bool(score.terminated[0]), bool(score.truncated[0])
        info = {
            "is_success": terminated,
            "block_height_m": self.scene.block_height(self.row),
            "clipped_targets": int(np.count_nonzero(score.clipped[0, : score.lengths[0]])),
            "reward_terms": {name: values[0] for name, values in score.terms.items()},
            "active": score.active[0],
        }
        return self.simulation.observation(), score.rewards[0], terminated, truncated, info

    def render(self) -> NDArray[np.uint8] | None:
        """All cameras side by side (h, cameras * w, 3) uint8; None without render_mode="rgb_array"."""
        if self.render_mode != "rgb_array":
            return None
        return np.concatenate(list(self.simulation.images().values()), axis=1)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: numpy arrays and JSON-able values."""
        return self.simulation.get_state() | {"rng": self.np_random.bit_generator.state}

    def set_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Goes back to a `get_state`, of this or another environment with the same scene; returns the observation."""
        self.simulation.set_state(state)
        self._np_random = seeding.np_random(0)[0]
        self._np_random.bit_generator.state = state["rng"]
        return self.simulation.observation()

    def close(self) -> None:
        """Frees the renderer and closes the viewer."""
        self.simulation.close()


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
