"""Several pick-up environments behind one interface: a chunk of control steps per call, images once per chunk.

`make_vector_env` offers three forms that give the same numbers to the last bit for the same seeds and actions:

* sequential: N `SO101PickEnv` in this process, one after the other;
* subproc: the same in worker processes (so101_vector_workers.py), one message per chunk, images in shared memory;
* batched: one `mujoco.batch.Batch`, whose threads run the whole chunk of all environments in one call.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import mujoco
import numpy as np
from gymnasium.utils import seeding
from mujoco.batch import Batch
from numpy.typing import ArrayLike, NDArray

from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, NUM_JOINTS, Array
from so101_renderer import ParallelRenderer, SceneRenderer
from so101_scene import (
    INTEGRATION_STATE,
    ChunkScore,
    EnvConfig,
    EpisodeLog,
    EpisodeStats,
    PickScene,
    UnstableSimulationError,
)

Observation = dict[str, Any]
MAX_RENDER_THREADS = 8
BACKENDS = ("auto", "sequential", "subproc", "batched")


@dataclass(frozen=True)
class ChunkResult:
    """One chunk of n control steps in N environments. S: length of the privileged state.

    The observation is the one to decide on next: an environment whose episode ended shows its next episode if autoreset
    is on, and its last instant otherwise.
    """

    observation: Observation
    rewards: Array  # (N, n), 0 after the end of the episode
    reward_terms: dict[str, Array]  # (N, n) each; they add up to rewards
    active: NDArray[np.bool_]  # (N, n) executed steps of the episode, its last one included
    terminated: NDArray[np.bool_]  # (N,) lifted in this chunk
    truncated: NDArray[np.bool_]  # (N,) time limit reached in this chunk without a lift; never both
    final_indices: NDArray[np.int64]  # (M,) the truncated environments
    final_observation: Observation | None  # (M rows) their last instant, before any reset; None if M == 0
    environment_states: NDArray[np.float32] | None  # (N, n, S) after each active step, 0 elsewhere; if asked for
    episodes: list[EpisodeStats]  # of the episodes that ended in this chunk, by environment


class ObservationBuffer:
    """The current observations of N environments, written row by row and handed out as copies.

    Args:
        pixels: {camera: (N, h, w, 3) uint8} to write images to, such as shared memory; None allocates.
    """

    def __init__(self, config: EnvConfig, num_envs: int, pixels: dict[str, NDArray[np.uint8]] | None = None) -> None:
        self._task = config.instruction
        self.pixels = empty_pixels(config, num_envs) if pixels is None else pixels
        self.agent_pos = np.zeros((num_envs, NUM_JOINTS), dtype=np.float32)
        self.environment_state: NDArray[np.float32] | None = None
        if config.environment_state:
            self.environment_state = np.zeros((num_envs, len(ENVIRONMENT_STATE_NAMES)), dtype=np.float32)

    def write(self, row: int, observation: Mapping[str, Any]) -> None:
        """Stores the observation of one `SO101PickEnv`."""
        self.agent_pos[row] = observation["agent_pos"]
        for camera, image in observation.get("pixels", {}).items():
            self.pixels[camera][row] = image
        if self.environment_state is not None:
            self.environment_state[row] = observation["environment_state"]

    def read(self, rows: NDArray[np.int64] | slice = slice(None)) -> Observation:
        """A copy of the chosen rows as one batched observation."""
        observation: Observation = {
            "pixels": {camera: images[rows].copy() for camera, images in self.pixels.items()},
            "agent_pos": self.agent_pos[rows].copy(),
        }
        if self.environment_state is not None:
            observation["environment_state"] = self.environment_state[rows].copy()
        observation["task"] = [self._task] * len(observation["agent_pos"])
        return observation


def empty_pixels(config: EnvConfig, num_envs: int) -> dict[str, NDArray[np.uint8]]:
    """{camera: (N, h, w, 3) uint8}, empty without images."""
    shape = (num_envs, config.image_size, config.image_size, 3)
    return {camera: np.zeros(shape, dtype=np.uint8) for camera in config.cameras if config.render_images}


class ChunkVectorEnv(ABC):
    """N environments that run whole chunks. Use `make_vector_env`; close it, or use it in a `with`."""

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: use at least 1")
        self.config, self.num_envs = config, num_envs

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> Observation:
        """Starts an episode in every environment, each with its own generator from its seed.

        Returns:
            {"pixels": {camera: (N, h, w, 3) uint8}, "agent_pos": (N, 6) float32 in the joint frame's units,
            "environment_state": (N, S) float32 if asked for, "task": list of N}.

        Raises:
            ValueError: not one seed per environment.
        """

    @abstractmethod
    def step_chunk(self, actions: ArrayLike) -> ChunkResult:
        """Runs the targets (N, n, 6), in the joint frame's units, one control step each.

        Raises:
            ValueError: wrong shape, NaN or infinity.
            RuntimeError: before the first reset.
        """

    @abstractmethod
    def get_state(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, in this or another form: numpy arrays and JSON-able values.

        {"integration": (N, states), "rows": (N, R), "ended": (N,) bool, "rngs": N dicts, "episodes": N dicts}.
        """

    @abstractmethod
    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """Goes back to a `get_state`; returns the observation to decide on. Raises ValueError on another N or model."""

    @abstractmethod
    def close(self) -> None:
        """Frees renderers and processes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_seeds(self, seeds: Sequence[int]) -> list[int]:
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each")
        return [int(seed) for seed in seeds]

    def _check_actions(self, actions: ArrayLike) -> Array:
        array = np.asarray(actions, dtype=np.float64)
        if array.ndim != 3 or array.shape[0] != self.num_envs or array.shape[1] < 1 or array.shape[2] != NUM_JOINTS:
            raise ValueError(f"actions have shape ({self.num_envs}, n, {NUM_JOINTS}) with n >= 1, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("actions contain NaN or infinity: the policy has diverged, or its normalisation is wrong")
        return array

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if len(state["rows"]) != self.num_envs:
            raise ValueError(f"the state holds {len(state['rows'])} environments, this one has {self.num_envs}")


class InProcessVectorEnv(ChunkVectorEnv):
    """What the forms in this process share: results, episodes, autoreset. Subclasses hold and step the simulations.

    Args:
        buffers: where the current and the final observations are kept; None allocates.
    """

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        autoreset: bool = True,
        buffers: tuple[ObservationBuffer, ObservationBuffer] | None = None,
    ) -> None:
        super().__init__(config, num_envs)
        self.autoreset = autoreset
        self.scene = PickScene(config)
        self._renderer: SceneRenderer | ParallelRenderer | None = None
        current, final = buffers or (ObservationBuffer(config, num_envs), ObservationBuffer(config, num_envs))
        self._current, self._final = current, final
        self._ended = np.zeros(num_envs, dtype=bool)
        self._started = False

    @abstractmethod
    def _start_episode(self, env: int, seed: int | None) -> None:
        """Resets one simulation; without a seed its generator goes on."""

    @abstractmethod
    def _observe(self, envs: Sequence[int]) -> list[Observation]:
        """The observations of these environments' current instants."""

    @abstractmethod
    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        """Runs actions (L, n, 6) in the environments `live` (L,); scores whose rows, in order, are theirs."""

    @abstractmethod
    def _log(self, env: int) -> EpisodeLog:
        """The record of one environment's current episode."""

    def reset(self, seeds: Sequence[int]) -> Observation:
        """See `ChunkVectorEnv.reset`."""
        for env, seed in enumerate(self._check_seeds(seeds)):
            self._start_episode(env, seed)
        self._observe_current(range(self.num_envs))
        self._ended[:] = False
        self._started = True
        return self._current.read()

    def step_chunk(self, actions: ArrayLike) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`."""
        self._check_started()
        values = self._check_actions(actions)
        live = np.flatnonzero(~self._ended)
        score = self._spread(self._advance(values[live], live), live, values.shape[1])
        episodes = [
            self._log(env).stats(env, success=bool(score.terminated[env]))
            for env in np.flatnonzero(score.terminated | score.truncated).tolist()
        ]
        final_indices = np.flatnonzero(score.truncated)
        self._observe_chunk_end(score, live)
        return ChunkResult(
            observation=self._current.read(),
            rewards=score.rewards,
            reward_terms=score.terms,
            active=score.active,
            terminated=score.terminated,
            truncated=score.truncated,
            final_indices=final_indices,
            final_observation=self._final.read(final_indices) if len(final_indices) else None,
            environment_states=score.environment_states,
            episodes=episodes,
        )

    def _check_started(self) -> None:
        if not self._started:
            raise RuntimeError("call reset(seeds) before anything else")

    def _spread(self, scores: list[ChunkScore], live: NDArray[np.int64], n: int) -> ChunkScore:
        """Scores of the live environments -> one score of all N, zeros for those that had ended before."""

        def rows(values: list[NDArray[Any]], shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
            full = np.zeros((self.num_envs, *shape), dtype=dtype)
            if values:
                full[live] = np.concatenate(values)
            return full

        states = None
        if self.config.environment_state:
            shape = (n, len(ENVIRONMENT_STATE_NAMES))
            states = rows([s.environment_states for s in scores if s.environment_states is not None], shape, np.float32)
        return ChunkScore(
            rewards=rows([s.rewards for s in scores], (n,), np.float64),
            terms={name: rows([s.terms[name] for s in scores], (n,), np.float64) for name in self.scene.term_names},
            active=rows([s.active for s in scores], (n,), np.bool_),
            terminated=rows([s.terminated for s in scores], (), np.bool_),
            truncated=rows([s.truncated for s in scores], (), np.bool_),
            lengths=rows([s.lengths for s in scores], (), np.int64),
            heights=rows([s.heights for s in scores], (n,), np.float64),
            clipped=rows([s.clipped for s in scores], (n,), np.int64),
            environment_states=states,
        )

    def _observe_chunk_end(self, score: ChunkScore, live: NDArray[np.int64]) -> None:
        """Renders what will be seen: last instants of truncated episodes, then the next one to decide on."""
        timed_out, ended = np.flatnonzero(score.truncated), np.flatnonzero(score.terminated | score.truncated)
        for env, observation in zip(timed_out.tolist(), self._observe(timed_out.tolist()), strict=True):
            self._final.write(env, observation)
            self._current.write(env, observation)
        for env in ended.tolist() if self.autoreset else []:
            self._start_episode(env, None)
        self._ended[ended] = not self.autoreset
        self._observe_current((live if self.autoreset else np.setdiff1d(live, timed_out)).tolist())

    def _observe_current(self, envs: Sequence[int]) -> None:
        for env, observation in zip(envs, self._observe(envs), strict=True):
            self._current.write(env, observation)

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        if self._renderer is not None:
            self._renderer.close()


class SequentialVectorEnv(InProcessVectorEnv):
    """N `SO101PickEnv` that share a scene and a renderer."""

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        autoreset: bool = True,
        buffers: tuple[ObservationBuffer, ObservationBuffer] | None = None,
    ) -> None:
        super().__init__(config, num_envs, autoreset, buffers)
        self._renderer = renderer = self.scene.make_renderer() if config.render_images else None
        self.envs = [SO101PickEnv(config, scene=self.scene, renderer=renderer) for _ in range(num_envs)]

    def _start_episode(self, env: int, seed: int | None) -> None:
        self.envs[env].start_episode(seed)

    def _observe(self, envs: Sequence[int]) -> list[Observation]:
        return [self.envs[env].observation() for env in envs]

    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        return [self.envs[env].advance(chunk) for env, chunk in zip(live.tolist(), actions, strict=True)]

    def _log(self, env: int) -> EpisodeLog:
        return self.envs[env].episode

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`."""
        self._check_started()
        states = [env.get_state() for env in self.envs]
        return {
            "integration": np.stack([state["integration"] for state in states]),
            "rows": np.stack([state["row"] for state in states]),
            "ended": self._ended.copy(),
            "rngs": [state["rng"] for state in states],
            "episodes": [state["episode"] for state in states],
        }

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`."""
        self._check_state(state)
        for row, env in enumerate(self.envs):
            single = {name: state[name][row] for name in ("integration", "ended")}
            single |= {"row": state["rows"][row], "rng": state["rngs"][row], "episode": state["episodes"][row]}
            self._current.write(row, env.set_state(single))
        self._ended[:], self._started = state["ended"], True
        return self._current.read()


