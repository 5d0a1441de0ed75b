"""Collect T chunk steps from N environments into a [T, N] buffer. Shapes follow the legend in reinflow/flow.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation, take_rows
from reinflow.evaluate import Act
from reinflow.flow import ChainSample, ChainSpec, sample_chain
from reinflow.noise import episode_choice, episode_noise
from reinflow.policy import Context, FlowPolicy
from reinflow.ppo import ReturnNormalizer
from reinflow.seeds import TrainingSeeds

DiscountPer = Literal["control_step", "chunk"]
CreditPer = Literal["decision", "control_step"]
ROW_TILE = 4


@dataclass
class RolloutBuffer:
    """T chunk steps of N environments; every tensor starts with [T, N]."""

    context: Context  # each (T, N, ...)
    chain: Tensor  # (T, N, K+1, C, D)
    log_prob: Tensor  # (T, N, G) at sampling time
    active: Tensor  # (T, N, n) bool, control steps executed before the episode's end; none of a broken episode
    value: Tensor  # (T, N) in return units
    next_value: Tensor  # (T, N) of the observation that follows; the final one where truncated
    reward: Tensor  # (T, N) discounted inside the chunk
    discount: Tensor  # (T, N) gamma**tau
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    noisy: Tensor | None = None  # (T, N, K') denoising steps that drew noise; None: those of the ChainSpec
    head_inputs: Tensor | None = None  # (T, N, K', C, F) in them, where the policy keeps what its head reads
    # Inside the chunks, with RolloutSettings(credit="control_step"). S: length of the simulator's privileged state.
    states: Tensor | None = None  # (T, N, n+1, S) before each control step and after the last; 0 after the end
    step_reward: Tensor | None = None  # (T, N, n)

    @property
    def num_decisions(self) -> int:
        """T * N."""
        return self.value.numel()

    @property
    def valid(self) -> Tensor:
        """(T, N) bool: decisions of sound episodes, which are all but very few."""
        return self.active.any(-1)


@dataclass
class RolloutInfo:
    """What is worth logging about one rollout."""

    episodes: list[EpisodeStats]  # that ended in it
    seconds_env: float
    seconds_policy: float
    objective: Literal["success", "return"] = "success"  # of the environment

    def metrics(self) -> dict[str, float]:
        """Means over the episodes that ended, by the names of reinflow.metrics."""
        metrics = {
            "time/rollout": self.seconds_env + self.seconds_policy,
            "time/rollout_env": self.seconds_env,
            "time/rollout_policy": self.seconds_policy,
        }
        metrics["rollout/episodes_broken"] = float(sum(e.broken for e in self.episodes))
        sound = [e for e in self.episodes if not e.broken]
        if not sound:
            return metrics
        returns = [e.return_ for e in sound]
        if self.objective == "success":
            metrics["rollout/success_rate"] = float(np.mean([e.success for e in sound]))
            if failed := [e.return_ for e in sound if not e.success]:
                metrics["rollout/failure_return_median"] = float(np.median(failed))
        metrics |= {
            "rollout/return_mean": float(np.mean(returns)),
            "rollout/return_std": float(np.std(returns)),
            "rollout/episode_length": float(np.mean([e.length for e in sound])),
        }
        for name in sound[0].extras:
            metrics[f"rollout/{name}"] = float(np.mean([e.extras[name] for e in sound]))
        for term in sound[0].reward_terms:
            metrics[f"reward/{term}"] = float(np.mean([e.reward_terms[term] for e in sound]))
        return metrics


@dataclass
class RolloutState:
    """Where the environments stand: the observation to decide on, encoded, and of which episodes it is.

    They may be a part of those that play a training, as on a worker or one of several learners: with ``stride`` M
    environments in all, the one that plays episode i plays i + M next.
    """

    context: Context
    state: np.ndarray | None  # (N, S) the simulator's, if it is shown
    episodes: NDArray[np.int64]  # (N,) numbers of the episodes being played, see TrainingSeeds
    decisions: NDArray[np.int64]  # (N,) made in them so far
    broken: NDArray[
        np.bool_
    ]  # (N,) an observation of theirs was not finite: zeros stand for it, they count for nothing
    stride: int  # environments in all

    @classmethod
    def start(
        cls,
        policy: FlowPolicy,
        env: ChunkVectorEnv,
        seeds: TrainingSeeds,
        done: int = 0,
        first: int = 0,
        stride: int = 0,
    ) -> RolloutState:
        """At the beginning of the training's episodes, those after the first ``done``.

        Args:
            policy: encodes.
            env: N environments.
            seeds: of the episodes.
            done: episodes that were played before.
            first: of ``env`` among the environments in all.
            stride: environments in all; 0 is those of ``env`` alone.
        """
        numbers = done + first + np.arange(env.num_envs)
        return cls.at(policy, env.reset(seeds.of(numbers)), numbers, np.zeros_like(numbers), stride)

    @classmethod
    def at(
        cls,
        policy: FlowPolicy,
        observation: Observation,
        episodes: NDArray[np.int64],
        decisions: NDArray[np.int64],
        stride: int = 0,
    ) -> RolloutState:
        """Encode ``observation``, unless it is empty: then others see and decide, as rollout workers do. ``stride`` 0
        is as many as there are ``episodes``."""
        observation, broken = mend(observation, len(episodes))
        state, context = observation.get("environment_state"), encode(policy, observation) if observation else {}
        return cls(context, state, episodes, decisions, broken, stride or len(episodes))

    @property
    def next_episodes(self) -> NDArray[np.int64]:
        """(N,) numbers of the episodes that start where one ends."""
        return self.episodes + self.stride

    def after(self, policy: FlowPolicy, result: ChunkResult) -> RolloutState:
        """Where the environments stand after a chunk."""
        ended = result.terminated | result.truncated
        episodes = np.where(ended, self.next_episodes, self.episodes)
        decisions = np.where(ended, 0, self.decisions + 1)
        state = RolloutState.at(policy, result.observation, episodes, decisions, self.stride)
        state.broken |= self.breaks(result) & ~ended
        return state

    def ended(self, result: ChunkResult) -> list[EpisodeStats]:
        """The episodes that ended in a chunk, the broken ones marked."""
        breaks = self.breaks(result)
        return [replace(e, broken=e.broken or bool(breaks[e.env])) for e in result.episodes]

    def breaks(self, result: ChunkResult) -> NDArray[np.bool_]:
        """(N,) environments whose episode is broken at the end of a chunk."""
        broken: NDArray[np.bool_] = self.broken | ~np.isfinite(result.rewards).all(axis=1)
        if result.environment_states is not None:
            broken |= ~np.isfinite(result.environment_states).all(axis=(1, 2))
        for stats in result.episodes:
            broken[stats.env] |= stats.broken
        return broken


def mend(observation: Observation, num_envs: int) -> tuple[Observation, NDArray[np.bool_]]:
    """An observation with zeros for what is not finite, and the rows (N,) where that was so."""
    broken = np.zeros(num_envs, dtype=bool)
    mended = observation.copy()
    for name in ("agent_pos", "environment_state"):
        if name in observation and not np.isfinite(observation[name]).all():
            broken |= ~np.isfinite(observation[name]).reshape(num_envs, -1).all(axis=1)
            mended[name] = _zero_for_nan(observation[name])
    return mended, broken


def _zero_for_nan(values: NDArray[Any]) -> NDArray[Any]:
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def encode(policy: FlowPolicy, observation: Observation) -> Context:
    """What the policy makes of an observation."""
    return policy.encode(policy.preprocess(observation))


@dataclass(frozen=True)
class RolloutSettings:
    """How rewards inside a chunk are discounted, and what is kept of them.

    ``discount_per``: with "control_step" reward i of the chunk counts gamma**i and the next decision gamma**tau, tau
    executed steps; with "chunk" a plain sum and one gamma per decision, as in the paper's code.
    ``time_limit_is_terminal``: nothing is worth anything after a time limit, instead of V(final observation).
    ``credit``: "control_step" keeps the simulator's state and the reward of every control step.
    """

    gamma: float = 0.999
    discount_per: DiscountPer = "control_step"
    time_limit_is_terminal: bool = False
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
    current: RolloutState,
    num_chunk_steps: int,
    spec: ChainSpec,
    settings: RolloutSettings,
    normalizer: ReturnNormalizer,
    seeds: TrainingSeeds,
    after_chunk: Callable[[ChunkResult], None] | None = None,
) -> tuple[RolloutBuffer, RolloutInfo, RolloutState]:
    """Act for ``num_chunk_steps`` decisions per environment.

    Args:
        policy: acts with its exploration noise.
        env: N environments standing at ``current``.
        current: where they stand; the returned one is where the next rollout starts.
        num_chunk_steps: T.
        spec: the denoising chain.
        settings: discounting.
        normalizer: turns the critic's output into return units.
        seeds: of the episodes; where they start and all their noise follow from them.
        after_chunk: called with what came of every chunk step, for a bar.
    """
    rows: list[dict[str, Tensor]] = []
    played: list[NDArray[np.int64]] = []
    broken: set[int] = set()
    contexts: Context = {}
    episodes: list[EpisodeStats] = []
    seconds_env, start = 0.0, time.perf_counter()
    for step in range(num_chunk_steps):
        playing = seeds.of(current.episodes)
        sample, actions = act(policy, current.context, spec, playing, current.decisions.tolist(), explore=True)
        env_start = time.perf_counter()
        result = env.step_chunk(actions, seeds.of(current.next_episodes))
        seconds_env += time.perf_counter() - env_start
        following = current.after(policy, result)
        broken |= set(current.episodes[current.breaks(result)].tolist())
        played.append(current.episodes)
        _store(contexts, step, num_chunk_steps, policy.to_buffer(current.context))
        values = {
            "value": normalizer.denormalize(policy.value(current.context)),
            "next_value": _next_value(policy, following, result, normalizer, settings),
        }
        rows.append(_row(current, sample, result, settings) | values)
        episodes.extend(current.ended(result))
        current = following
        if after_chunk:
            after_chunk(result)
    _mask_broken(rows, np.stack(played), broken | set(current.episodes[current.broken].tolist()))
    device = rows[0]["chain"].device
    stacked = {name: torch.stack([row[name].to(device) for row in rows]) for name in rows[0]}
    info = RolloutInfo(episodes, seconds_env, time.perf_counter() - start - seconds_env, env.objective)
    return RolloutBuffer(context=contexts, **stacked), info, current


def _row(
    current: RolloutState, sample: ChainSample, result: ChunkResult, settings: RolloutSettings
) -> dict[str, Tensor]:
    """What one chunk step adds to the buffer besides context and values, each (N, ...)."""
    reward, discount = chunk_return(_zero_for_nan(result.rewards), result.active, settings)
    row = {
        "chain": sample.chain,
        "log_prob": sample.log_prob,
        "noisy": sample.noisy,
        "active": torch.as_tensor(result.active),
        "reward": torch.as_tensor(reward, dtype=torch.float32),
        "discount": torch.as_tensor(discount, dtype=torch.float32),
        "terminated": torch.as_tensor(result.terminated),
        "truncated": torch.as_tensor(result.truncated),
    }
    if sample.head_inputs is not None:
        row["head_inputs"] = sample.head_inputs
    return row | (_control_steps(current, result) if settings.credit == "control_step" else {})


def _mask_broken(rows: list[dict[str, Tensor]], played: NDArray[np.int64], broken: set[int]) -> None:
    """Nothing that was done in a broken episode counts; its rows stay, so that [T, N] keeps its shape.

    Args:
        rows: T of them.
        played: (T, N) numbers of the episodes.
        broken: numbers of those that are.
    """
    if broken:
        for row, sound in zip(rows, torch.as_tensor(~np.isin(played, list(broken))), strict=True):
            row["active"] = row["active"] & sound[:, None]


def _store(contexts: Context, step: int, num_chunk_steps: int, context: Context) -> None:
    """Write one decision's context (N, ...) into tensors (T, N, ...), made at the first one: stacking a list at the end
    would hold everything twice."""
    for name, tensor in context.items():
        if step == 0:
            contexts[name] = tensor.new_empty((num_chunk_steps, *tensor.shape))
        contexts[name][step].copy_(tensor)


def _control_steps(current: RolloutState, result: ChunkResult) -> dict[str, Tensor]:
    """Inside one chunk step: states (N, n+1, S) and rewards (N, n)."""
    if current.state is None or result.environment_states is None:
        raise ValueError(
            "credit=control_step needs the simulator's state: build the environment with environment_state=True"
        )
    states = np.concatenate([current.state[:, None], _zero_for_nan(result.environment_states)], axis=1)
    rewards = torch.as_tensor(_zero_for_nan(result.rewards), dtype=torch.float32)
    return {"states": torch.as_tensor(states), "step_reward": rewards}


def act(
    policy: FlowPolicy,
    context: Context,
    spec: ChainSpec,
    seeds: Sequence[int],
    decisions: Sequence[int],
    explore: bool,
) -> tuple[ChainSample, np.ndarray]:
    """Sample a chain for every row and turn its end into environment actions (B, n, A).

    Args:
        policy: acts.
        context: encoded observations, leading dim B.
        spec: the chain's definition.
        seeds: (B,) of the episodes.
        decisions: (B,) made in them so far.
        explore: with the policy's exploration noise.
    """
    n = policy.n_action_steps
    x_0 = episode_noise(seeds, decisions, (policy.denoised_steps, policy.padded_action_dim), "x_0", policy.device)
    noise = noisy = None
    if explore:
        shape = spec.noise_shape(n, policy.action_dim)
        noise = episode_noise(seeds, decisions, shape, "exploration", policy.device)
        if spec.chain_noise == "flow_sde":
            chosen = episode_choice(seeds, decisions, spec.num_denoising_steps, "noisy_step")
            noisy = chosen[:, None].to(policy.device)
    sample = sample_chain(policy, context, spec, x_0, noise, noisy)
    return sample, policy.postprocess(sample.chain[:, -1, :n, : policy.action_dim])


def whole_tiles(n: int) -> NDArray[np.int64]:
    """Indices of n rows, begun again until they fill tiles of ROW_TILE."""
    return np.arange(-(-n // ROW_TILE) * ROW_TILE) % n


def noise_free_actor(policy: FlowPolicy, spec: ChainSpec) -> Act:
    """The policy by the chain with zero noise, which is LeRobot's own sampler; x_0 follows from seed and decision.

    Rows are repeated to a multiple of ROW_TILE: a matrix product rounds those that do not fill a tile of its kernel
    in another way, and a contact can turn on the last digit of an action.
    """

    def act_noise_free(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
        rows = whole_tiles(len(seeds))
        context = encode(policy, take_rows(observation, rows))
        playing = [seeds[row] for row in rows.tolist()]
        return act(policy, context, spec, playing, [decision] * len(rows), explore=False)[1][: len(seeds)]

    return act_noise_free


def _next_value(
    policy: FlowPolicy,
    following: RolloutState,
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
        final = encode(policy, mend(result.final_observation, len(result.final_indices))[0])
        rows = torch.as_tensor(result.final_indices, device=values.device)
        values = values.index_copy(0, rows, normalizer.denormalize(policy.value(final)))
    return values
