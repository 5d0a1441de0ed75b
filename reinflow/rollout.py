"""Collect T chunk steps from N environments into a [T, N] buffer. Shapes follow the legend in reinflow/flow.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from reinflow.flow import ChainSpec, sample_chain
from reinflow.policy import Context, FlowPolicy, Observation
from reinflow.ppo import ReturnNormalizer

DiscountPer = Literal["control_step", "chunk"]
CreditPer = Literal["decision", "control_step"]


class EpisodeStats(Protocol):
    """What an environment reports about an episode that ended."""

    seed: int
    return_: float
    length: int
    success: bool
    max_height_m: float
    clipped_targets: int
    reward_terms: dict[str, float]


class ChunkResult(Protocol):
    """What an environment answers to one chunk of actions; see ChunkVectorEnv."""

    observation: Observation
    rewards: np.ndarray  # (N, n)
    active: np.ndarray  # (N, n) bool
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    final_indices: np.ndarray  # (M,)
    final_observation: Observation | None
    environment_states: np.ndarray | None  # (N, n, S) after each executed control step, if the environment has them
    episodes: Sequence[Any]


class ChunkVectorEnv(Protocol):
    """N environments that execute whole action chunks. An ended episode restarts at once (autoreset)."""

    num_envs: int

    def reset(self, seeds: Sequence[int]) -> Observation: ...

    def step_chunk(self, actions: np.ndarray) -> Any: ...  # ChunkResult


@dataclass
class RolloutBuffer:
    """T chunk steps of N environments; every tensor starts with [T, N]."""

    context: Context  # each (T, N, ...)
    chain: Tensor  # (T, N, K+1, n, D)
    log_prob: Tensor  # (T, N, G) at sampling time
    active: Tensor  # (T, N, n) bool, control steps executed before the episode's end
    value: Tensor  # (T, N) in return units
    next_value: Tensor  # (T, N) of the observation that follows; the final one where truncated
    reward: Tensor  # (T, N) discounted inside the chunk
    discount: Tensor  # (T, N) gamma**tau
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    # Inside the chunks, with RolloutSettings(credit="control_step"). S: length of the simulator's privileged state.
    states: Tensor | None = None  # (T, N, n+1, S) before each control step and after the last; 0 after the end
    step_reward: Tensor | None = None  # (T, N, n)

    @property
    def num_decisions(self) -> int:
        """T * N."""
        return self.value.numel()


@dataclass
class RolloutInfo:
    """What is worth logging about one rollout."""

    episodes: list[Any]  # EpisodeStats of the episodes that ended
    noise_std: float
    seconds_env: float
    seconds_policy: float


@dataclass
class Cursor:
    """Where the environments stand: the current observation, already encoded, and the simulator's state if shown."""

    context: Context
    state: np.ndarray | None = None  # (N, S)

    @classmethod
    def at(cls, policy: FlowPolicy, observation: Observation) -> Cursor:
        """Encode ``observation``."""
        with torch.no_grad():
            return cls(policy.encode(policy.preprocess(observation)), observation.get("environment_state"))


@dataclass(frozen=True)
class RolloutSettings:
    """How rewards inside a chunk are discounted, and what is kept of them.

    ``discount_per``: with "control_step" reward i of the chunk counts gamma**i and the next decision gamma**tau, tau
    executed steps; with "chunk" a plain sum and one gamma per decision, as in the paper's code.
    ``time_limit_is_terminal``: nothing is worth anything after a time limit, instead of V(final observation).
    ``credit``: "control_step" keeps the simulator's state and the reward of every control step.
    """

    gamma: float
    discount_per: DiscountPer
    time_limit_is_terminal: bool
    credit: CreditPer = "decision"


def chunk_return(rewards: np.ndarray, active: np.ndarray, settings: RolloutSettings) -> tuple[np.ndarray, np.ndarray]:
    """(N, n) rewards and executed steps -> chunk reward (N,) and discount of what follows (N,)."""
    if settings.discount_per == "chunk":
        return (rewards * active).sum(1), np.full(len(rewards), settings.gamma)
    weights = settings.gamma ** np.arange(rewards.shape[1])
    return (rewards * active * weights).sum(1), settings.gamma ** active.sum(1)


