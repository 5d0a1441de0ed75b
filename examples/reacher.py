"""Another robot on reinflow/ alone: Gymnasium's Reacher learns to reach, from a policy that knows nothing.

python examples/reacher.py --output-dir runs/reacher              # some three minutes on 2 cores
python examples/reacher.py --output-dir runs/reacher --resume     # after an interruption, or with more episodes
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
import tyro

from reinflow import run_command
from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Extra, Observation
from reinflow.evaluate import EvalResult, evaluate_seeds
from reinflow.flow import ChainSpec
from reinflow.flow_mlp import FlowMLP
from reinflow.learner import LearnerSettings, PPOLearner
from reinflow.rollout import RolloutSettings, collect_rollout, noise_free_actor
from reinflow.run import Run, RunSettings
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED

STEPS, CHUNK, REACHED_M = 50, 10, 0.02  # of an episode, of a chunk; fingertip to target
STATE_SCALE = (1, 1, 1, 1, 0.15, 0.15, 5, 5, 0.15, 0.15)  # cosines, sines, target, joint speeds, gap


class Reacher(ChunkVectorEnv):
    """N arms with two joints: torques (N, n, 2), state (N, 10). Success: at the target when the time is over."""

    extras: ClassVar = {"distance": Extra("From fingertip to target at the end, metres.", "distance {:.3f} m")}

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.envs = num_envs, [gymnasium.make("Reacher-v5").unwrapped for _ in range(num_envs)]

    def reset(self, seeds: Sequence[int]) -> Observation:
        self.seeds, self.length, self.sums = list(seeds), 0, np.zeros((2, self.num_envs))
        self.seen = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)])
        return self.observe()

    def observe(self) -> Observation:
        return {"environment_state": self.seen.astype(np.float32)}

    def step_chunk(self, actions: np.ndarray, next_seeds: Sequence[int] | None = None) -> ChunkResult:
        near, reached = np.zeros((2, *actions.shape[:2]))  # the terms of the reward
        for row, env in enumerate(self.envs):
            for i, torque in enumerate(np.clip(actions[row], -1, 1)):
                self.seen[row], _, _, _, info = env.step(torque)
                near[row, i] = info["reward_dist"]
        self.length += actions.shape[1]
        over = np.full(self.num_envs, self.length == STEPS)
        reached[:, -1] = 5.0 * (over & (near[:, -1] > -REACHED_M))
        self.sums += np.stack([near.sum(1), reached.sum(1)])
        final, episodes = (self.observe(), self.episodes(-near[:, -1])) if over.any() else (None, [])
        if over.any() and next_seeds is not None:
            self.reset(next_seeds)
        return ChunkResult(
            self.observe(), near + reached, {"near": near, "reached": reached}, np.ones(near.shape, dtype=bool),
            terminated=np.zeros_like(over), truncated=over, final_indices=np.flatnonzero(over),
            final_observation=final, environment_states=None, episodes=episodes,
        )  # fmt: skip

    def episodes(self, gaps: np.ndarray) -> list[EpisodeStats]:
        terms = [{"near": near, "reached": reached} for near, reached in self.sums.T.tolist()]
        rows = enumerate(zip(self.seeds, terms, gaps.tolist(), strict=True))
        return [
            EpisodeStats(i, seed, sum(sums.values()), STEPS, gap < REACHED_M, sums, {"distance": gap})
            for i, (seed, sums, gap) in rows
        ]

    def get_state(self) -> dict[str, Any]:
        return {"seeds": self.seeds}  # a rollout is whole episodes: it ends where the next ones start

    def set_state(self, state: Mapping[str, Any]) -> Observation:
        return self.reset(state["seeds"])


def train(output_dir: Path, episodes: int = 16_000, seed: int = 0, resume: bool = False) -> EvalResult:
    """Train a policy that reaches; noise-free success of the best checkpoint on reporting seeds."""
    torch.manual_seed(seed)
    env, policy, spec = Reacher(32), FlowMLP(10, 2, CHUNK, sigma_min=0.15, sigma_max=0.15), ChainSpec(1, "action")
    policy.state_std.copy_(torch.tensor(STATE_SCALE))
    discounting = RolloutSettings(gamma=0.99, time_limit_is_terminal=True)
    update = LearnerSettings(
        policy_optimizer="natural", target_kl=0.05, num_ppo_epochs=1, num_critic_epochs=20, critic_lr=1e-3, gamma=0.99,
        gae_lambda=0.9, time_limit_is_terminal=True, minibatch_size=160, gradient_accumulation_steps=6,
    )  # fmt: skip
    learner = PPOLearner(policy.eval(), spec, update, seed)
    settings = RunSettings(episodes, save_interval=1_920, seed=seed)
    again = f"python examples/reacher.py --output-dir {output_dir} --seed {seed} --resume"
    config = asdict(update) | asdict(spec) | {"seed": seed}
    run = Run(output_dir, policy, env, learner, settings, config, resume_command=again)

    def success(first_seed: int) -> EvalResult:
        return evaluate_seeds(noise_free_actor(policy, spec), Reacher, first_seed, episodes=200, num_envs=50)

    with run.resume() if resume else run.start():
        for iteration in run.iterations():
            buffer, info, run.current = collect_rollout(
                policy, env, run.current, 6 * STEPS // CHUNK, spec, discounting, learner.normalizer, run.seeds
            )
            run.count(info.episodes)
            run.metrics |= info.metrics() | learner.update(buffer)
            if iteration % 10 == 0:
                run.metrics |= (result := success(FIRST_TUNING_SEED)).metrics()
                run.keep_if_best(result)
            run.log()
            run.save_if_due()
        run.finish()
        run.load_best()
        result = success(FIRST_REPORTING_SEED)
        run.tracker.message(f"seeds from {FIRST_REPORTING_SEED}: {result.summary()}")
    return result


if __name__ == "__main__":
    run_command("reacher", lambda: tyro.cli(train))
