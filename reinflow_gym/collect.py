"""A policy of medium level for a Gymnasium task, trained here by PPO, and the episodes that it plays.

PPO is stable-baselines3's, an optional dependency that only this module loads: Gymnasium's own environments and no
more are needed, it is maintained, and a million steps take minutes on one core (its SAC needs a tenth of the steps
and some thirty times as long a step). What a killed training goes on from is safetensors and JSON as everywhere here:
nothing is pickled, so SB3's own zip files are neither written nor read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError
from reinflow.seeds import FIRST_TUNING_SEED
from reinflow.settings import NOT_NEGATIVE, POSITIVE, SEED, Range, check_ranges
from reinflow_gym.config import GymConfig
from reinflow_gym.group import make_single
from reinflow_gym.vector import GymVectorEnv

if TYPE_CHECKING:
    import gymnasium

TARGETS = {"Hopper": 1_450.0, "Walker2d": 2_700.0, "HalfCheetah": 2_500.0, "Ant": 1_250.0}
"""Mean return of a medium policy, by the environment's name without its version; near the paper's starts."""
RECORDING_ENVS, TRAINING_ENVS, ROLLOUT_STEPS = 16, 8, 256
SEEN_LIMIT = 10.0  # standard deviations

Act = Callable[[NDArray[np.float32], NDArray[np.float64]], NDArray[np.float64]]
"""States (N, S) and standard normal noise (N, A) -> actions (N, A)."""


def known_target(env_id: str) -> float | None:
    """The medium level of a known environment."""
    return TARGETS.get(env_id.rpartition(":")[2].partition("-")[0])


@dataclass(frozen=True)
class TrainSettings:
    """How the medium policy is trained, and when that ends."""

    target_return: float
    """The first policy whose mean return over ``eval_episodes`` tuning episodes reaches it is taken."""
    max_steps: Annotated[int, POSITIVE] = 3_000_000
    """Environment steps after which the policy is taken as it is."""
    minutes: Annotated[float, POSITIVE] = 30.0
    """Of wall clock, after which it is taken as it is."""
    eval_episodes: Annotated[int, POSITIVE] = 20
    """Episodes of an evaluation."""
    save_interval: Annotated[int, POSITIVE] = 20_480
    """Environment steps between savings; an evaluation is due where the training's own episodes reach the target."""
    lr: Annotated[float, Range(0, 1, low_included=False)] = 3e-4
    """Adam's."""
    log_std: Annotated[float, Range(-5, 1)] = -0.5
    """Logarithm of the exploration's standard deviation at the start."""
    entropy: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the entropy bonus."""
    seed: Annotated[int, SEED] = 0
    """Of the training."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class Episodes:
    """Recorded episodes; L differs from one to the next."""

    states: list[NDArray[np.float32]] = field(default_factory=list)  # (L, S) before each control step
    actions: list[NDArray[np.float32]] = field(default_factory=list)  # (L, A) as executed, within the Box
    rewards: list[NDArray[np.float32]] = field(default_factory=list)  # (L,)
    terminated: list[bool] = field(default_factory=list)  # ended by itself; False: by the time limit
    seeds: list[int] = field(default_factory=list)

    @property
    def returns(self) -> list[float]:
        """Undiscounted."""
        return [float(rewards.astype(np.float64).sum()) for rewards in self.rewards]

    @property
    def num_steps(self) -> int:
        """Control steps of all."""
        return sum(map(len, self.rewards))


def require_sb3() -> None:
    """Raise ConfigError, with the remedy, where stable-baselines3 is not installed."""
    import importlib.util

    if importlib.util.find_spec("stable_baselines3") is None:
        raise ConfigError('a medium policy is trained by stable-baselines3: pip install "reinflow-so101[gym]"')


