"""Supervised stage of the state-based policy: scripted demonstrations in memory, flow matching, a policy directory.

    reinflow-sft-mlp --output-dir runs/flow_mlp
    python train_reinflow.py --preset flow_mlp --flow-mlp-pretrained-path runs/flow_mlp

Demonstrations are those of reinflow-demos (same expert, same disturbances, same ranges) without rendering: physics
only, seconds instead of minutes, and nothing is stored. The policy trains on the states at which it will decide.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import UserError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import SEED, check_ranges
from reinflow_so101.policy_card import write_card
from reinflow_so101.stages.demonstrations import DemoConfig
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe, named, task_env

if TYPE_CHECKING:
    from torch import Tensor

    from reinflow.evaluate import EvalResult
    from reinflow.flow_mlp import FlowMLP

EPISODE_STEPS = 150  # of a demonstration
# By the end of a state's name (without its axis): floor of the std it is normalised by. The expert is at rest when it
# decides; a policy ends its chunks with joints at 1 rad/s, a hundred of the demonstrations' standard deviations.
LEAST_STATE_STD = {"pos_rad": 0.05, "vel": 2.0, "pos": 0.01, "block": 0.01, "quat": 0.1, "force": 0.5, "progress": 0.1}


class FlowMlpSftError(UserError, RuntimeError):
    """The training cannot start or cannot succeed; the message holds the remedy."""


@dataclass(frozen=True)
class FlowMlpSftConfig:
    """Train a small flow-matching MLP on simulator state from scripted demonstrations."""

    output_dir: Path
    """Gets the policy, reinflow.json (its environment) and sft.json; refused if it exists."""
    task: str = "lift"
    """Named task to learn, such as lift or lift_wide (so101_sim/tasks/registry.py)."""
    episodes: int = 30
    """Successful demonstrations. Few make a weak policy, which is what RL is to mend."""
    first_seed: int = 1_000
    """Episode i tried uses environment seed first_seed + i; all stay below the tuning seeds."""
    steps: int = 1_000
    """Optimiser steps."""
    batch_size: int = 128
    """Decisions per step."""
    lr: float = 1e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: float = 1e-4
    """AdamW's."""
    hidden_size: int = 256
    """Width of the three hidden layers."""
    chunk_size: int = 50
    """Actions that the policy predicts and executes; a divisor of an episode's 150. The layers are that wide."""
    jitter: int = 2
    """Train on the frames up to so many control steps after each decision as well."""
    one_step_share: float = 0.5
    """Share of each batch at flow time 1, pure noise, where a sampler of one step (K = 1) looks."""
    num_denoising_steps: int = 1
    """K, stored with the policy and used to evaluate it."""
    eval_episodes: int = 200
    """Noise-free episodes at the end; 0 skips them."""
    eval_seed: int = FIRST_TUNING_SEED
    """First seed of these, a tuning seed: 5,000 to 9,999."""
    num_parallel_envs: int = 32
    """Environments that act at once in the evaluation."""
    seed: Annotated[int, SEED] = 0
    """Of weights, batches and flow noise."""

    def __post_init__(self) -> None:
        named(self.task)
        check_ranges(self, FlowMlpSftError)
        for name in ("episodes", "steps", "batch_size", "hidden_size", "num_denoising_steps", "num_parallel_envs"):
            if getattr(self, name) < 1:
                raise FlowMlpSftError(f"{name} is {getattr(self, name)}: use at least 1")
        if not self.lr > 0:
            raise FlowMlpSftError(f"lr is {self.lr}: use a number above 0")
        if self.chunk_size < 1 or EPISODE_STEPS % self.chunk_size:
            raise FlowMlpSftError(
                f"chunk_size is {self.chunk_size}: use a divisor of {EPISODE_STEPS}, such as 50 or 25"
            )
        if not 0 <= self.jitter < self.chunk_size:
            raise FlowMlpSftError(f"jitter is {self.jitter}: use 0 to chunk_size - 1")
        if not 0.0 <= self.one_step_share <= 1.0:
            raise FlowMlpSftError(f"one_step_share is {self.one_step_share}: use 0 to 1")
        if not 0 <= self.first_seed <= FIRST_TUNING_SEED - self.episodes:
            raise FlowMlpSftError(
                f"first_seed is {self.first_seed}: demonstrations use seeds below {FIRST_TUNING_SEED}"
            )
        if not FIRST_TUNING_SEED <= self.eval_seed <= FIRST_REPORTING_SEED - self.eval_episodes:
            raise FlowMlpSftError(
                f"eval_seed is {self.eval_seed} for {self.eval_episodes} episodes: use tuning seeds, "
                f"{FIRST_TUNING_SEED} to {FIRST_REPORTING_SEED - 1}"
            )


@dataclass
class StateDemonstrations:
    """E successful episodes of L control steps."""

    state: NDArray[np.float32]  # (E, L, S) before each control step
    action: NDArray[np.float32]  # (E, L, 6) what the expert wanted, in the joint frame's units
    tried: int


