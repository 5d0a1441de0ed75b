"""What a reflow student learns from: observations at which a policy decides, encoded once, and pairs of a noise and the
action that the teacher's ODE makes of it there. They are kept in a file, so that a stage that was cut off need not make
them again.

Dimensions: M observations, P pairs, C denoised actions of D dims, as in reinflow/flow.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reinflow import UserError
from reinflow.env import take_rows
from reinflow.evaluate import EpisodeRow, evaluate, even_batch
from reinflow.flow import ChainSpec, sample_chain
from reinflow.policy import Context, FlowPolicy
from reinflow.progress import progress_bar, tracked
from reinflow.rollout import act, encode, whole_tiles
from reinflow_so101.stages.datasets import check_dataset, decisions, read_demonstrations
from reinflow_vla.directory import OBS_IMAGES_PREFIX

if TYPE_CHECKING:
    from reinflow.env import ChunkVectorEnv, Observation
    from reinflow_vla.base import ReinFlowVLA

BATCH = 64  # rows that are encoded or denoised at once
HELD_OUT_SHARE = 0.1  # of the observations: their pairs are measured on, not learned from
CONTEXT = "context."  # names of the contexts' tensors in a file


class ObservationsError(UserError, RuntimeError):
    """There is too little to learn from, or it cannot be read; the message holds the remedy."""


def play(
    policy: FlowPolicy,
    make_env: Callable[[int], ChunkVectorEnv],
    seeds: Sequence[int],
    num_envs: int,
    spec: ChainSpec,
) -> tuple[Context, float]:
    """Let a policy play noise-free and keep every observation at which it decided.

    Args:
        policy: plays, and encodes.
        make_env: so many environments; they are closed again.
        seeds: of the episodes.
        num_envs: that act at once.
        spec: the denoising steps.

    Returns:
        The encoded observations (M, ...) on the host, in the order of their episodes, and the success rate.

    Raises:
        ObservationsError: fewer than two decisions were made.
    """
    size = even_batch(len(seeds), num_envs)
    parts: list[Context] = []
    made: list[tuple[int, int]] = []  # seed and decision of every row

    def acting(observation: Observation, playing: Sequence[int], decision: int) -> np.ndarray:
        rows = whole_tiles(len(playing))  # as noise_free_actor
        context = encode(policy, take_rows(observation, rows))
        kept = {name: tensor[: len(playing)] for name, tensor in context.items()}
        parts.append(_on_host(policy.to_buffer(kept)))
        made.extend((seed, decision) for seed in playing)
        actors = [playing[row] for row in rows.tolist()]
        return act(policy, context, spec, actors, [decision] * len(rows), explore=False)[1][: len(playing)]

    episodes: list[EpisodeRow] = []
    with make_env(size) as env, torch.no_grad(), progress_bar("the teacher plays, episodes", len(seeds)) as advance:
        for start in range(0, len(seeds), size):
            played = evaluate(acting, env, list(seeds[start : start + size])).episodes
            episodes += played
            advance(len(played))
    rows = _decided(made, {row.seed: row.length for row in episodes}, policy.n_action_steps)
    if len(rows) < 2:
        raise ObservationsError(f"{len(seeds)} episodes had {len(rows)} decisions: raise episodes")
    return _stacked(parts, rows), float(np.mean([row.success for row in episodes]))


def _decided(made: Sequence[tuple[int, int]], lengths: dict[int, int], executed: int) -> list[int]:
    """Rows of decisions in episodes that went on, each once, by seed: ended ones and repeated seeds are left out."""
    first: dict[tuple[int, int], int] = {}
    for row, (seed, decision) in enumerate(made):
        if decision * executed < lengths[seed]:
            first.setdefault((seed, decision), row)
    return [first[key] for key in sorted(first)]


def read_frames(
    policy: ReinFlowVLA, root: Path, repo_id: str, jitter: int, every: int, control_hz: float = 0.0
) -> Context:
    """Encode the frames of a LeRobotDataset at and near the decisions, (M, ...) on the host.

    Args:
        policy: encodes; the data set has its cameras by their names, and the joints in its environment's units.
        root: of the data set.
        repo_id: its name.
        jitter: frames so near to a decision count.
        every: control steps between decisions.
        control_hz: frames a second; 0 is the simulator's usual rate.

    Raises:
        SftError: it cannot be learned from.
    """
    cameras = {OBS_IMAGES_PREFIX + name: OBS_IMAGES_PREFIX + name for name in policy.cameras}
    check_dataset(root, list(cameras), control_hz)
    data = read_demonstrations(root, repo_id, jitter, cameras, every, control_hz)
    where = [
        (episode, frame)
        for episode, frames in enumerate(data.stored)
        for frame in frames[_distance(frames, int(data.lengths[episode]), every) <= jitter].tolist()
    ]
    parts = []
    for start in tracked(range(0, len(where), BATCH), f"encoding the frames, batches of {BATCH}"):
        episode, frame = np.array(where[start : start + BATCH]).T
        images = data.kept[episode, frame]
        observation: Observation = {
            "pixels": {
                name.removeprefix(OBS_IMAGES_PREFIX): data.images[name][images].transpose(0, 2, 3, 1)
                for name in cameras
            },
            "agent_pos": data.state[episode, frame],
            "task": [data.instructions[number] for number in data.instruction_of[episode]],
        }
        parts.append(_on_host(policy.to_buffer(encode(policy, observation))))
    return _stacked(parts, range(len(where)))


def _distance(frames: np.ndarray, length: int, every: int) -> np.ndarray:
    """Control steps from each frame to the nearest decision."""
    return np.abs(frames[:, None] - decisions(length, every)).min(axis=1)


def _on_host(context: Context) -> Context:
    return {name: tensor.cpu() for name, tensor in context.items()}


def _stacked(parts: Sequence[Context], rows: Iterable[int]) -> Context:
    index = torch.tensor(list(rows))
    return {name: torch.cat([part[name] for part in parts])[index] for name in parts[0]}


@dataclass
class Pairs:
    """P coupled ends of the teacher's ODE on the host, the last ``held_out`` of them of observations of their own."""

    contexts: Context  # (M, ...) what the policy's to_buffer kept
    row: Tensor  # (P,) which observation
    x_0: Tensor  # (P, C, D) noise
    x_1: Tensor  # (P, C, D) what the teacher makes of it
    held_out: int

    @property
    def num_training(self) -> int:
        """Pairs to learn from, the first ones."""
        return len(self.row) - self.held_out

    def batch(self, policy: FlowPolicy, index: Tensor) -> tuple[Context, Tensor, Tensor]:
        """Pairs (B,): context for ``policy.velocity``, x_0 and x_1 (B, C, D), where the policy runs."""
        device, rows = policy.device, self.row[index]
        context = policy.from_buffer({name: tensor[rows].to(device) for name, tensor in self.contexts.items()})
        return context, self.x_0[index].to(device), self.x_1[index].to(device)

    def save(self, file: Path) -> None:
        """Write a file that is whole or not there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"row": self.row, "x_0": self.x_0, "x_1": self.x_1, "held_out": torch.tensor(self.held_out)}
        tensors |= {CONTEXT + name: tensor.contiguous() for name, tensor in self.contexts.items()}
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, file)

    @classmethod
    def load(cls, file: Path) -> Pairs:
        """What ``save`` wrote. Raises ObservationsError."""
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ObservationsError(
                f"{file} cannot be read ({error}): remove it, then --resume makes it again"
            ) from error
        contexts = {name.removeprefix(CONTEXT): t for name, t in tensors.items() if name.startswith(CONTEXT)}
        return cls(contexts, tensors["row"], tensors["x_0"], tensors["x_1"], int(tensors["held_out"]))


def make_pairs(
    policy: FlowPolicy, contexts: Context, num_pairs: int, num_held_out: int, spec: ChainSpec, seed: int
) -> Pairs:
    """Draw noises for the observations in turn and let the teacher's ODE act on them.

    Args:
        policy: the teacher.
        contexts: M encoded observations, two or more; the last tenth is held out.
        num_pairs: to learn from.
        num_held_out: to measure on.
        spec: the teacher's denoising steps.
        seed: of the noises.
    """
    total = len(next(iter(contexts.values())))
    apart = max(1, round(HELD_OUT_SHARE * total))
    row = torch.cat([torch.arange(num_pairs) % (total - apart), total - apart + torch.arange(num_held_out) % apart])
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(len(row), policy.denoised_steps, policy.padded_action_dim, generator=generator)
    pairs = Pairs(contexts, row, x_0, torch.empty_like(x_0), num_held_out)
    for index in tracked(torch.arange(len(row)).split(BATCH), f"the teacher's actions, batches of {BATCH}"):
        context, noise, _ = pairs.batch(policy, index)
        pairs.x_1[index] = sample_chain(policy, context, spec, noise).chain[:, -1].cpu()
    return pairs
