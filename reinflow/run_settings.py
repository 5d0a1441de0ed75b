"""What a run of any task is told: how long it goes on, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

from reinflow import ConfigError
from reinflow.seeds import FIRST_TUNING_SEED, TrainingSeeds
from reinflow.tracking import WandbMode


@dataclass(frozen=True)
class RunSettings:
    """How long a run goes on and what it leaves behind; intervals count episodes, rounded up to whole iterations."""

    num_episodes: int = 20_000
    total_timesteps: int = 0  # control steps, instead of num_episodes; 0 counts episodes
    max_minutes: float = 0.0  # of this process; 0 is no limit
    save_interval: int = 10
    keep_checkpoints: int = 3
    log_interval: int = 1
    wandb_mode: WandbMode = "off"
    wandb_project: str = "reinflow"
    seed: int = 0
    eval_seed: int = FIRST_TUNING_SEED  # training episodes have seeds below it

    def __post_init__(self) -> None:
        for name in ("num_episodes", "save_interval", "keep_checkpoints", "log_interval", "eval_seed"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def training_seeds(self) -> TrainingSeeds:
        """Of the run's episodes."""
        return TrainingSeeds(self.seed, self.eval_seed)
