"""What every vector form shares: checked arguments, observations kept as arrays, episodes and restarts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import ArrayLike, NDArray

from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, NUM_JOINTS, Array
from so101_sim.config import EnvConfig
from so101_sim.episode import EXTRAS, ChunkScore, EpisodeLog
from so101_sim.renderer import ParallelRenderer, SceneRenderer
from so101_sim.scene import PickScene
from so101_sim.tasks.registry import taxonomy_of


class ObservationBuffer:
    """The current observations of N environments, written row by row and handed out as copies.

    Args:
        pixels: {camera: (N, h, w, 3) uint8} to write images to, such as shared memory or tensors; None allocates.
    """

    def __init__(self, config: EnvConfig, num_envs: int, pixels: dict[str, Any] | None = None) -> None:
        self._task = config.instruction
        self.pixels: dict[str, Any] = empty_pixels(config, num_envs) if pixels is None else pixels
        self.agent_pos = np.zeros((num_envs, NUM_JOINTS), dtype=np.float32)
        self.environment_state: NDArray[np.float32] | None = None
        if config.environment_state:
            self.environment_state = np.zeros((num_envs, len(ENVIRONMENT_STATE_NAMES)), dtype=np.float32)

    def write(self, rows: Sequence[int], observation: Observation) -> None:
        """Stores what the environments `rows` show."""
        chosen = list(rows)
        self.agent_pos[chosen] = observation["agent_pos"]
        for camera, images in observation.get("pixels", {}).items():
            self.pixels[camera][chosen] = images
        if self.environment_state is not None:
            self.environment_state[chosen] = observation["environment_state"]

    def read(self, rows: NDArray[np.int64] | slice = slice(None)) -> Observation:
        """A copy of the chosen rows as one batched observation."""
        observation: Observation = {
            "pixels": {camera: _copied(images[rows]) for camera, images in self.pixels.items()},
            "agent_pos": self.agent_pos[rows].copy(),
        }
        if self.environment_state is not None:
            observation["environment_state"] = self.environment_state[rows].copy()
        observation["task"] = [self._task] * len(observation["agent_pos"])
        return observation


def _copied(images: Any) -> Any:
    return images.clone() if hasattr(images, "clone") else images.copy()  # a tensor, which this package cannot name


def empty_pixels(config: EnvConfig, num_envs: int) -> dict[str, NDArray[np.uint8]]:
    """{camera: (N, h, w, 3) uint8}, empty without images."""
    shape = (num_envs, config.image_size, config.image_size, 3)
    return {camera: np.zeros(shape, dtype=np.uint8) for camera in config.cameras if config.render_images}


def blank_observation(config: EnvConfig) -> Observation:
    """What one environment of ``config`` would show, all zeros; loads no scene."""
    return ObservationBuffer(config, 1).read()


class SO101VectorEnv(ChunkVectorEnv):
    """N arms. Observations have `pixels` {camera: (N, h, w, 3)} (empty without images), `agent_pos` (N, 6) in the joint
    frame's units, `task`, and `environment_state` (N, S) if asked for. Actions are joint targets (N, n, 6) in the same
    units. Terminated: lifted. Use `make_vector_env`.

    A state is {"integration": (N, states), "rows": (N, R), "ended": (N,) bool, "episodes": N dicts},
    and may be taken from one form to another.
    """

    extras = EXTRAS

    def __init__(self, config: EnvConfig, num_envs: int) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: use at least 1")
        self.config, self.num_envs = config, num_envs
        self.taxonomy = taxonomy_of(config)
        # They are the task's, which is told from the configuration.
        self.outcomes = self.taxonomy.outcomes  # type: ignore[misc]
        self.facts = self.taxonomy.facts  # type: ignore[misc]
        self.start_facts = self.taxonomy.start_facts  # type: ignore[misc]

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


class InProcessVectorEnv(SO101VectorEnv):
    """What the forms in this process share: results, episodes, restarts. Subclasses hold and step the simulations.

    Args:
        buffers: where the current and the final observations are kept; None allocates.
    """

    def __init__(
        self,
        config: EnvConfig,
        num_envs: int,
        buffers: tuple[ObservationBuffer, ObservationBuffer] | None = None,
    ) -> None:
        super().__init__(config, num_envs)
        self.scene = PickScene(config)
        self._renderer: SceneRenderer | ParallelRenderer | None = None
        current, final = buffers or (ObservationBuffer(config, num_envs), ObservationBuffer(config, num_envs))
        self._current, self._final = current, final
        self._ended = np.zeros(num_envs, dtype=bool)
        self._started = False

    @abstractmethod
    def _start_episode(self, env: int, seed: int) -> None:
        """Puts one simulation at the start of the episode of `seed`."""

    @abstractmethod
    def _observe(self, envs: Sequence[int]) -> Observation:
        """What these environments, one at least, show of their current instants, without the task."""

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

    def step_chunk(self, actions: ArrayLike, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`."""
        self._check_started()
        values, following = self._check_actions(actions), None if next_seeds is None else self._check_seeds(next_seeds)
        live = np.flatnonzero(~self._ended)
        score = self._spread(self._advance(values[live], live), live, values.shape[1])
        episodes = [
            self._stats(env, success=bool(score.terminated[env]), broken=bool(score.broken[env]))
            for env in np.flatnonzero(score.terminated | score.truncated).tolist()
        ]
        final_indices = np.flatnonzero(score.truncated)
        self._observe_chunk_end(score, live, following)
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

    def _stats(self, env: int, success: bool, broken: bool) -> EpisodeStats:
        log = self._log(env)
        return log.stats(env, success, broken, *self.scene.judge(log, success, broken))

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`."""
        self._check_started()
        return self._simulation_state() | {
            "ended": self._ended.copy(),
            "episodes": [asdict(self._log(env)) for env in range(self.num_envs)],
        }

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`."""
        self._check_state(state)
        self._set_simulation_state(state)
        self._ended[:], self._started = state["ended"], True
        self._observe_current(range(self.num_envs))
        return self._current.read()

    @abstractmethod
    def _simulation_state(self) -> dict[str, Any]:
        """ "integration" and "rows" of a state."""

    @abstractmethod
    def _set_simulation_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state's simulations and episodes."""

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
            broken=rows([s.broken for s in scores], (), np.bool_),
            traces=rows([s.traces for s in scores], (self.taxonomy.trace_size,), np.float64),
        )

    def _observe_chunk_end(self, score: ChunkScore, live: NDArray[np.int64], next_seeds: Sequence[int] | None) -> None:
        """Renders what will be seen: last instants of truncated episodes, then the next one to decide on."""
        timed_out, ended = np.flatnonzero(score.truncated), np.flatnonzero(score.terminated | score.truncated)
        if len(timed_out):
            observation = self._observe(timed_out.tolist())
            self._final.write(timed_out.tolist(), observation)
            self._current.write(timed_out.tolist(), observation)
        if next_seeds is None:
            self._ended[ended] = True
            live = np.setdiff1d(live, timed_out)
        else:
            for env in ended.tolist():
                self._start_episode(env, next_seeds[env])
        self._observe_current(live.tolist())

    def _observe_current(self, envs: Sequence[int]) -> None:
        if len(envs):
            self._current.write(envs, self._observe(envs))

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        if self._renderer is not None:
            self._renderer.close()


def episode_generator(seed: int) -> np.random.Generator:
    """What the start of the episode of `seed` is drawn from, as gymnasium's `reset(seed=...)` makes it."""
    return seeding.np_random(seed)[0]
