"""Supervised stage of the state-based policy: demonstrations, flow matching, a policy directory.

    reinflow-sft-mlp --output-dir runs/flow_mlp
    python train_reinflow.py --preset flow_mlp --flow-mlp-pretrained-path runs/flow_mlp

Demonstrations are those of reinflow-demos (same expert, same disturbances, same ranges) without rendering: physics
only, seconds instead of minutes, and nothing is stored. The policy trains on the states at which it will decide.

A data set of states (reinflow-demos --environment-state, reinflow-collect, Minari) comes in by --dataset-root, with the
environment that it is from:

    reinflow-sft-mlp --dataset-root runs/half --chunk-size 16 --n-action-steps 8 --num-denoising-steps 8 --output-dir D
    reinflow-sft-mlp --dataset-root runs/hopper --chunk-size 4 --every-frame --num-denoising-steps 4 --output-dir D
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import UserError, run_command
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from reinflow.stage import StageDirectory
from reinflow_so101.stages.demonstrations import DemoConfig
from reinflow_so101.stages.state_data import chunks_at, decision_starts, read_state_dataset
from reinflow_so101.stages.state_game import StateGame, arm_game, game_of, least_state_std
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import named, task_env

if TYPE_CHECKING:
    from torch import Tensor

    from reinflow.evaluate import EvalResult
    from reinflow.flow_mlp import FlowMLP

__all__ = ["FlowMlpSftConfig", "FlowMlpSftError", "collect", "decision_samples", "finetune", "least_state_std"]

COMMAND = "reinflow-sft-mlp"
LOG_EVERY = 10  # steps
EPISODE_STEPS = 150  # of a demonstration


class FlowMlpSftError(UserError, RuntimeError):
    """The training cannot start or cannot succeed; the message holds the remedy."""


@dataclass(frozen=True)
class FlowMlpSftConfig:
    """Train a small flow-matching MLP on simulator state from scripted demonstrations."""

    output_dir: Path
    """Gets the policy, reinflow.json (its environment) and sft.json; refused if it exists."""
    task: str = "lift"
    """Named task to learn, such as lift or lift_wide (so101_sim/tasks/registry.py); a data set brings its own."""
    dataset_root: str = ""
    """Data set of states to learn from, or "minari:ID"; empty plays scripted demonstrations."""
    dataset_episodes: Annotated[int, NOT_NEGATIVE] = 0
    """Use the first so many episodes of the data set; 0 takes all."""
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
    """Actions that the policy predicts; where it executes all of them a divisor of an episode's 150. The layers are
    that wide."""
    n_action_steps: Annotated[int, Range(0, 1_000)] = 0
    """How many of them it executes before it decides again; 0 is all."""
    jitter: int = 2
    """Train on the frames up to so many control steps after each decision as well."""
    every_frame: bool = False
    """Train on every frame of the data set, as for gaits, where a decision falls anywhere."""
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
    save_every: Annotated[int, POSITIVE] = 250
    """Steps between savings of what --resume goes on from."""
    seed: Annotated[int, SEED] = 0
    """Of weights, batches and flow noise."""
    resume: bool = False
    """Go on with a stage that was cut off, in output_dir."""

    def __post_init__(self) -> None:
        named(self.task)
        check_ranges(self, FlowMlpSftError)
        for name in ("episodes", "steps", "batch_size", "hidden_size", "num_denoising_steps", "num_parallel_envs"):
            if getattr(self, name) < 1:
                raise FlowMlpSftError(f"{name} is {getattr(self, name)}: use at least 1")
        if not self.lr > 0:
            raise FlowMlpSftError(f"lr is {self.lr}: use a number above 0")
        whole = self.n_action_steps or self.dataset_root or not EPISODE_STEPS % max(1, self.chunk_size)
        if self.chunk_size < 1 or not whole:
            raise FlowMlpSftError(
                f"chunk_size is {self.chunk_size}: use a divisor of {EPISODE_STEPS}, such as 50 or 25"
            )
        if self.n_action_steps > self.chunk_size:
            raise FlowMlpSftError(f"n_action_steps is {self.n_action_steps}: use at most chunk_size={self.chunk_size}")
        if self.every_frame and not self.dataset_root:
            raise FlowMlpSftError("every_frame is for a data set: give dataset_root, or leave it out")
        scripted = {f.name: f.default for f in fields(self) if f.name in ("episodes", "first_seed", "task")}
        given = [name for name, default in scripted.items() if getattr(self, name) != default]
        if self.dataset_root and given:
            raise FlowMlpSftError(
                f"{', '.join(given)} not read with dataset_root, which says them itself: leave it out"
            )
        if not self.every_frame and not 0 <= self.jitter < self.chunk_size:
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

    @property
    def decides_every(self) -> int:
        """Control steps between decisions."""
        return self.n_action_steps or self.chunk_size


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
    data: StateDemonstrations, chunk_size: int, jitter: int, every: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (M, S) at and shortly after the decisions, with the chunks (M, H, 6) from there on. A decision falls every
    so many control steps, 0: after each chunk.

    Beyond the end of an episode, where the expert holds the block up, its last action is repeated.
    """
    length = data.state.shape[1]
    frames = [start + late for start in range(0, length, every or chunk_size) for late in range(jitter + 1)]
    frames = [frame for frame in frames if frame < length]
    index = np.minimum(np.array(frames)[:, None] + np.arange(chunk_size), length - 1)  # (frames, n)
    chunks = data.action[:, index]  # (E, frames, n, 6)
    return data.state[:, frames].reshape(-1, data.state.shape[2]), chunks.reshape(-1, *chunks.shape[2:])


