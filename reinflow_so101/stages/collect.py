"""A medium-level data set of a Gymnasium task: PPO until its return reaches a target, then episodes that it plays.

    reinflow-collect --env-id Hopper-v5 --output-dir data/hopper
    reinflow-collect --env-id Hopper-v5 --output-dir data/hopper --resume     # after an interruption
    reinflow-sft-mlp --dataset-root data/hopper --output-dir runs/hopper_bc

The data set is a LeRobotDataset v3 of states, executed actions, rewards and ends. Its policy acts with its own noise.
Needs stable-baselines3: pip install "reinflow-so101[gym]". A killed training goes on from its last saving (with new
episodes, so not bit for bit), a killed recording from the trained policy.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from reinflow import ConfigError, run_command
from reinflow.progress import progress_bar
from reinflow.seeds import FIRST_TUNING_SEED
from reinflow.settings import NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges, cut
from reinflow.stage import StageDirectory
from reinflow_gym.collect import TARGETS, TrainSettings, known_target, require_sb3
from reinflow_gym.config import GymConfig

if TYPE_CHECKING:
    from reinflow_gym.collect import Episodes, MediumPolicy
    from reinflow_gym.vector import GymVectorEnv

COMMAND = "reinflow-collect"


@dataclass(frozen=True)
class CollectConfig:
    """Train a medium-level policy of a Gymnasium task and record its episodes."""

    output_dir: Path
    """Becomes the data set; refused if it exists, unless resumed."""
    env_id: str = "Hopper-v5"
    """Gymnasium's name, of any environment with flat Box observations and Box actions."""
    max_steps_per_episode: Annotated[int, Range(1, 100_000)] = 1_000
    """Time limit in control steps."""
    target_return: float = math.nan
    """Mean return at which the training ends; without it a known environment's own, see TARGETS."""
    max_steps: Annotated[int, POSITIVE] = 3_000_000
    """Environment steps after which the training ends anyhow."""
    minutes: Annotated[float, POSITIVE] = 30.0
    """Of training, after which it ends anyhow."""
    control_steps: Annotated[int, POSITIVE] = 100_000
    """Control steps to record, at least: whole episodes until it is reached."""
    episodes: Annotated[int, NOT_NEGATIVE] = 0
    """Record so many episodes instead; 0 goes by control_steps."""
    eval_episodes: Annotated[int, POSITIVE] = 20
    """Tuning episodes that the target is compared on."""
    save_interval: Annotated[int, POSITIVE] = TrainSettings.save_interval
    """Environment steps of training between savings; the policy is looked at as often."""
    lr: Annotated[float, Range(0, 1, low_included=False)] = TrainSettings.lr
    """PPO's learning rate."""
    log_std: Annotated[float, Range(-5, 1)] = TrainSettings.log_std
    """Logarithm of the exploration's standard deviation at the start."""
    entropy: Annotated[float, NOT_NEGATIVE] = TrainSettings.entropy
    """Weight of PPO's entropy bonus."""
    seed: Annotated[int, SEED] = 0
    """Of the training; episode i of the recording has the environment seed i."""
    num_threads: Annotated[int, Range(1, 1_024)] = 1
    """Of torch: networks this small are fastest with one."""
    resume: bool = False
    """Go on with one that was cut off."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.episodes > FIRST_TUNING_SEED:
            raise ConfigError(f"episodes={self.episodes}: use at most {FIRST_TUNING_SEED}, the seeds of recordings")
        if not math.isfinite(self.settings().target_return):
            raise ConfigError(
                f"target_return is not given and {self.env_id} is none of {', '.join(TARGETS)}: say which mean return "
                "is medium, such as --target-return 500"
            )

    def env(self) -> GymConfig:
        """The environment."""
        return cut(self, GymConfig)

    def settings(self) -> TrainSettings:
        """Of the training."""
        known = known_target(self.env_id)
        given = math.isfinite(self.target_return) or known is None
        return cut(self, TrainSettings, target_return=self.target_return if given else known)


def collect(config: CollectConfig) -> dict[str, Any]:
    """Train, record, write; returns what was measured.

    Raises:
        ConfigError: stable-baselines3 is missing, the environment does not work, or the directory.
    """
    require_sb3()
    import torch

    torch.set_num_threads(config.num_threads)
    settings = {"output_dir": str(config.output_dir), "env": config.env().to_json(), **asdict(config.settings())}
    settings |= {"control_steps": config.control_steps, "episodes": config.episodes}
    with (
        StageDirectory.open(config.output_dir, settings, config.resume, COMMAND) as stage,
        _vector_env(config.env()) as env,
    ):
        policy = _trained(config, stage, env)
        start = time.monotonic()
        episodes = _recorded(config, policy, env)
        _write(config, stage, episodes, env.fps)
        returns, lengths = episodes.returns, [len(rewards) for rewards in episodes.rewards]
        figures = {
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "length_mean": float(np.mean(lengths)),
            "terminated_share": float(np.mean(episodes.terminated)),
            "episodes": len(returns),
            "control_steps": episodes.num_steps,
            "trained_steps": policy.steps,
            "seconds_training": policy.seconds,
            "seconds_recording": time.monotonic() - start,
        }
        stage.finish({name: round(value, 4) for name, value in figures.items()})
    print(
        f"wrote {config.output_dir}: {len(returns)} episodes, {episodes.num_steps} control steps, mean return "
        f"{figures['return_mean']:.0f} (std {figures['return_std']:.0f}), mean length {figures['length_mean']:.0f}"
    )
    return figures


def _vector_env(config: GymConfig) -> GymVectorEnv:
    from reinflow_gym.collect import RECORDING_ENVS
    from reinflow_gym.vector import GymVectorEnv

    return GymVectorEnv(config, RECORDING_ENVS, num_workers=0)  # a step at a time, which messages would slow down


def _trained(config: CollectConfig, stage: StageDirectory, env: GymVectorEnv) -> MediumPolicy:
    """The policy at its medium level."""
    from reinflow_gym.collect import MediumPolicy, evaluate_return

    settings = config.settings()
    policy = MediumPolicy(config.env(), settings, stage.progress_dir)
    stage.resumed_at(policy.steps)
    done, reached = policy.steps, math.nan
    with progress_bar("training (at most), control steps", settings.max_steps, done=done) as advance:
        for figures in policy.train(lambda: evaluate_return(env, policy.act, config.eval_episodes)):
            stage.log(policy.steps, {name: v for name, v in figures.items() if name != "steps" and math.isfinite(v)})
            reached = figures.get("eval_return", reached)
            advance(policy.steps - done, f"return {figures['return']:.0f} of {settings.target_return:.0f}")
            done = policy.steps
    if reached < settings.target_return:
        print(
            f"the training ended at {policy.steps} steps with mean return {reached:.0f}, below target_return="
            f"{settings.target_return:.0f}: give it more --minutes and --max-steps for a better one"
        )
    policy.close()
    return policy


def _recorded(config: CollectConfig, policy: MediumPolicy, env: GymVectorEnv) -> Episodes:
    from reinflow_gym.collect import record

    counted = "episodes" if config.episodes else "control steps"
    shown = 0

    def show(episodes: Episodes) -> None:
        nonlocal shown
        done = len(episodes.rewards) if config.episodes else episodes.num_steps
        advance(done - shown, f"mean return {np.mean(episodes.returns):.0f}")
        shown = done

    seeds = range(config.episodes or FIRST_TUNING_SEED)
    with progress_bar(f"recording, {counted}", config.episodes or config.control_steps) as advance:
        return record(env, policy.act, seeds, 0 if config.episodes else config.control_steps, show)


def _write(config: CollectConfig, stage: StageDirectory, episodes: Episodes, fps: int) -> None:
    """The data set, made aside and then put in its place: what a killed one left there is written again."""
    from reinflow_so101.stages.state_data import StateEpisodes, write_state_dataset

    aside = stage.progress_dir / "dataset"
    shutil.rmtree(aside, ignore_errors=True)
    data = StateEpisodes(episodes.states, episodes.actions, list(episodes.rewards), episodes.terminated)
    write_state_dataset(aside, data, fps, f"play {config.env_id}", {"env": config.env().to_json()})
    for part in sorted(aside.iterdir()):
        shutil.rmtree(config.output_dir / part.name, ignore_errors=True)
        part.rename(config.output_dir / part.name)


def main() -> None:
    """reinflow-collect."""
    import tyro

    run_command(COMMAND, lambda: collect(tyro.cli(CollectConfig, description=__doc__)))
