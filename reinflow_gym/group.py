"""N environments in this process, one after the other. `vector` holds one of these, or one in each worker process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError
from reinflow.env import Array, ChunkResult, EpisodeStats, Observation
from reinflow_gym.config import GymConfig

if TYPE_CHECKING:
    import gymnasium

FPS = 30  # of an environment that tells no rate
WORKS = "what works is a flat Box observation and flat Box actions, such as Hopper-v5's"


@dataclass(frozen=True)
class Spaces:
    """Sizes and bounds of an environment."""

    state_dim: int
    low: NDArray[Any]  # (A,) of actions
    high: NDArray[Any]  # (A,)
    fps: int  # control steps a second

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.low)


def make_single(config: GymConfig) -> gymnasium.Env[Any, Any]:
    """One environment without a time limit of its own.

    Raises:
        ConfigError: unknown, in need of a package that is not installed, or not of flat boxes; in one line.
    """
    import gymnasium
    from gymnasium.spaces import Box

    try:
        with _quiet_compiler():
            env = gymnasium.make(config.env_id, max_episode_steps=-1, disable_env_checker=True)
    except ImportError as error:
        remedy = f"pip install {error.name}" if error.name else f"{error}"
        raise ConfigError(f"env_id={config.env_id} cannot be loaded: {remedy}") from error
    except gymnasium.error.Error as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"env_id={config.env_id} cannot be made ({reason}): {WORKS}") from error
    observed = env.observation_space
    if not (isinstance(observed, Box) and len(observed.shape) == 1) and observed.is_np_flattenable:
        flat = gymnasium.spaces.flatten_space(observed)
        if np.issubdtype(flat.dtype, np.floating):  # dictionaries of goal-conditioned tasks, stacked boxes
            env = gymnasium.wrappers.FlattenObservation(env)
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not np.issubdtype(space.dtype, np.floating):
            env.close()
            raise ConfigError(f"env_id={config.env_id} has {name} {space}: {WORKS}")
    return env


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """What MuJoCo's compiler has to say about Gymnasium's models is nothing that a user could mend."""
    try:
        import mujoco
    except ImportError:  # then no environment of MuJoCo's is made either
        yield
        return
    mujoco.set_mju_user_warning(lambda _: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def _is_mujoco(env: gymnasium.Env[Any, Any]) -> bool:
    if "mujoco" not in sys.modules:
        return False
    from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

    return isinstance(env.unwrapped, MujocoEnv)


def _breakdowns() -> list[int]:
    """Warnings after which MuJoCo has put a simulation back to its start by itself."""
    from mujoco import mjtWarning

    return [int(w) for w in (mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC)]


def spaces_of(env: gymnasium.Env[Any, Any]) -> Spaces:
    """Sizes and bounds of one environment."""
    states, actions = env.observation_space, env.action_space
    fps = env.metadata.get("render_fps") or FPS
    return Spaces(int(states.shape[0]), actions.low, actions.high, max(1, round(fps)))  # type: ignore[index,attr-defined]


@dataclass
class Episode:
    """What one environment is playing."""

    seed: int = 0
    return_: float = 0.0
    length: int = 0
    actions: list[NDArray[Any]] = field(default_factory=list)  # (n, A) each: all so far, for `get_state`
    ended: bool = False


class GymGroup:
    """N environments; the methods are those of ChunkVectorEnv, their arguments checked by who calls them.

    A state is the seeds and actions of the episodes so far, and going back to it plays them again: that is bit for bit
    what was, for every environment that depends on its seed and actions alone, whatever it keeps inside.
    """

    def __init__(self, config: GymConfig, num_envs: int) -> None:
        self.config, self.num_envs = config, num_envs
        self.envs = [make_single(config) for _ in range(num_envs)]
        self.spaces = spaces_of(self.envs[0])
        self.episodes = [Episode() for _ in range(num_envs)]
        self.seen = np.zeros((num_envs, self.spaces.state_dim))
        self._dtype = self.envs[0].action_space.dtype
        self._data = [getattr(env.unwrapped, "data", None) if _is_mujoco(env) else None for env in self.envs]
        self._breakdowns = _breakdowns() if self._data[0] is not None else []

    def get_spaces(self) -> Spaces:
        """Sizes and bounds."""
        return self.spaces

    def observe(self, rows: NDArray[np.int64] | slice = slice(None)) -> Observation:
        """What the environments show."""
        return {"environment_state": self.seen[rows].astype(np.float32)}

    def start(self, row: int, seed: int) -> None:
        """The beginning of the episode of ``seed``."""
        self.seen[row], _ = self.envs[row].reset(seed=seed)
        self.episodes[row] = Episode(seed)

    def reset(self, seeds: Sequence[int]) -> Observation:
        """See `ChunkVectorEnv.reset`."""
        for row, seed in enumerate(seeds):
            self.start(row, seed)
        return self.observe()

    def step_chunk(self, actions: Array, next_seeds: Sequence[int] | None) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`."""
        told = np.clip(actions, self.spaces.low, self.spaces.high).astype(self._dtype)
        rewards, active = np.zeros(told.shape[:2]), np.zeros(told.shape[:2], dtype=bool)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        finished: list[EpisodeStats] = []
        for row, episode in enumerate(self.episodes):
            if episode.ended:
                continue
            terminated[row], truncated[row], info, steps = self._play(row, told[row], rewards[row])
            active[row, :steps] = True
            broken = self._broken(row, rewards[row])
            if broken:
                terminated[row], truncated[row] = False, True
            if terminated[row] or truncated[row]:
                episode.ended = True
                finished.append(_stats(row, episode, info, bool(terminated[row]), broken))
        final_indices = np.flatnonzero(truncated)
        final = self.observe(final_indices) if len(final_indices) else None
        if next_seeds is not None:
            for row in np.flatnonzero(terminated | truncated).tolist():
                self.start(row, next_seeds[row])
        return ChunkResult(
            observation=self.observe(),
            rewards=rewards,
            reward_terms={"reward": rewards.copy()},
            active=active,
            terminated=terminated,
            truncated=truncated,
            final_indices=final_indices,
            final_observation=final,
            environment_states=None,
            episodes=finished,
        )

    def _play(self, row: int, told: NDArray[Any], rewards: Array) -> tuple[bool, bool, dict[str, Any], int]:
        """Run actions (n, A) until the episode ends; writes ``rewards`` (n,). Returns terminated, truncated, the last
        step's info, and how many were run."""
        episode, step, limit = self.episodes[row], self.envs[row].step, self.config.max_steps_per_episode
        left = limit - episode.length
        steps, terminated, truncated = 0, False, False
        info: dict[str, Any] = {}
        seen: Any = self.seen[row]
        while steps < len(told) and not (terminated or truncated):
            seen, rewards[steps], terminated, truncated, info = step(told[steps])
            steps += 1
            truncated = truncated or steps >= left
        self.seen[row] = seen
        episode.actions.append(told[:steps])
        episode.length += steps
        for reward in rewards[:steps].tolist():  # one after the other: the sum must not depend on the chunks
            episode.return_ += reward
        return bool(terminated), bool(truncated and not terminated), info, steps

    def _broken(self, row: int, rewards: Array) -> bool:
        """Whether the simulation broke down in this chunk."""
        if not (np.isfinite(self.seen[row]).all() and np.isfinite(rewards).all()):
            return True
        data = self._data[row]
        return data is not None and bool(data.warning.number[self._breakdowns].any())

    def get_state(self) -> list[dict[str, Any]]:
        """One dict an environment: seed, actions (L, A) so far, whether it ended, what it shows (S,)."""
        empty = np.zeros((0, self.spaces.action_dim), dtype=self._dtype)
        return [
            {
                "seed": episode.seed,
                "actions": np.concatenate([empty, *episode.actions]),
                "ended": episode.ended,
                "seen": self.seen[row].copy(),
            }
            for row, episode in enumerate(self.episodes)
        ]

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> tuple[Observation, list[int]]:
        """Play the episodes again. Returns what is seen, and the seeds of episodes that came out otherwise (another
        machine, another version): these stand at their beginning."""
        again = []
        for row, state in enumerate(states):
            self.start(row, int(state["seed"]))
            if state["ended"]:
                self.episodes[row].ended, self.seen[row] = True, state["seen"]
                continue
            told = np.asarray(state["actions"], dtype=self._dtype)
            terminated, truncated, _, steps = self._play(row, told, np.zeros(len(told)))
            same = steps == len(told) and np.array_equal(self.seen[row], state["seen"])
            if terminated or truncated or not same:
                self.start(row, int(state["seed"]))
                again.append(int(state["seed"]))
        return self.observe(), again

    def close(self) -> None:
        """Close all."""
        for env in self.envs:
            env.close()


def _stats(row: int, episode: Episode, info: Mapping[str, Any], terminated: bool, broken: bool) -> EpisodeStats:
    """Success is what the environment says of the last step; if it says nothing, that the episode lasted to its end."""
    told = info.get("is_success", info.get("success"))
    success = (not terminated if told is None else bool(told)) and not broken
    terms = {"reward": episode.return_}
    return EpisodeStats(row, episode.seed, episode.return_, episode.length, success, terms, broken=broken)