@torch.no_grad()
def collect_rollout(
    policy: FlowPolicy,
    env: ChunkVectorEnv,
    cursor: Cursor,
    num_chunk_steps: int,
    spec: ChainSpec,
    settings: RolloutSettings,
    normalizer: ReturnNormalizer,
    generator: torch.Generator,
) -> tuple[RolloutBuffer, RolloutInfo, Cursor]:
    """Act for ``num_chunk_steps`` decisions per environment.

    Args:
        policy: acts with its exploration noise.
        env: N environments standing at ``cursor``.
        cursor: current observation; the returned one is where the next rollout starts.
        num_chunk_steps: T.
        spec: the denoising chain.
        settings: discounting.
        normalizer: turns the critic's output into return units.
        generator: of x_0 and the exploration noise, on the policy's device.
    """
    rows: list[dict[str, Tensor]] = []
    contexts: Context = {}
    episodes: list[Any] = []
    noise_stds, seconds_env, start = [], 0.0, time.perf_counter()
    for step in range(num_chunk_steps):
        sample, actions = act(policy, cursor.context, spec, generator)
        env_start = time.perf_counter()
        result = env.step_chunk(actions)
        seconds_env += time.perf_counter() - env_start
        following = Cursor.at(policy, result.observation)
        reward, discount = chunk_return(result.rewards, result.active, settings)
        _store(contexts, step, num_chunk_steps, policy.to_buffer(cursor.context))
        noise_stds.append(sample.noise_std.mean().item())
        rows.append({
            "chain": sample.chain,
            "log_prob": sample.log_prob,
            "active": torch.as_tensor(result.active),
            "value": normalizer.denormalize(policy.value(cursor.context)),
            "next_value": _next_value(policy, following, result, normalizer, settings),
            "reward": torch.as_tensor(reward, dtype=torch.float32),
            "discount": torch.as_tensor(discount, dtype=torch.float32),
            "terminated": torch.as_tensor(result.terminated),
            "truncated": torch.as_tensor(result.truncated),
        })  # fmt: skip
        if settings.credit == "control_step":
            rows[-1] |= _control_steps(cursor, result)
        episodes.extend(result.episodes)
        cursor = following
    device = rows[0]["chain"].device
    stacked = {name: torch.stack([row[name].to(device) for row in rows]) for name in rows[0]}
    seconds_policy = time.perf_counter() - start - seconds_env
    info = RolloutInfo(episodes, float(np.mean(noise_stds)), seconds_env, seconds_policy)
    return RolloutBuffer(context=contexts, **stacked), info, cursor


def _store(contexts: Context, step: int, num_chunk_steps: int, context: Context) -> None:
    """Write one decision's context (N, ...) into tensors (T, N, ...), made at the first one: stacking a list at the end
    would hold everything twice."""
    for name, tensor in context.items():
        if step == 0:
            contexts[name] = tensor.new_empty((num_chunk_steps, *tensor.shape))
        contexts[name][step].copy_(tensor)


def _control_steps(cursor: Cursor, result: ChunkResult) -> dict[str, Tensor]:
    """Inside one chunk step: states (N, n+1, S) and rewards (N, n)."""
    if cursor.state is None or result.environment_states is None:
        raise ValueError(
            "credit=control_step needs the simulator's state: build the environment with environment_state=True"
        )
    states = np.concatenate([cursor.state[:, None], result.environment_states], axis=1)
    return {"states": torch.as_tensor(states), "step_reward": torch.as_tensor(result.rewards, dtype=torch.float32)}


def act(
    policy: FlowPolicy,
    context: Context,
    spec: ChainSpec,
    generator: torch.Generator,
    deterministic: bool = False,
) -> tuple[Any, np.ndarray]:
    """Sample a chain for every row and turn its end into environment actions (B, n, A)."""
    some = next(iter(context.values()))
    shape = (some.shape[0], policy.n_action_steps, policy.padded_action_dim)
    noise = torch.randn(shape, generator=generator, device=some.device)
    sample = sample_chain(policy, context, spec, noise, generator, deterministic)
    return sample, policy.postprocess(sample.chain[:, -1, :, : policy.action_dim])


def noise_free_actor(
    policy: FlowPolicy, spec: ChainSpec, seed: int, device: str
) -> Callable[[Observation], np.ndarray]:
    """Observation -> actions by the chain with zero noise, which is LeRobot's own sampler."""
    generator = torch.Generator(device).manual_seed(seed)

    def act_noise_free(observation: Observation) -> np.ndarray:
        context = policy.encode(policy.preprocess(observation))
        return act(policy, context, spec, generator, deterministic=True)[1]

    return act_noise_free


def _next_value(
    policy: FlowPolicy,
    following: Cursor,
    result: ChunkResult,
    normalizer: ReturnNormalizer,
    settings: RolloutSettings,
) -> Tensor:
    """V of the observation after the chunk, (N,). A time limit looks at the final observation, never at the next
    episode's first one; 0 if it is terminal."""
    values = normalizer.denormalize(policy.value(following.context))
    if settings.time_limit_is_terminal:
        return values.masked_fill(torch.as_tensor(result.truncated, device=values.device), 0.0)
    if result.final_observation is not None:
        final = Cursor.at(policy, result.final_observation)
        rows = torch.as_tensor(result.final_indices, device=values.device)
        values = values.index_copy(0, rows, normalizer.denormalize(policy.value(final.context)))
    return values
