"""Gymnasium environments that run whole chunks of actions, in worker processes or in this one.

    with make_gym_env(GymConfig("Hopper-v5"), num_envs=16) as env:
        observation = env.reset(range(16))
        result = env.step_chunk(actions, next_seeds)  # (16, n, A)

A chunk costs one message a worker, where `gymnasium.vector` sends one a step and environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from reinflow import ConfigError
from reinflow.env import Array, ChunkResult, ChunkVectorEnv, Observation, usable_cores
from reinflow_gym.config import GymConfig
from reinflow_gym.group import GymGroup, Spaces
from reinflow_gym.workers import WorkerPool


def make_gym_env(config: GymConfig, num_envs: int, num_workers: int | None = None) -> ChunkVectorEnv:
    """N environments of one configuration; see `GymVectorEnv`."""
    return GymVectorEnv(config, num_envs, num_workers)


class GymVectorEnv(ChunkVectorEnv):
    """N environments of one Gymnasium id, in contiguous groups. What is played does not depend on the number of groups.

    Observations are `environment_state` (N, S), the environment's own observation. Actions (N, n, A) are clipped to the
    environment's Box. Success is `is_success` or `success` in the last step's info where the environment tells it, and
    else that the episode was not terminated: it was still standing at the time limit. A broken simulation (NaN, or a
    MuJoCo that started again by itself) truncates its episode and marks it broken.

    A state is {"episodes": N of {"seed": int, "actions": (L, A), "ended": bool, "seen": (S,)}}: `set_state` plays the
    episodes again, which is bit for bit the same for every environment that depends on its seed and actions alone. One
    that comes out otherwise, as on a machine that rounds in another way, starts again from its seed, and that is said.

    Args:
        config: which environment.
        num_envs: N.
        num_workers: processes; 0 steps in this one. None: one per core and no more than there are environments, and
            none for a single environment.

    Raises:
        ConfigError: there is no such environment, or it is not of flat boxes.
        RuntimeError: an environment failed, now or in a later call; its traceback is in the message.
        WorkerError: a worker was killed or stopped.
    """

    objective = "return"

    def __init__(self, config: GymConfig, num_envs: int, num_workers: int | None = None) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: use at least 1")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}: use 0 for none, or as many as there are cores")
        self.config, self.num_envs, self._started = config, num_envs, False
        if num_workers is None:
            num_workers = 0 if num_envs == 1 else usable_cores()
        self._pool: WorkerPool | None = None
        self._group: GymGroup | None = None
        self._rows = [part.tolist() for part in np.array_split(np.arange(num_envs), min(num_envs, num_workers) or 1)]
        if num_workers:
            names = [f"environments {rows[0]} to {rows[-1]}" for rows in self._rows]
            made = [(config, len(rows)) for rows in self._rows]
            self._pool = WorkerPool("reinflow_gym.group:GymGroup", made, names)
        else:
            self._group = GymGroup(config, num_envs)
        self.spaces: Spaces = self._call("get_spaces", [()] * len(self._rows))[0]

    @property
    def state_dim(self) -> int:
        """S."""
        return self.spaces.state_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return self.spaces.action_dim

    @property
    def fps(self) -> int:
        """Control steps a second."""
        return self.spaces.fps

    @property
    def worker_pids(self) -> list[int]:
        """Of the worker processes; none where all is in this one."""
        return self._pool.pids if self._pool else []

    def reset(self, seeds: Sequence[int]) -> Observation:
        """See `ChunkVectorEnv.reset`."""
        checked = self._check_seeds(seeds)
        parts = self._call("reset", [([checked[row] for row in rows],) for rows in self._rows])
        self._started = True
        return _concatenate(parts)

    def step_chunk(self, actions: ArrayLike, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        """See `ChunkVectorEnv.step_chunk`."""
        self._check_started()
        values, following = self._check_actions(actions), None if next_seeds is None else self._check_seeds(next_seeds)
        told = [
            (values[rows[0] : rows[-1] + 1], None if following is None else following[rows[0] : rows[-1] + 1])
            for rows in self._rows
        ]
        parts: list[ChunkResult] = self._call("step_chunk", told)
        return parts[0] if len(parts) == 1 else self._merge(parts)

    def get_state(self) -> dict[str, Any]:
        """See `ChunkVectorEnv.get_state`."""
        self._check_started()
        return {"episodes": [episode for part in self._call("get_state", [()] * len(self._rows)) for episode in part]}

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        """See `ChunkVectorEnv.set_state`."""
        episodes = state.get("episodes", ())
        if len(episodes) != self.num_envs:
            raise ValueError(f"the state holds {len(episodes)} environments, this one has {self.num_envs}")
        for episode in episodes:
            sizes = np.shape(episode["seen"]), np.shape(episode["actions"])[1:]
            if sizes != ((self.state_dim,), (self.action_dim,)):
                raise ValueError(f"the state is of another environment than {self.config.env_id}: sizes {sizes}")
        parts = self._call("set_state", [([episodes[row] for row in rows],) for rows in self._rows])
        self._started = True
        if changed := [seed for _, seeds in parts for seed in seeds]:
            print(
                f"{self.config.env_id}: {len(changed)} of {self.num_envs} episodes in progress came out otherwise when "
                "they were played again (another machine or version?) and start anew"
            )
        return _concatenate([observation for observation, _ in parts])

    def close(self) -> None:
        """See `ChunkVectorEnv.close`."""
        if self._pool:
            self._pool.close()
        if self._group:
            self._group.close()

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._group is not None:
            return [getattr(self._group, method)(*arguments[0])]
        assert self._pool is not None
        return self._pool.call(method, arguments)

    def _check_started(self) -> None:
        if not self._started:
            raise RuntimeError("call reset(seeds) before anything else")

    def _check_seeds(self, seeds: Sequence[int]) -> list[int]:
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each")
        return [int(seed) for seed in seeds]

    def _check_actions(self, actions: ArrayLike) -> Array:
        array = np.asarray(actions, dtype=np.float64)
        wanted = (self.num_envs, self.action_dim)
        if array.ndim != 3 or (array.shape[0], array.shape[2]) != wanted or array.shape[1] < 1:
            raise ValueError(f"actions have shape ({wanted[0]}, n, {wanted[1]}) with n >= 1, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError("actions contain NaN or infinity: the policy has diverged, or its normalisation is wrong")
        return array

    def _merge(self, parts: list[ChunkResult]) -> ChunkResult:
        first = [rows[0] for rows in self._rows]
        finals = [part.final_observation for part in parts if part.final_observation is not None]
        rewards = np.concatenate([part.rewards for part in parts])
        return ChunkResult(
            observation=_concatenate([part.observation for part in parts]),
            rewards=rewards,
            reward_terms={"reward": rewards.copy()},
            active=np.concatenate([part.active for part in parts]),
            terminated=np.concatenate([part.terminated for part in parts]),
            truncated=np.concatenate([part.truncated for part in parts]),
            final_indices=np.concatenate([part.final_indices + row for part, row in zip(parts, first, strict=True)]),
            final_observation=_concatenate(finals) if finals else None,
            environment_states=None,
            episodes=[
                replace(stats, env=row + stats.env)
                for part, row in zip(parts, first, strict=True)
                for stats in part.episodes
            ],
        )


def _concatenate(parts: Sequence[Observation]) -> Observation:
    return {"environment_state": np.concatenate([part["environment_state"] for part in parts])}