class MediumPolicy:
    """A PPO in training: its environments, its normalisation, and what a killed training goes on from.

    Args:
        config: the environment.
        settings: of the training.
        directory: where the state is kept; what is there is loaded.

    Raises:
        ConfigError: stable-baselines3 is not installed, or the environment does not work.
        CheckpointError: what is there is damaged, or of other settings.
    """

    def __init__(self, config: GymConfig, settings: TrainSettings, directory: Path) -> None:
        require_sb3()
        from reinflow.checkpoint import list_checkpoints

        self.settings, self.directory = settings, directory
        self.seconds, self.trained = 0.0, False  # spent; whether the target or a limit was reached
        self.model, self.venv = _make_ppo(config, settings)
        if list_checkpoints(directory):
            self._load()

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return int(self.model.num_timesteps)

    def act(self, states: NDArray[np.float32], noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Act`: the policy's own Gaussian; the environment clips to its Box."""
        import torch

        seen = self.venv.obs_rms
        scaled = (states - seen.mean) / np.sqrt(seen.var + self.venv.epsilon)
        observation = torch.as_tensor(np.clip(scaled, -SEEN_LIMIT, SEEN_LIMIT), dtype=torch.float32)
        with torch.no_grad():
            normal: Any = self.model.policy.get_distribution(observation).distribution
        return normal.mean.numpy() + normal.stddev.numpy() * noise

    def train(self, evaluate: Callable[[], float]) -> Iterator[dict[str, float]]:
        """Until the target or a limit is reached; saved after the loop's body, as by `reinflow.supervised.fit`.

        Args:
            evaluate: mean return of `act` now.

        Yields:
            "steps", "return" of the latest training episodes (NaN before the first) and "eval_return", if measured.
        """
        from stable_baselines3.common.logger import Logger

        settings = self.settings
        self.model.set_logger(Logger(None, []))  # its own makes a folder in the system's temporary one each time
        while not self.trained:
            start = time.monotonic()
            self.model.learn(min(settings.save_interval, settings.max_steps - self.steps), reset_num_timesteps=False)
            latest = [episode["r"] for episode in self.model.ep_info_buffer or ()][-settings.eval_episodes :]
            figures = {"steps": float(self.steps), "return": float(np.mean(latest)) if latest else float("nan")}
            spent = self.seconds + time.monotonic() - start
            over = self.steps >= settings.max_steps or spent >= 60 * settings.minutes
            if over or figures["return"] >= settings.target_return:
                figures["eval_return"] = evaluate()
                self.trained = over or figures["eval_return"] >= settings.target_return
            self.seconds += time.monotonic() - start
            yield figures
            self._save()

    def _save(self) -> None:
        from reinflow.checkpoint import prune_checkpoints, save_checkpoint

        moments = {name: getattr(self.venv, name) for name in ("obs_rms", "ret_rms")}
        state = {
            "steps": self.steps,
            "seconds": self.seconds,
            "trained": self.trained,
            "optimizer": self.model.policy.optimizer.state_dict(),
            **{name: {part: getattr(m, part) for part in ("mean", "var", "count")} for name, m in moments.items()},
        }
        save_checkpoint(self.directory, self.steps, lambda _: None, {"policy": self.model.policy.state_dict()}, state)
        prune_checkpoints(self.directory, keep=1)

    def _load(self) -> None:
        from reinflow.checkpoint import load_training_state
        from reinflow.training_state import load_optimizer, strict_load

        tensors, state = load_training_state(self.directory)
        strict_load(self.model.policy.state_dict(), tensors["policy"], f"the policy in {self.directory}")
        load_optimizer(self.model.policy.optimizer, state["optimizer"], f"the optimiser in {self.directory}")
        for name in ("obs_rms", "ret_rms"):
            for part, value in state[name].items():
                setattr(getattr(self.venv, name), part, value)
        self.model.num_timesteps, self.seconds, self.trained = state["steps"], state["seconds"], state["trained"]

    def close(self) -> None:
        """Close the training's environments."""
        self.venv.close()


def _make_ppo(config: GymConfig, settings: TrainSettings) -> tuple[Any, Any]:
    """A PPO and the VecNormalize that scales its observations and rewards."""
    from gymnasium.wrappers import TimeLimit
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

    def make() -> gymnasium.Env[Any, Any]:
        return TimeLimit(make_single(config), config.max_steps_per_episode)

    venv = VecNormalize(VecMonitor(DummyVecEnv([make] * TRAINING_ENVS)), gamma=0.99, clip_obs=SEEN_LIMIT)
    model = PPO(
        "MlpPolicy", venv, settings.lr, ROLLOUT_STEPS, batch_size=64, n_epochs=10, gamma=0.99, gae_lambda=0.95,
        clip_range=0.2, ent_coef=settings.entropy, policy_kwargs={"log_std_init": settings.log_std},
        seed=settings.seed, device="cpu",
    )  # fmt: skip
    return model, venv


def record(
    env: GymVectorEnv,
    act: Act,
    seeds: Sequence[int],
    min_steps: int = 0,
    progress: Callable[[Episodes], None] | None = None,
) -> Episodes:
    """Play episodes of these seeds; where an episode starts and its noise follow from its seed.

    Args:
        env: plays N at a time.
        act: the policy.
        seeds: of the episodes, one after the other.
        min_steps: end with the batch of N that reaches so many control steps; 0 plays all.
        progress: called after each batch.

    Raises:
        ConfigError: no seed.
    """
    if not seeds:
        raise ConfigError("no seed to record: give one episode or more")
    episodes = Episodes()
    for first in range(0, len(seeds), env.num_envs):
        batch = list(seeds[first : first + env.num_envs])
        _record_batch(env, act, batch, episodes)
        if progress:
            progress(episodes)
        if min_steps and episodes.num_steps >= min_steps:
            break
    return episodes


def _record_batch(env: GymVectorEnv, act: Act, seeds: list[int], episodes: Episodes) -> None:
    """One episode of each seed; environments without one play the last seed, and nothing of theirs is kept."""
    played = seeds + seeds[-1:] * (env.num_envs - len(seeds))
    generators = [np.random.default_rng(seed) for seed in played]
    low, high = env.spaces.low.astype(np.float64), env.spaces.high.astype(np.float64)
    states = env.reset(played)["environment_state"]
    rows: list[tuple[Any, ...]] = []
    while True:
        noise = np.stack([generator.standard_normal(env.action_dim) for generator in generators])
        actions = np.clip(act(states, noise), low, high)
        result = env.step_chunk(actions[:, None])
        rows.append((states, actions, result.rewards[:, 0], result.active[:, 0], result.terminated))
        states = result.observation["environment_state"]
        if not result.active.any():
            break
    seen, told, rewards, active, terminated = (np.stack(column) for column in zip(*rows, strict=True))
    for row, seed in enumerate(seeds):
        length = int(active[:, row].sum())
        episodes.states.append(seen[:length, row])
        episodes.actions.append(told[:length, row].astype(np.float32))
        episodes.rewards.append(rewards[:length, row].astype(np.float32))
        episodes.terminated.append(bool(terminated[:, row].any()))
        episodes.seeds.append(seed)


def evaluate_return(env: GymVectorEnv, act: Act, episodes: int) -> float:
    """Mean return of a policy on tuning seeds."""
    return float(np.mean(record(env, act, range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + episodes)).returns))
