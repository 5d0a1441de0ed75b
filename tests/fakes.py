"""Small stand-ins: an environment whose optimum is known, and a policy that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation
from reinflow.flow_mlp import FlowMLP

STATE_DIM, ACTION_DIM, CHUNK = 3, 2, 4


class ReachEnv(ChunkVectorEnv):
    """Every action should equal the first ``action_dim`` of the action_dim + 1 state entries.

    An episode is two chunks and then truncated.

    With ``terminate_at`` the episode ends inside its first chunk after that many control steps. With ``clock`` the last
    state entry counts the episode's control steps.
    """

    def __init__(
        self, num_envs: int, terminate_at: int | None = None, action_dim: int = ACTION_DIM, clock: bool = False
    ):
        self.num_envs, self.terminate_at, self.action_dim, self.clock = num_envs, terminate_at, action_dim, clock

    def reset(self, seeds: Sequence[int]) -> Observation:
        self.seeds = list(seeds)
        self.states = np.stack([self._start(seed) for seed in seeds])
        self.age = np.zeros(self.num_envs, dtype=int)
        self.steps = np.zeros(self.num_envs, dtype=int)
        self.over = np.zeros(self.num_envs, dtype=bool)
        return self._observe()

    def _start(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).uniform(-1, 1, self.action_dim + 1)

    def _observe(self) -> Observation:
        return {"environment_state": self._states_at(self.steps)}

    def _states_at(self, steps: np.ndarray) -> np.ndarray:
        states = self.states.astype(np.float32).copy()
        if self.clock:
            states[:, -1] = steps
        return states

    def step_chunk(self, actions: np.ndarray, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        n = actions.shape[1]
        rewards = -np.abs(actions - self.states[:, None, : self.action_dim]).mean(-1)
        active = np.tile(~self.over[:, None], (1, n))
        terminated = np.zeros(self.num_envs, dtype=bool)
        if self.terminate_at is not None:
            active[:, self.terminate_at :] = False
            terminated = ~self.over
        rewards = rewards * active
        inside = np.stack([self._states_at(self.steps + i + 1) for i in range(n)], axis=1) * active[..., None]
        self.age += 1
        self.steps += active.sum(1)
        truncated = (self.age >= 2) & ~terminated & ~self.over
        final = self._observe() if truncated.any() else None
        if final is not None:
            final = {k: v[truncated] for k, v in final.items()}
        ended = np.flatnonzero(truncated | terminated)
        episodes = [
            EpisodeStats(
                int(i), self.seeds[i], float(rewards[i].sum()), int(active[i].sum()), bool(rewards[i].mean() > -0.1)
            )
            for i in ended
        ]
        self.over[ended] = next_seeds is None
        for i in ended if next_seeds is not None else []:
            self.seeds[i] = next_seeds[i]
            self.states[i], self.age[i], self.steps[i] = self._start(next_seeds[i]), 0, 0
        return ChunkResult(
            observation=self._observe(),
            rewards=rewards,
            reward_terms={"reach": rewards},
            active=active,
            terminated=terminated,
            truncated=truncated,
            final_indices=np.flatnonzero(truncated),
            final_observation=final,
            environment_states=inside,
            episodes=episodes,
        )

    def get_state(self) -> dict[str, Any]:
        return {name: np.array(getattr(self, name)) for name in ("seeds", "states", "age", "steps", "over")}

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        self.seeds = state["seeds"].tolist()
        for name in ("states", "age", "steps", "over"):
            setattr(self, name, state[name].copy())
        return self._observe()


def make_policy(
    seed: int = 0, sigma: tuple[float, float] = (0.1, 0.3), action_dim: int = ACTION_DIM, chunk: int = CHUNK
) -> FlowMLP:
    """A FlowMLP with the fake's dimensions."""
    torch.manual_seed(seed)
    return FlowMLP(action_dim + 1, action_dim, chunk, hidden_size=32, sigma_min=sigma[0], sigma_max=sigma[1]).eval()


def clone_half_the_way(policy: FlowMLP, steps: int = 300) -> None:
    """Supervised stage: the policy learns to go half of the way that the fake rewards."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        states = torch.rand(64, policy.action_dim + 1, generator=generator) * 2 - 1
        actions = 0.5 * states[:, None, : policy.action_dim].expand(-1, policy.chunk_size, -1)
        loss = policy.flow_matching_loss(states, actions, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