def read_samples(config: FlowMlpSftConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same of a data set: states (M, S) and chunks (M, H, A)."""
    episodes = read_state_dataset(config.dataset_root)
    every, jitter = (1, 0) if config.every_frame else (config.decides_every, config.jitter)
    count = config.dataset_episodes or len(episodes.actions)
    starts = [start for start in decision_starts(episodes, every, jitter) if start[0] < count]
    print(f"{min(count, len(episodes.actions))} episodes, {len(starts)} samples of {config.dataset_root}", flush=True)
    return chunks_at(episodes.states, starts, 1)[:, 0], chunks_at(episodes.actions, starts, config.chunk_size)


def train(
    config: FlowMlpSftConfig,
    samples: tuple[NDArray[np.float32], NDArray[np.float32]],
    game: StateGame,
    stage: StageDirectory,
) -> tuple[FlowMLP, float]:
    """Flow matching on states (M, S) and chunks (M, H, A); returns the policy and the mean loss of the last 100
    steps."""
    import torch

    from reinflow.flow_mlp import FlowMLP
    from reinflow.supervised import FitSettings, Progress, fit

    states, actions = (torch.from_numpy(x) for x in samples)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    policy = FlowMLP(
        states.shape[1], actions.shape[2], config.chunk_size, config.num_denoising_steps, config.hidden_size,
        n_action_steps=config.n_action_steps,
    )  # fmt: skip
    policy.set_statistics(states, actions, torch.tensor(game.least_state_std(states.shape[1])))
    policy.train_only(["trunk", "head"])

    def loss() -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(states), (config.batch_size,), generator=generator)
        return policy.flow_matching_loss(states[rows], actions[rows], generator, config.one_step_share), {}

    settings = FitSettings(config.steps, config.lr, config.weight_decay, betas=(0.9, 0.999), grad_clip_norm=0.0)
    progress = Progress(stage.progress_dir, {"policy": policy}, {"batches": generator}, config.save_every)
    stage.resumed_at(progress.done)
    losses: list[float] = []
    for step, info in fit(policy.policy_parameters(), loss, settings, progress, "flow matching"):
        losses.append(info["loss"])
        if step % LOG_EVERY == 0 or step == config.steps:
            stage.log(step, {name: round(value, 6) for name, value in info.items()})
    return policy.eval(), float(np.mean(losses[-100:]))


def task_environment(task: str = "lift") -> EnvConfig:
    """The task that the policy learns, on simulator state, without images."""
    size = DemoConfig.image_size  # of what is shown to people
    return task_env(task, image_size=size, render_images=False, environment_state=True)


def game_to_learn(config: FlowMlpSftConfig) -> StateGame:
    """The data set's environment, or the named task."""
    return game_of(config.dataset_root) if config.dataset_root else arm_game(task_environment(config.task))


def evaluate_success(config: FlowMlpSftConfig, policy: FlowMLP) -> EvalResult | None:
    """Noise-free episodes on the tuning seeds; None without any, or where nothing says what is played."""
    seeds = range(config.eval_seed, config.eval_seed + config.eval_episodes)
    return game_to_learn(config).evaluate(policy, config.num_denoising_steps, seeds, config.num_parallel_envs)


def save(config: FlowMlpSftConfig, policy: FlowMLP, record: dict[str, Any]) -> None:
    """The policy, its environment (reinflow.json), and how it was made (sft.json)."""
    policy.save_pretrained(config.output_dir)
    game_to_learn(config).write_card(config.output_dir)
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "output_dir"}
    (config.output_dir / "sft.json").write_text(json.dumps(settings | record, indent=2) + "\n", encoding="utf-8")


def finetune(config: FlowMlpSftConfig) -> dict[str, Any]:
    """Collect or read, train, evaluate, save; returns what was measured."""
    if config.output_dir.exists() and not config.resume:
        raise FlowMlpSftError(f"output_dir={config.output_dir} exists: choose another or remove it first")
    game = game_to_learn(config)
    print(f"task: {game}", flush=True)
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "output_dir"}
    with StageDirectory.open(config.output_dir, settings, config.resume, COMMAND) as stage:
        start, record = time.perf_counter(), dict[str, Any]()
        if config.dataset_root:
            samples = read_samples(config)
        else:
            data = collect(config)
            record["demonstrations_tried"] = data.tried
            spent = time.perf_counter() - start
            print(f"{len(data.state)} of {data.tried} demonstrations lifted, {spent:.1f} s", flush=True)
            samples = decision_samples(data, config.chunk_size, config.jitter, config.n_action_steps)
        start = time.perf_counter()
        policy, loss = train(config, samples, game, stage)
        print(f"{config.steps} steps, loss {loss:.4f}, {time.perf_counter() - start:.1f} s", flush=True)
        record["loss"] = round(loss, 5)
        if result := evaluate_success(config, policy):
            record |= game.score(result)
            print(f"K={config.num_denoising_steps}, seeds from {config.eval_seed}: {result.summary()}", flush=True)
        save(config, policy, record)
        stage.finish(record)
    print(f"wrote {config.output_dir}")
    return record


def main() -> None:
    """reinflow-sft-mlp."""
    import tyro

    run_command("reinflow-sft-mlp", lambda: finetune(tyro.cli(FlowMlpSftConfig, description=__doc__)))
