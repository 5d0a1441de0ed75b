"""One training run of any task: opened, resumed, logged, saved and stopped. What survives a crash is here.

A run knows a policy, a vector environment, a learner and its settings; the verbs that act on them (rollout, update,
evaluate) are the loop's, in train_reinflow.py.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from reinflow import ConfigError, checkpoint
from reinflow.doctor import RULES, Doctor, Rule
from reinflow.env import ChunkVectorEnv
from reinflow.evaluate import EvalResult
from reinflow.learner import PPOLearner
from reinflow.policy import FlowPolicy
from reinflow.rollout import RolloutState
from reinflow.seeds import FIRST_TUNING_SEED, TrainingSeeds
from reinflow.settings import CONFIG_FILE, check_same_settings, refuse_existing_run
from reinflow.tracking import Tracker, WandbMode, open_tracker
from reinflow.training_state import rng_state, set_rng_state


@dataclass(frozen=True)
class RunSettings:
    """How long a run goes on and what it leaves behind; intervals count episodes, rounded up to whole iterations."""

    num_episodes: int = 20_000
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


class Run:
    """Policy, environments, learner, tracker, doctor and counters of one run; a context manager.

    ``start`` it or ``resume`` it, then::

        with run:
            for iteration in run.iterations():
                ...         # act, learn, put figures into run.metrics, count run.episodes
                run.log()
                run.save_if_due()
            run.finish()

    SIGINT and SIGTERM end the loop after the iteration at hand; the run is then saved as at any checkpoint. A second
    signal interrupts at once.
    """

    def __init__(
        self,
        run_dir: Path,
        policy: FlowPolicy,
        env: ChunkVectorEnv,
        learner: PPOLearner,
        settings: RunSettings,
        config: Mapping[str, Any],
        *,
        rules: Sequence[Rule] = RULES,
        changeable: Collection[str] = (),
        policy_card: Mapping[str, str] | None = None,
        resume_command: str = "",
    ) -> None:
        """Put a run together; nothing is written yet.

        Args:
            run_dir: the run's directory.
            policy: acts and learns.
            env: N environments.
            learner: of the policy.
            settings: of the run.
            config: JSON-able settings of everything; config.json, Weights & Biases and the doctor get them.
            rules: of the doctor.
            changeable: settings that may differ from config.json when the run is resumed.
            policy_card: files to write beside every exported policy, name -> content.
            resume_command: what continues the run, said after a stop.
        """
        self.run_dir, self.policy, self.env, self.learner = run_dir, policy, env, learner
        self.settings, self.config, self.rules, self.changeable = settings, dict(config), rules, changeable
        self.policy_card, self.resume_command = dict(policy_card or {}), resume_command
        self.seeds = settings.training_seeds
        self.iteration = self.episodes = 0
        self.best_success = -1.0
        self.metrics: dict[str, float] = {}
        self.current: RolloutState
        self.tracker: Tracker
        self.doctor: Doctor
        self.wandb_id: str | None = None
        self.stop_requested = False
        self._saved_at = self._logged_at = 0
        self._iteration_start = time.perf_counter()

    # --- Opening and closing ----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """A new run, at the beginning of its first episodes.

        Raises:
            ConfigError: the directory holds a run already.
        """
        refuse_existing_run(self.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        self.current = RolloutState.start(self.policy, self.env, self.seeds)
        self._open_sinks(resumed=None)
        return self

    def resume(self) -> Self:
        """The run as its last checkpoint left it, bit for bit.

        Raises:
            ConfigError: its settings were others.
            CheckpointError: there is no checkpoint, or it does not fit.
        """
        stored = json.loads((self.run_dir / CONFIG_FILE).read_text()) if self.run_dir.exists() else {}
        check_same_settings(self.config, stored, self.changeable)
        tensors, state = checkpoint.load_training_state(checkpoint.resolve_checkpoint(self.run_dir))
        self.policy.load_trainable_state(tensors["policy"])
        self.learner.load_state_dict(state)
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.best_success, self.wandb_id = state["best_success"], state["wandb_id"]
        self._saved_at = self._logged_at = self.episodes
        observation = self.env.set_state(state["env"])
        self.current = RolloutState.at(self.policy, observation, state["playing"], state["decisions"])
        set_rng_state(state["rng"])
        self._open_sinks(resumed=self.iteration)
        return self

    def _open_sinks(self, resumed: int | None) -> None:
        self.tracker = open_tracker(
            self.run_dir,
            config=self.config,
            num_episodes=self.settings.num_episodes,
            episodes_done=self.episodes,
            wandb_mode=self.settings.wandb_mode,
            wandb_project=self.settings.wandb_project,
            wandb_run_id=self.wandb_id,
            resumed_iteration=resumed,
            extras=self.env.extras,
        )
        self.wandb_id = self.tracker.wandb_run_id
        self.doctor = Doctor(self.run_dir, self.config, resumed, self.rules)

    def __enter__(self) -> Self:
        self._handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.env.close()
        self.tracker.close(failed=kind is not None)

    def _request_stop(self, number: int, _frame: object) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        name = signal.Signals(number).name
        self.tracker.message(f"{name}: saving after this iteration (once more to stop at once)")

    # --- While the loop runs ----------------------------------------------------------------------------------------

    def iterations(self) -> Iterator[int]:
        """Iteration numbers, from 1, until the episodes are used up or a signal came."""
        while self.episodes < self.settings.num_episodes and not self.stop_requested:
            self._iteration_start = time.perf_counter()
            self.iteration += 1
            self.metrics = {}
            yield self.iteration

    @property
    def progress(self) -> float:
        """Share of the episodes that are done."""
        return self.episodes / self.settings.num_episodes

    def log(self) -> None:
        """Metrics of this iteration to console, metrics.jsonl and wandb; the doctor reads them too."""
        self.metrics |= {
            "progress/episodes": float(self.episodes),
            "time/iteration": time.perf_counter() - self._iteration_start,
        }
        if self.episodes - self._logged_at >= self.settings.log_interval:
            self._logged_at = self.episodes
            self.tracker.log(self.iteration, self.metrics)
            for finding in self.doctor.examine(self.iteration, self.metrics):
                self.tracker.alert(finding.rule, str(finding), error=finding.severity == "error")

    def keep_if_best(self, result: EvalResult) -> None:
        """Save and mark the best checkpoint: the last one within a standard error of the highest success so far, since
        what chance adds to a few hundred episodes must not cost training."""
        if result.success_rate + result.standard_error >= self.best_success:
            self.best_success = max(self.best_success, result.success_rate)
            self.save()
            checkpoint.mark_best(self.run_dir, self.iteration)  # a kill in between costs only this link

    def save_if_due(self) -> None:
        """A checkpoint every ``save_interval`` episodes."""
        if self.episodes - self._saved_at >= self.settings.save_interval:
            self.save()

    def save(self) -> None:
        """Write a checkpoint that ``resume`` continues from, bit for bit."""
        state = self.learner.state_dict() | {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "best_success": self.best_success,
            "wandb_id": self.wandb_id,
            "playing": self.current.episodes,
            "decisions": self.current.decisions,
            "rng": rng_state(),
            "env": self.env.get_state(),
        }
        tensors = {"policy": self.policy.trainable_state()}
        checkpoint.save_checkpoint(self.run_dir, self.iteration, self._write_policy, tensors, state)
        checkpoint.prune_checkpoints(self.run_dir, self.settings.keep_checkpoints)
        self._saved_at = self.episodes

    def _write_policy(self, directory: Path) -> None:
        self.policy.save_pretrained(directory)
        for name, content in self.policy_card.items():
            (directory / name).write_text(content)

    # --- At the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Save where the loop ended; after a signal say how to go on."""
        if self._saved_at < self.episodes:
            self.save()
        if self.stop_requested:
            self.tracker.message(f"stopped at {self.episodes} episodes; go on with: {self.resume_command}")

    def load_best(self) -> None:
        """Give the policy the weights of the best checkpoint, if there is one."""
        best = self.run_dir / checkpoint.CHECKPOINTS / checkpoint.BEST
        if best.exists():
            self.policy.load_trainable_state(checkpoint.load_training_state(best)[0]["policy"])