class BatchedVectorEnv(InProcessVectorEnv):
    """All environments in one `mujoco.batch.Batch`: a chunk is one call, spread over threads.

    Args:
        num_threads: of physics and rendering; None uses every core, but no more than there are environments.
    """

    def __init__(
        self, config: EnvConfig, num_envs: int, autoreset: bool = True, num_threads: int | None = None
    ) -> None:
        super().__init__(config, num_envs, autoreset)
        num_threads = num_threads or min(num_envs, os.cpu_count() or 1)
        self._batch = Batch(self.scene.model, num_envs, nthread=num_threads)
        self._data = mujoco.MjData(self.scene.model)
        self._integration = np.zeros((num_envs, mujoco.mj_stateSize(self.scene.model, INTEGRATION_STATE)))
        self._rows = np.zeros((num_envs, self.scene.layout.row_size))
        self._rngs = [np.random.default_rng()] * num_envs
        self._logs = [EpisodeLog() for _ in range(num_envs)]
        if config.render_images:
            self._renderer = self.scene.make_parallel_renderer(min(num_threads, MAX_RENDER_THREADS))

    def _start_episode(self, env: int, seed: int | None) -> None:
        if seed is not None:
            self._rngs[env] = seeding.np_random(seed)[0]
        self.scene.reset(self._data, self._rngs[env])
        self._integration[env] = self.scene.integration_state(self._data)
        self._rows[env] = self.scene.layout.row(self._data)
        self._logs[env].begin_after(seed, self.scene.block_height(self._rows[env]))

    def _observe(self, envs: Sequence[int]) -> list[Observation]:
        rows = self._rows[list(envs)]
        seen: dict[str, Sequence[Any] | NDArray[Any]] = {"agent_pos": self.scene.agent_pos(rows)}
        if self._renderer is not None:
            seen["pixels"] = self._renderer.render_all(rows[:, : self.scene.model.nq])
        if self.config.environment_state:
            seen["environment_state"] = self.scene.environment_state(rows, [self._logs[env].length for env in envs])
        return [dict(zip(seen, values, strict=True)) for values in zip(*seen.values(), strict=True)]

    def _advance(self, actions: Array, live: NDArray[np.int64]) -> list[ChunkScore]:
        if not len(live):
            return []
        control, clipped = self.scene.control(actions)
        rows, integration = self._rollout(control, live)
        steps = np.array([self._logs[env].length for env in live])
        score = self.scene.score(self._rows[live], rows, steps, clipped)
        order, last = np.arange(len(live)), score.lengths - 1
        time_before = self._integration[live, 0]
        self._rows[live], self._integration[live] = rows[order, last], integration[order, last]
        # The batch stops a simulation that warns, and its clock with it.
        expected = time_before + score.lengths * self.scene.control_period_s
        stuck = np.abs(self._integration[live, 0] - expected) > 0.5 * self.scene.model.opt.timestep
        for row, env in enumerate(live.tolist()):
            if stuck[row]:
                raise UnstableSimulationError(env, self._logs[env].seed, self._logs[env].length)
            self._logs[env].record(score, row)
        return [score]

    def _rollout(self, control: Array, live: NDArray[np.int64]) -> tuple[Array, Array]:
        """Controls (L, n, nu) -> rows (L, n, R) and integration states (L, n, states) after each control step."""
        substeps = self.config.steps_per_action
        self._batch.state[live] = self._integration[live]
        recorded = self._batch.rollout(
            control.shape[1] * substeps,
            np.repeat(control, substeps, axis=1),
            record=("qpos", "qvel", "sensordata", int(INTEGRATION_STATE)),
            ids=live,
        )
        at = slice(substeps - 1, None, substeps)
        rows = np.concatenate([recorded[name][:, at] for name in ("qpos", "qvel", "sensordata")], axis=-1)
        return rows, recorded[int(INTEGRATION_STATE)][:, at]

    def _log(self, env: int) -> EpisodeLog:
        return self._logs[env]

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`."""
        self._check_started()
        return {
            "integration": self._integration.copy(),
            "rows": self._rows.copy(),
            "ended": self._ended.copy(),
            "rngs": [rng.bit_generator.state for rng in self._rngs],
            "episodes": [asdict(log) for log in self._logs],
        }

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`."""
        self._check_state(state)
        integration = np.array(state["integration"], dtype=np.float64)
        if integration.shape != self._integration.shape:
            raise ValueError(f"state is {integration.shape}, this scene's {self._integration.shape}: another model?")
        self._integration[:], self._rows[:] = integration, state["rows"]
        self._ended[:], self._started = state["ended"], True
        self._rngs = [restored_generator(rng) for rng in state["rngs"]]
        self._logs = [EpisodeLog.restored(episode) for episode in state["episodes"]]
        self._observe_current(range(self.num_envs))
        return self._current.read()


def restored_generator(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator that goes on from `bit_generator.state`."""
    rng = seeding.np_random(0)[0]
    rng.bit_generator.state = dict(state)
    return rng


def make_vector_env(
    config: EnvConfig,
    num_envs: int,
    backend: str = "auto",
    autoreset: bool = True,
    num_threads: int | None = None,
) -> ChunkVectorEnv:
    """N environments of one configuration.

    Args:
        backend: "sequential", "subproc", "batched", or "auto": sequential for one environment, batched for more.
        autoreset: start the next episode, drawn from the environment's own generator, when one ends. Off: an ended
            environment is neither simulated nor rendered until `reset`.
        num_threads: threads of the batched form, worker processes of the subproc form; None is one per core.

    Raises:
        ValueError: unknown backend, num_envs below 1.
        RenderError: images are asked for and OpenGL cannot start.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        backend = "sequential" if num_envs == 1 else "batched"
    if backend == "sequential":
        return SequentialVectorEnv(config, num_envs, autoreset)
    if backend == "batched":
        return BatchedVectorEnv(config, num_envs, autoreset, num_threads)
    from so101_vector_workers import SubprocVectorEnv

    return SubprocVectorEnv(config, num_envs, autoreset, num_threads)
