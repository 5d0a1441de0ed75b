"""A part of a rollout, played in another process: what a rollout worker does, and how its tensors travel.

The driver's side is rollout_workers.py, which makes Ray's actors of ``RolloutWorker``; nothing here knows Ray.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from reinflow.env import ChunkResult, ChunkVectorEnv
from reinflow.flow import ChainSpec
from reinflow.policy import FlowPolicy
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutBuffer, RolloutInfo, RolloutSettings, RolloutState, collect_rollout
from reinflow.seeds import TrainingSeeds

DECLARED = ("extras", "objective", "outcomes", "facts", "start_facts")  # what an environment says of itself

Make = Callable[[int, str, int], tuple[FlowPolicy, ChunkVectorEnv]]
"""(environments, device, threads) -> a copy of the driver's policy and so many environments. It travels to the workers,
so it is importable there, and so is all that it holds."""
Packed = tuple[NDArray[Any], torch.dtype]
"""A tensor as the object store takes it without a copy; numpy has no bf16."""


@dataclass
class Part:
    """What one worker's environments played, in the object store's terms."""

    tensors: dict[str, Packed]  # of RolloutBuffer, each (T, n, ...)
    context: dict[str, Packed]
    chunks: list[ChunkResult]  # T of them, with what a progress bar reads
    info: RolloutInfo
    current: RolloutState  # where the environments stand, without what they show
    env_state: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Opened:
    """Where a worker runs, and what its environments declare."""

    host: str
    pid: int
    device: str
    declared: dict[str, Any]


class RolloutWorker:
    """Serves one part of the environments; Ray runs its methods in a process of its own, one after the other."""

    def open(self, make: Make, num_envs: int, device: str, threads: int) -> Opened:
        """Build policy and environments."""
        torch.set_num_threads(threads)
        self.policy, self.env = make(num_envs, device, threads)
        self.current: RolloutState | None = None
        declared = {name: getattr(self.env, name) for name in DECLARED}
        return Opened(socket.gethostname(), os.getpid(), device, declared)

    def load(self, weights: Mapping[str, Packed]) -> None:
        """Take over tensors of ``trainable_state``, some of them or all."""
        own = self.policy.trainable_state()
        with torch.no_grad():
            for name, packed in weights.items():
                own[name].copy_(unpack(packed))

    def reset(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Start these episodes; returns the environments' state."""
        self.observation, self.current = self.env.reset(seeds), None
        return self.env.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go back to a state of the environments."""
        self.observation, self.current = self.env.set_state(state), None

    def play(
        self,
        standing: RolloutState,
        num_chunk_steps: int,
        spec: ChainSpec,
        settings: RolloutSettings,
        normalizer: ReturnNormalizer,
        seeds: TrainingSeeds,
        heads_alone: bool = False,
    ) -> Part:
        """``collect_rollout`` from ``standing``, which says of which episodes the environments' state is; with
        ``heads_alone`` it keeps what the heads read."""
        started = time.perf_counter()
        self.policy.learn_heads_alone(heads_alone)
        if self.current is None:
            numbers = (standing.episodes, standing.decisions, standing.stride)
            self.current = RolloutState.at(self.policy, self.observation, *numbers)
            self.current.broken |= standing.broken
        chunks: list[ChunkResult] = []
        buffer, info, self.current = collect_rollout(
            self.policy, self.env, self.current, num_chunk_steps, spec, settings, normalizer, seeds,
            lambda result: chunks.append(_told(result)),
        )  # fmt: skip
        state = self.env.get_state()
        return Part(*packed(buffer), chunks, info, unseen(self.current), state, time.perf_counter() - started)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()


def _told(result: ChunkResult) -> ChunkResult:
    """What a progress bar reads of a chunk."""
    return replace(result, observation={}, reward_terms={}, final_observation=None, environment_states=None)


def pack(tensor: Tensor) -> Packed:
    """For the object store."""
    host = tensor.detach().cpu().contiguous()
    return (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy(), host.dtype


def unpack(packed: Packed) -> Tensor:
    """Inverse of ``pack``; it may lie in the store's memory, so that it can be read only."""
    array, dtype = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype)


def packed(buffer: RolloutBuffer) -> tuple[dict[str, Packed], dict[str, Packed]]:
    """A buffer's tensors, and those of its context."""
    values = {entry.name: getattr(buffer, entry.name) for entry in fields(buffer) if entry.name != "context"}
    tensors = {name: pack(value) for name, value in values.items() if value is not None}
    return tensors, {name: pack(tensor) for name, tensor in buffer.context.items()}


def unseen(current: RolloutState, rows: slice = slice(None)) -> RolloutState:
    """Of which episodes environments are, without what they show."""
    numbers = {name: getattr(current, name)[rows] for name in ("episodes", "decisions", "broken")}
    return RolloutState(context={}, state=None, stride=current.stride, **numbers)
