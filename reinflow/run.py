"""One training run of any task: opened, resumed, logged, saved and stopped. What survives a crash is here.

A run knows a policy, a vector environment, a learner and its settings; the verbs that act on them (rollout, update,
evaluate) are the loop's, in train_reinflow.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from reinflow import ConfigError, UserError, checkpoint
from reinflow.checksums import replace_with_sum
from reinflow.distributed import from_writer, is_writer, size, total, wait_for_all
from reinflow.doctor import FINDINGS_FILE, RULES, Doctor, Rule
from reinflow.env import ChunkResult, ChunkVectorEnv, EpisodeStats, Observation
from reinflow.evaluate import Act, EvalResult, EvaluationStopped
from reinflow.learner import PPOLearner
from reinflow.lock import RunLock
from reinflow.metrics import METRICS_FILE
from reinflow.playing import begin, go_on, stored_state
from reinflow.policy import FlowPolicy
from reinflow.progress import progress_bar, spinner
from reinflow.rollout import RolloutState
from reinflow.run_settings import RunSettings
from reinflow.set_aside import set_aside, set_results_aside
from reinflow.settings import CONFIG_FILE, check_same_settings, read_config, refuse_existing_run
from reinflow.tracking import Counted, Tracker, open_tracker
from reinflow.training_state import CheckpointError, refuse_not_finite, rng_state, set_rng_state

__all__ = ["FAULTS_IN_A_ROW", "Run", "RunError", "RunSettings"]

FAULTS_IN_A_ROW = 3
LEAST_SCORE = -1e9


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


WAYS = ("resume", "output_dir", "checkpoint_path")  # settings that say how a run is opened, not what it is


class RunError(UserError, RuntimeError):
    """The run cannot go on; the message says why and what may help."""


class Run:
    """Policy, environments, learner, tracker, doctor and counters of one run; a context manager.

    ``start`` it or ``resume`` it, then::

        with run:
            for iteration in run.iterations():
                ...         # act, learn, run.count(episodes), put figures into run.metrics
                run.log()
                run.save_if_due()
            run.finish()

    SIGINT, SIGTERM and SIGHUP end the loop after the iteration at hand; the run is then saved as at any checkpoint. A
    second signal interrupts at once. What goes wrong FAULTS_IN_A_ROW times in a row ends it too, with a RunError.

    As one of several ranks (reinflow.distributed) it has its share of the environments, counts those of all, and does
    what the others do at the same places; one of them writes files and speaks. Checkpoints are those of one process.
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
        start_weights: str = "",
        resume_command: str = "",
        tags: Sequence[str] = (),
        results: Sequence[str] = (),
    ) -> None:
        """Put a run together; nothing is written yet.

        Args:
            run_dir: the run's directory.
            policy: acts and learns.
            env: N environments, of this rank.
            learner: of the policy.
            settings: of the run.
            config: JSON-able settings of everything; config.json, Weights & Biases and the doctor get them.
            rules: of the doctor.
            changeable: settings that may differ from config.json when the run is resumed.
            policy_card: files to write beside every exported policy, name -> content.
            start_weights: sha256 of the weights that the run starts from, kept in every checkpoint.
            resume_command: what continues the run, said after a stop.
            tags: what Weights & Biases finds the run by.
            results: what the run's directory holds of its end, set aside when training goes on after it.
        """
        self.run_dir, self.policy, self.env, self.learner = run_dir, policy, env, learner
        self.settings, self.config, self.rules, self.changeable = settings, dict(config), rules, changeable
        self.policy_card, self.resume_command = dict(policy_card or {}), resume_command
        self.start_weights, self.tags, self.results = start_weights, tuple(tags), tuple(results)
        self.seeds = settings.training_seeds
        self.iteration = self.episodes = self.timesteps = 0
        self.best_success = LEAST_SCORE  # or the best mean return, where that is the objective
        self.metrics: dict[str, float] = {}
        self.current: RolloutState
        self.tracker = Tracker([])  # nobody listens before it is opened
        self.doctor: Doctor
        self.lock: RunLock | None = None
        self.wandb_id: str | None = None
        self.stop_requested = self.saved_at_end = False
        self.fault = ""  # why the run cannot go on, once it has shown so FAULTS_IN_A_ROW times in a row
        self._faults: dict[str, int] = {}
        self._saved_at = self._logged_at = self._heard = self._saved_iteration = 0
        self._unlogged: list[dict[str, float]] = []
        self._played: set[int] = set()  # seeds of the iteration's episodes
        self._iteration_start = time.perf_counter()

    # --- Opening and closing ----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """A new run, at the beginning of its first episodes.

        Raises:
            ConfigError: the directory holds a run already.
        """
        room = from_writer(self._make_directory)
        self.current = begin(self.policy, self.env, self.seeds)
        self._open_sinks(resumed=None)
        self.save()  # so that whatever ends the run from here on, it can be resumed
        self.tracker.message(f"run directory: {self.run_dir}; {room}")
        return self

    def _make_directory(self) -> str:
        refuse_existing_run(self.run_dir)
        room = self.describe_room()
        (self.run_dir / checkpoint.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.run_dir)
        for leftover in (METRICS_FILE, FINDINGS_FILE):  # of a start that never came to a checkpoint
            (self.run_dir / leftover).unlink(missing_ok=True)
        self._write_config()
        return room

    @property
    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes once both optimisers have made a step."""
        weights = _size(self.policy.state_dict()) + _size(self.policy.trainable_state())
        return weights + self.learner.state_size()

    def describe_room(self) -> str:
        """What the checkpoints will take on the disk. Raises ConfigError if that is more than there is."""
        one = self.checkpoint_bytes
        number = self.settings.keep_checkpoints + 3  # last and best besides, and one while it is written
        place = next(path for path in (self.run_dir, *self.run_dir.resolve().parents) if path.exists())
        free = shutil.disk_usage(place).free
        needed = f"up to {number} checkpoints of {one / 1e6:,.0f} MB"
        if number * one > free:
            raise ConfigError(
                f"output_dir={self.run_dir}: {needed} do not fit into the {free / 1e6:,.0f} MB that are free there: "
                "make room, name another place, or lower keep_checkpoints"
            )
        return needed

    def _write_config(self) -> None:
        replace_with_sum(self.run_dir / CONFIG_FILE, json.dumps(self.config, indent=2) + "\n")

    def resume(self, from_checkpoint: Path | None = None) -> Self:
        """The run as a checkpoint left it, bit for bit.

        Args:
            from_checkpoint: one of the run's; None is the last. What came after it is set aside, not lost.

        Raises:
            ConfigError: its settings were others, or another process has it.
            CheckpointError: there is no checkpoint, or it does not fit.
        """
        chosen, stored = from_writer(lambda: self._take_up(from_checkpoint))
        check_same_settings(self.config, stored, self.changeable)
        self.config |= {name: stored[name] for name in WAYS if name in stored}
        tensors, state = checkpoint.load_training_state(chosen)
        self.policy.load_trainable_state(tensors["policy"])
        self.learner.load_state_dict(state)
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.timesteps = state.get("timesteps", 0)
        self.best_success, self.wandb_id = state["best_success"], state["wandb_id"]
        self._saved_at = self._logged_at = self.episodes
        self._saved_iteration = self.iteration
        self.current = go_on(self.policy, self.env, self.seeds, state)
        set_rng_state(state["rng"])
        wait_for_all()  # nobody reads any longer what is put aside now
        aside, has_best = from_writer(self._put_aside)
        if aside and not has_best:
            self.best_success = LEAST_SCORE  # the best one came later: the next evaluation is the best so far
        self._open_sinks(resumed=self.iteration)
        self._say_what_is_resumed(stored, aside)
        return self

    def _take_up(self, from_checkpoint: Path | None) -> tuple[Path, dict[str, Any]]:
        """The checkpoint to go on from and the run's settings, which nobody else changes from here on."""
        chosen = checkpoint.resolve_checkpoint(from_checkpoint or self.run_dir)
        self.lock = RunLock(self.run_dir)
        return chosen, read_config(self.run_dir)

    def _put_aside(self) -> tuple[Path | None, bool]:
        """What came after the checkpoint; and whether a best one is left."""
        aside = set_aside(self.run_dir, self.iteration)
        self._write_config()
        return aside, (self.run_dir / checkpoint.CHECKPOINTS / checkpoint.BEST).exists()

    def _say_what_is_resumed(self, stored: Mapping[str, Any], aside: Path | None) -> None:
        say = self.tracker.message
        say(f"run directory: {self.run_dir}, resumed after iteration {self.iteration} ({self.episodes} episodes)")
        if aside:
            say(f"what came after it is kept in {aside}")
        changes = [f"{k} {stored.get(k)} -> {v}" for k, v in self.config.items() if stored.get(k) != v]
        if changes:
            say(f"changed in {CONFIG_FILE}: {', '.join(changes)}")
        if self.progress >= 1:
            say(f"all {self.budget:,} {self.counted} are done; a larger number of {self.counted} goes on")

    def _open_sinks(self, resumed: int | None) -> None:
        if not is_writer():
            self.tracker = Tracker([], extras=self.env.extras)
            return
        self.tracker = open_tracker(
            self.run_dir,
            config=self.config,
            num_episodes=self.budget,
            episodes_done=self.done,
            counted=self.counted,
            wandb_mode=self.settings.wandb_mode,
            wandb_project=self.settings.wandb_project,
            wandb_run_id=self.wandb_id,
            resumed_iteration=resumed,
            extras=self.env.extras,
            tags=self.tags,
            notes=f"go on with: {self.resume_command}" if self.resume_command else "",
            objective=self.env.objective,
        )
        self.wandb_id = self.tracker.wandb_run_id
        self.doctor = Doctor(self.run_dir, self.config, resumed, self.rules)

    def __enter__(self) -> Self:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handlers = {s: signal.signal(s, self._request_stop) for s in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is not None:
            self.tracker.message(f"ended in iteration {self.iteration}; go on with: {self.resume_command}")
        self.env.close()
        self.tracker.close(failed=kind is not None)
        if self.lock:
            self.lock.release()

    def _request_stop(self, number: int, _frame: object) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        name = signal.Signals(number).name
        over, training = "the policy is saved, the report is being stopped", "saving after this iteration"
        what = over if self.saved_at_end else training
        self.tracker.message(f"{name}: {what} (once more to stop at once)")

    def stopping(self) -> bool:
        """Whether any rank was asked to stop; all of them ask here at the same places, so that they do the same."""
        asked = total(float(self.stop_requested))[0] > 0
        if asked and not self.stop_requested:
            self.stop_requested = True
            self.tracker.message("another rank was asked to stop: saving")
        return asked

    def unless_stopped(self, act: Act) -> Act:
        """``act`` for an evaluation, which a signal then ends with EvaluationStopped."""

        def act_or_stop(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
            if self.stop_requested:
                raise EvaluationStopped
            return act(observation, seeds, decision)

        return act_or_stop

    # --- While the loop runs ----------------------------------------------------------------------------------------

    def iterations(self) -> Iterator[int]:
        """Iteration numbers, from 1, until the episodes or the minutes are used up or a signal came."""
        started, minutes = time.monotonic(), self.settings.max_minutes
        while self.progress < 1 and not self.fault and not self.stopping():
            self._iteration_start = time.perf_counter()
            if is_writer() and (aside := set_results_aside(self.run_dir, self.results)):
                self.tracker.message(f"the results before training went on are kept in {aside}")
            self.iteration += 1
            self.metrics = {}
            yield self.iteration
            if minutes and time.monotonic() - started > 60 * minutes and not self.stop_requested:
                self.stop_requested = True
                self.tracker.message(f"max_minutes={minutes:g} are over")

    @property
    def progress(self) -> float:
        """Share of the episodes (or of the control steps) that are done."""
        return self.done / self.budget

    @property
    def counted(self) -> Counted:
        """What the run's length is counted in."""
        return "timesteps" if self.settings.total_timesteps else "episodes"

    @property
    def budget(self) -> int:
        """Episodes or control steps in all."""
        return self.settings.total_timesteps or self.settings.num_episodes

    @property
    def done(self) -> int:
        """Of these."""
        return self.timesteps if self.settings.total_timesteps else self.episodes

    @contextmanager
    def rollout_bar(self, decisions: int) -> Iterator[Callable[[ChunkResult], None]]:
        """Show a rollout of so many decisions, and move the run's own bar with it, as if the other ranks were as far.

        Yields:
            What takes the result of every chunk step.
        """
        done, ended, succeeded = self.done, 0, 0
        with progress_bar("rollout, decisions", decisions) as advance:

            def after_chunk(result: ChunkResult) -> None:
                nonlocal done, ended, succeeded
                ended += len(result.episodes)
                succeeded += sum(episode.success for episode in result.episodes)
                more = int(result.active.sum()) if self.settings.total_timesteps else len(result.episodes)
                done += more * size()
                told = f"{succeeded} of {ended} episodes succeeded" if self.env.objective == "success" else ""
                advance(len(result.active), told if ended else "")
                self.tracker.progress(done)

            yield after_chunk

    def log(self) -> None:
        """Metrics of this iteration to console, metrics.jsonl and wandb, once; the doctor reads them too."""
        if self._heard == self.iteration:
            return
        self._heard = self.iteration
        self.metrics |= {
            "progress/episodes": float(self.episodes),
            "progress/timesteps": float(self.timesteps),
            "time/iteration": time.perf_counter() - self._iteration_start,
        }
        refused = self.metrics.get("ppo/steps_refused", 0.0) > 0
        self._count_fault("updates with a gradient, loss or KL that is not finite", refused, "lower the step size")
        self._unlogged.append(self.metrics)
        evaluated = any(name.startswith("eval/") for name in self.metrics)
        if evaluated or self.episodes - self._logged_at >= self.settings.log_interval:
            self._log_interval()

    def _log_interval(self) -> None:
        """Means over the iterations since the last line; counters and evaluations as they stand."""
        rows, self._unlogged, self._logged_at = self._unlogged, [], self.episodes
        names = dict.fromkeys(name for row in rows for name in row)
        merged = {name: fmean([row[name] for row in rows if name in row]) for name in names}
        merged |= {name: value for name, value in rows[-1].items() if name.startswith(("progress/", "eval/"))}
        self.tracker.log(self.iteration, merged)
        if not is_writer():
            return
        for finding in self.doctor.examine(self.iteration, merged):
            self.tracker.alert(finding.rule, str(finding), error=finding.severity == "error")

    def count(self, episodes: Sequence[EpisodeStats], timesteps: int = 0) -> None:
        """Count control steps and the episodes that ended, and name the broken ones; too many of one environment in a
        row end the run."""
        self.episodes += len(episodes)
        self.timesteps += timesteps
        self._played = {episode.seed for episode in episodes}
        for episode in episodes:
            if episode.broken:
                self.tracker.message(
                    f"environment {episode.env} lost the episode of seed {episode.seed} after {episode.length} control "
                    "steps: unstable physics, or a reward or observation that is not finite; it counts for nothing"
                )
            what, remedy = f"broken episodes of environment {episode.env}", "check the scene's masses, gains, time step"
            self._count_fault(what, episode.broken, f"{remedy} (last seed {episode.seed})")

    def _count_fault(self, what: str, happened: bool, remedy: str) -> None:
        self._faults[what] = self._faults.get(what, 0) + 1 if happened else 0
        if self._faults[what] == FAULTS_IN_A_ROW:
            self.fault = f"{FAULTS_IN_A_ROW} {what} in a row: {remedy}"

    def keep_if_best(self, result: EvalResult) -> None:
        """Save and mark the best checkpoint: the last one within a standard error of the highest success so far (or
        mean return, where that is the environment's objective), since what chance adds to a few hundred episodes must
        not cost training."""
        trained = [row.seed in self._played for row in result.episodes]
        self.metrics["eval/trained_share"] = fmean(trained)
        if result.score + result.standard_error >= self.best_success:
            self.best_success = max(self.best_success, result.score)
            self.log()
            self.save()
            from_writer(self._mark_best)  # a kill in between costs only this link

    def _mark_best(self) -> None:
        checkpoint.mark_best(self.run_dir, self.iteration)
        checkpoint.prune_checkpoints(self.run_dir, self.settings.keep_checkpoints)  # the former best, if it is old

    def save_if_due(self) -> None:
        """A checkpoint every ``save_interval`` episodes."""
        if self.episodes - self._saved_at >= self.settings.save_interval:
            self.save()

    def save(self) -> None:
        """Write what ``resume`` continues from, bit for bit; no iteration in it is missing in the files."""
        if self._unlogged:
            self._log_interval()
        state = self.learner.state_dict() | {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "timesteps": self.timesteps,
            "best_success": self.best_success,
            "wandb_id": self.wandb_id,
            "start_weights": self.start_weights,
            "rng": rng_state(),
        }
        state |= stored_state(self.current, self.env)
        tensors = {"policy": self.policy.trainable_state()}
        try:
            refuse_not_finite(tensors["policy"].items(), f"the policy after iteration {self.iteration}")
        except CheckpointError as error:
            raise CheckpointError(f"nothing was saved: {error}, with smaller steps: {self.resume_command}") from error
        from_writer(lambda: self._write_checkpoint(tensors, state))
        self._saved_at, self._saved_iteration = self.episodes, self.iteration

    def _write_checkpoint(self, tensors: checkpoint.TensorGroups, state: Mapping[str, Any]) -> None:
        with spinner("saving"):
            checkpoint.save_checkpoint(
                self.run_dir, self.iteration, self._write_policy, tensors, state, make_root=False
            )
        checkpoint.prune_checkpoints(self.run_dir, self.settings.keep_checkpoints)

    def _write_policy(self, directory: Path) -> None:
        self.policy.save_pretrained(directory)
        for name, content in self.policy_card.items():
            (directory / name).write_text(content)

    # --- At the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Log and save where the loop ended; say where the policy is, and how to go on."""
        if self._unlogged:
            self._log_interval()
        if self._saved_at < self.episodes or self._saved_iteration < self.iteration:
            self.save()
        self.saved_at_end = True
        if self.fault:
            raise RunError(f"stopped after iteration {self.iteration}, which is saved: {self.fault}")
        if self.stop_requested:
            self.tracker.message(f"stopped at {self.done} {self.counted}; go on with: {self.resume_command}")
        else:
            where = self.kept / checkpoint.PRETRAINED
            self.tracker.message(f"finished {self.done} {self.counted}; the policy is in {where}")

    @property
    def kept(self) -> Path:
        """The checkpoint that the run is for: the best one, else the last."""
        best = self.run_dir / checkpoint.CHECKPOINTS / checkpoint.BEST
        return best if best.exists() else best.with_name(checkpoint.LAST)

    def load_best(self) -> None:
        """Give the policy the weights of the best checkpoint, if there is one."""
        best = self.run_dir / checkpoint.CHECKPOINTS / checkpoint.BEST
        if from_writer(best.exists):
            self.policy.load_trainable_state(checkpoint.load_training_state(best)[0]["policy"])
