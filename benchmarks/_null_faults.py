"""The faults of benchmarks/nulls.py: each changes one thing of a run that would learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from reinflow import learner
from reinflow.credit import Advantages
from reinflow.env import ChunkResult, ChunkVectorEnv, Observation
from reinflow.ppo import compute_gae
from reinflow.rollout import RolloutBuffer, RolloutState
from reinflow.run import Run
from reinflow.seeds import PASS
from so101_mujoco_utils import is_grasped, is_success
from so101_sim import scene

EVERY = 4  # iterations between evaluations on training scenes
DROP_PENALTY = 30.0  # six times what a lift pays: a grasp that fails as often as it holds is not worth trying
ROWS_PER_SPLIT = 48
GROUP = 8  # episodes


class Fault:
    """None; the others change a run after it was opened, or at the start of every iteration."""

    scenes = 0  # that the training is confined to and evaluated on

    def enter(self, run: Run) -> None:
        """Build the fault into an opened run."""

    def before_rollout(self, run: Run) -> None:
        """At the start of an iteration."""


class SplitLinear(nn.Linear):
    """A product in bf16 whose inner dimension is summed in parts, as many as the batch has rows for.

    Kernels of accelerators choose such splits by the shape of the batch (split-K); a CPU's do not, so it is done here.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        parts = 1 + len(inputs) // ROWS_PER_SPLIT
        total = self.bias.bfloat16()
        for a, w in zip(inputs.bfloat16().chunk(parts, -1), self.weight.bfloat16().chunk(parts, -1), strict=True):
            total = total + a @ w.T
        return total.float()


class BatchShape(Fault):
    """Acting and updating round otherwise, and the guard does not look."""

    def enter(self, run: Run) -> None:
        split_products(run.policy)
        learner.RATIO_TOLERANCE = float("inf")


def split_products(policy: nn.Module) -> None:
    """Let all layers that learn round by the shape of their batch."""
    for module in policy.modules():
        if type(module) is nn.Linear and module.weight.requires_grad:
            module.__class__ = SplitLinear


class DropPenalty(Fault):
    """A grasp that is lost costs six times what a lift pays; who does not grasp loses nothing."""

    def enter(self, run: Run) -> None:
        scene.compute_reward = partial(with_drop, scene.compute_reward)


def with_drop(compute: Any, previous: Any, state: Any, config: Any) -> dict[str, Any]:
    """``compute_reward`` with one more term."""
    lost = is_grasped(previous) & ~is_grasped(state) & ~is_success(state, config.lift_threshold)
    return compute(previous, state, config) | {"drop": np.where(lost, -DROP_PENALTY, 0.0)}


class Scenes(ChunkVectorEnv):
    """Environments that play the scene that ``scene_of`` names for a seed, and tell of the scene's seed."""

    def __init__(self, env: ChunkVectorEnv) -> None:
        self.env, self.num_envs = env, env.num_envs
        self.extras, self.objective = env.extras, env.objective  # type: ignore[misc]
        self.asked: list[int] = []
        self.keep_seeds = False

    def scene_of(self, seed: int) -> int:
        """Seed of the scene."""
        return seed

    def reset(self, seeds: Sequence[int]) -> Observation:
        self.asked = list(seeds)
        return self.env.reset([self.scene_of(seed) for seed in seeds])

    def step_chunk(self, actions: NDArray[Any], next_seeds: Sequence[int] | None = None) -> ChunkResult:
        following = None if next_seeds is None else [self.scene_of(seed) for seed in next_seeds]
        result = self.env.step_chunk(actions, following)
        if self.keep_seeds:
            return replace(result, episodes=[replace(e, seed=self.asked[e.env]) for e in result.episodes])
        return result

    def get_state(self) -> dict[str, Any]:
        return self.env.get_state()

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        return self.env.set_state(state)

    def close(self) -> None:
        self.env.close()


class FewScenes(Scenes):
    """The first ``count`` scenes over and over; ``keep_seeds`` tells the seeds that were asked for."""

    def __init__(self, env: ChunkVectorEnv, count: int, keep_seeds: bool = False) -> None:
        super().__init__(env)
        self.count, self.keep_seeds = count, keep_seeds

    def scene_of(self, seed: int) -> int:
        return seed % PASS % self.count


class OnFewScenes(Fault):
    """Training on eight scenes (and their noise anew every time), evaluated on the same eight."""

    scenes = 8

    def enter(self, run: Run) -> None:
        play_in(run, FewScenes(run.env, self.scenes))


def play_in(run: Run, env: ChunkVectorEnv) -> None:
    """Let a run that was just opened begin in another environment."""
    run.env = env
    run.current = RolloutState.start(run.policy, env, run.seeds)