def collect(config: FlowMlpSftConfig) -> StateDemonstrations:
    """Play the scripted expert without rendering until ``config.episodes`` have lifted.

    Raises:
        FlowMlpSftError: the seeds below the tuning seeds are used up.
    """
    from reinflow_so101.stages.demonstrations import make_env, record_episode
    from so101_sim.expert import ScriptedExpert

    demos = DemoConfig(output_dir=Path(), task=config.task)
    env = make_env(demos, render_images=False, environment_state=True)
    expert = ScriptedExpert(env.model)
    states: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    tried = 0
    try:
        while len(states) < config.episodes:
            if config.first_seed + tried >= FIRST_TUNING_SEED:
                raise FlowMlpSftError(
                    f"{len(states)} of {tried} demonstrations lifted and the seeds below {FIRST_TUNING_SEED} are used "
                    f"up: lower episodes={config.episodes} or first_seed={config.first_seed}"
                )
            frames, lifted = record_episode(env, expert, config.first_seed + tried, demos.disturbance_deg)
            tried += 1
            if lifted:
                states.append(np.stack([frame["environment_state"] for frame in frames]))
                actions.append(np.stack([frame["action"] for frame in frames]).astype(np.float32))
    finally:
        env.close()
    return StateDemonstrations(np.stack(states), np.stack(actions), tried)


def decision_samples(
    data: StateDemonstrations, chunk_size: int, jitter: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (M, S) at and shortly after the decisions, with the chunks (M, n, 6) from there on.

    Beyond the end of an episode, where the expert holds the block up, its last action is repeated.
    """
    length = data.state.shape[1]
    frames = [start + late for start in range(0, length, chunk_size) for late in range(jitter + 1)]
    index = np.minimum(np.array(frames)[:, None] + np.arange(chunk_size), length - 1)  # (frames, n)
    chunks = data.action[:, index]  # (E, frames, n, 6)
    return data.state[:, frames].reshape(-1, data.state.shape[2]), chunks.reshape(-1, *chunks.shape[2:])


def least_state_std() -> list[float]:
    """LEAST_STATE_STD for each of ENVIRONMENT_STATE_NAMES; radians, rad/s, metres, m/s."""
    names = (re.sub("_[wxyz]$", "", name) for name in ENVIRONMENT_STATE_NAMES)
    return [next(floor for end, floor in LEAST_STATE_STD.items() if name.endswith(end)) for name in names]


def train(config: FlowMlpSftConfig, data: StateDemonstrations) -> tuple[FlowMLP, float]:
    """Flow matching on the decisions; returns the policy and the mean loss of the last 100 steps."""
    import torch

    from reinflow.flow_mlp import FlowMLP
    from reinflow.supervised import FitSettings, fit

    states, actions = (torch.from_numpy(x) for x in decision_samples(data, config.chunk_size, config.jitter))
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    policy = FlowMLP(
        states.shape[1], actions.shape[2], config.chunk_size, config.num_denoising_steps, config.hidden_size
    )
    policy.set_statistics(states, actions, torch.tensor(least_state_std()))
    policy.train_only(["trunk", "head"])

    def loss() -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(states), (config.batch_size,), generator=generator)
        return policy.flow_matching_loss(states[rows], actions[rows], generator, config.one_step_share), {}

    settings = FitSettings(config.steps, config.lr, config.weight_decay, betas=(0.9, 0.999), grad_clip_norm=0.0)
    losses = [info["loss"] for _, info in fit(policy.policy_parameters(), loss, settings)]
    return policy.eval(), float(np.mean(losses[-100:]))


def task_environment(task: str = "lift") -> EnvConfig:
    """The task that the policy learns, on simulator state, without images."""
    size = DemoConfig.image_size  # of what is shown to people
    return task_env(task, image_size=size, render_images=False, environment_state=True)


def evaluate_success(config: FlowMlpSftConfig, policy: FlowMLP) -> EvalResult | None:
    """Noise-free episodes on the tuning seeds; None without any."""
    from reinflow.evaluate import evaluate_seeds
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor
    from so101_sim.vector.make import make_vector_env

    if not config.eval_episodes:
        return None
    act = noise_free_actor(policy, ChainSpec(config.num_denoising_steps))
    make_env = partial(make_vector_env, task_environment(config.task))
    return evaluate_seeds(act, make_env, config.eval_seed, config.eval_episodes, config.num_parallel_envs)


def save(config: FlowMlpSftConfig, policy: FlowMLP, record: dict[str, Any]) -> None:
    """The policy, its environment (reinflow.json), and how it was made (sft.json)."""
    policy.save_pretrained(config.output_dir)
    write_card(config.output_dir, task_environment(config.task))
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "output_dir"}
    (config.output_dir / "sft.json").write_text(json.dumps(settings | record, indent=2) + "\n", encoding="utf-8")


def finetune(config: FlowMlpSftConfig) -> dict[str, Any]:
    """Collect, train, evaluate, save; returns what was measured."""
    if config.output_dir.exists():
        raise FlowMlpSftError(f"output_dir={config.output_dir} exists: choose another or remove it first")
    print(f"task: {describe(task_environment(config.task))}", flush=True)
    start = time.perf_counter()
    data = collect(config)
    print(f"{len(data.state)} of {data.tried} demonstrations lifted, {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    policy, loss = train(config, data)
    print(f"{config.steps} steps, loss {loss:.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    result = evaluate_success(config, policy)
    record: dict[str, Any] = {"demonstrations_tried": data.tried, "loss": round(loss, 5)}
    if result:
        record |= {"success": round(result.success_rate, 4), "success_ci95": [round(x, 4) for x in result.interval]}
        print(f"K={config.num_denoising_steps}, seeds from {config.eval_seed}: {result.summary()}", flush=True)
    save(config, policy, record)
    print(f"wrote {config.output_dir}")
    return record


def main() -> None:
    """reinflow-sft-mlp."""
    import tyro

    run_command("reinflow-sft-mlp", lambda: finetune(tyro.cli(FlowMlpSftConfig, description=__doc__)))