class MixedGroups(Fault):
    """No critic: an episode is compared with the seven others of its group, whose scenes are others."""

    def enter(self, run: Run) -> None:
        run.learner._advantages = lambda buffer: self.advantages(run, buffer)  # type: ignore[method-assign]

    def before_rollout(self, run: Run) -> None:
        self.first = run.current.episodes.copy(), run.current.decisions.copy()

    def advantages(self, run: Run, buffer: RolloutBuffer) -> Advantages:
        """Return against the mean of the group's other episodes, over the group's spread, for every decision."""
        episodes, whole = self.played(buffer)
        zeros = torch.zeros_like(buffer.value)
        to_go = compute_gae(buffer.reward, zeros, zeros, buffer.terminated, buffer.truncated, buffer.discount, 1.0)[1]
        returns: dict[int, float] = {}
        for t, n in zip(*np.nonzero(whole), strict=True):
            returns.setdefault(int(episodes[t, n]), float(to_go[t, n]))  # that of the first decision
        advantage, value = zeros.clone(), to_go.clone()
        for t, n in zip(*np.nonzero(whole), strict=True):
            mine = int(episodes[t, n])
            group = [e for e in range(mine // GROUP * GROUP, (mine // GROUP + 1) * GROUP) if e in returns]
            others = [returns[e] for e in group if e != mine]
            if len(others) > 1:
                value[t, n] = float(np.mean(others))
                advantage[t, n] = (returns[mine] - value[t, n]) / (float(np.std([returns[e] for e in group])) + 1e-6)
        context = {name: tensor.flatten(0, 1) for name, tensor in buffer.context.items()}
        return Advantages(advantage, context, value.flatten(), to_go.flatten())

    def played(self, buffer: RolloutBuffer) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(T, N) numbers of the episodes, and which of them lie within the rollout from their first decision on."""
        ended = (buffer.terminated | buffer.truncated).numpy()
        envs = ended.shape[1]
        rounds = np.vstack([np.zeros((1, envs), dtype=np.int64), np.cumsum(ended, 0)[:-1]])
        episodes = self.first[0] + envs * rounds
        begun = (rounds > 0) | (self.first[1] == 0)
        return episodes, begun & (rounds < ended.sum(0))


class SceneOfGroup(Scenes):
    """All episodes of a group play the scene of its first."""

    def __init__(self, env: ChunkVectorEnv, run: Run) -> None:
        super().__init__(env)
        number = np.arange(run.settings.num_episodes + 4 * env.num_envs)
        own, first = run.seeds.of(number), run.seeds.of(number // GROUP * GROUP)
        self.scenes = dict(zip(own, first, strict=True))

    def scene_of(self, seed: int) -> int:
        return self.scenes[seed]


class GroupsOfOneScene(MixedGroups):
    """The same with the groups as they are meant: eight episodes of one scene."""

    def enter(self, run: Run) -> None:
        super().enter(run)
        play_in(run, SceneOfGroup(run.env, run))


class Bf16Weights(Fault):
    """Weights are kept in bf16: what a step changes by less than half a digit is gone."""

    def enter(self, run: Run) -> None:
        self.parameters = run.policy.policy_parameters()
        self.dot = self.intended = self.kept = 0.0
        optimizer = run.learner.policy_optimizer
        step = optimizer.step
        round_all(self.parameters)

        def rounded_step(*args: Any, **kwargs: Any) -> None:
            before = flat(self.parameters)
            step(*args, **kwargs)
            intended = flat(self.parameters) - before
            round_all(self.parameters)
            self.compare(intended, flat(self.parameters) - before)

        optimizer.step = rounded_step  # type: ignore[method-assign, assignment]

    def compare(self, intended: Tensor, kept: Tensor) -> None:
        """Add a step to the sums of this iteration."""
        self.dot += float(intended @ kept)
        self.intended += float(intended @ intended)
        self.kept += float(kept @ kept)

    def before_rollout(self, run: Run) -> None:
        if self.intended and self.kept:
            cosine = self.dot / (self.intended * self.kept) ** 0.5
            length = (self.kept / self.intended) ** 0.5
            print(f"bf16: cosine of the kept to the intended steps {cosine:.2f}, their length {length:.2f} of it")
        self.dot = self.intended = self.kept = 0.0


def flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters])


@torch.no_grad()
def round_all(parameters: Sequence[nn.Parameter]) -> None:
    """To the nearest bf16 value, as fp32."""
    for parameter in parameters:
        parameter.copy_(parameter.bfloat16().float())


FAULTS: dict[str, type[Fault]] = {
    "": Fault,
    "batch_shape": BatchShape,
    "drop_penalty": DropPenalty,
    "few_scenes": OnFewScenes,
    "mixed_groups": MixedGroups,
    "groups_of_one_scene": GroupsOfOneScene,
    "bf16_weights": Bf16Weights,
}
