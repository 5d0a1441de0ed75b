"""A training run: what the loop in train_reinflow.py acts on, and what survives a crash."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from policy_directory import ACTION, CONFIG_FILE, OBS_IMAGES_PREFIX, OBS_STATE, locate_policy, read_json
from reinflow import checkpoint
from reinflow.doctor import Doctor
from reinflow.evaluate import EvalResult, evaluate, even_batch, write_eval_info
from reinflow.flow import ChainSpec
from reinflow.learner import LearnerSettings, PPOLearner
from reinflow.policy import FlowMLP, FlowPolicy
from reinflow.rollout import Cursor, RolloutBuffer, RolloutInfo, RolloutSettings, collect_rollout, noise_free_actor
from reinflow.schedules import in_critic_warmup, linear_decay, noise_bounds, warmup_lr
from reinflow.tracking import Tracker, open_tracker
from so101_gym_env import EnvConfig
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, NUM_JOINTS, model_dir
from so101_vector_env import ChunkVectorEnv, Observation, ObservationBuffer, SequentialVectorEnv, make_vector_env
from training_checks import ConfigError, check_resumed, config_from_json, config_to_json
from training_scale import auto_scale

if TYPE_CHECKING:
    from reinflow_vla import ReinFlowVLA
    from train_reinflow import TrainingConfig


TASK_GROUP = "so101_pick"
POLICY_CARD = "reinflow.json"
EMBEDDED_FLOW_MLP = "flow_mlp"  # directory beside the scene


def matching_fields(config: TrainingConfig, target: type) -> dict[str, Any]:
    """The fields of ``config`` that the dataclass ``target`` also has, by name."""
    names = {f.name for f in dataclasses.fields(target)} & {f.name for f in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names}


def env_config(config: TrainingConfig) -> EnvConfig:
    """The environment that ``config`` describes."""
    settings = matching_fields(config, EnvConfig)
    path = Path(config.model_path)
    if not path.exists() and not path.is_absolute():
        path = model_dir() / path.name
    if config.model_type == "flow_mlp":  # it sees the simulator's state and no pixels
        settings |= {"render_images": False, "environment_state": True}
    elif config.critic_input == "state":
        settings |= {"environment_state": True}
    return EnvConfig(**(settings | {"model_path": str(path)}))


def policy_card(config: TrainingConfig) -> dict[str, Any]:
    """What a policy directory says of its training: environment, chain, and the policy it started from.

    LeRobot ignores the file. Paths stay out of it: a policy travels.
    """
    env = dataclasses.asdict(env_config(config))
    env.pop("model_path")
    chain = {name: getattr(config, name) for name in ("n_action_steps", "sigma_min", "sigma_max")}
    return {"env": env, "chain": dataclasses.asdict(chain_spec(config)) | chain, "base": config.policy_path}


def chain_spec(config: TrainingConfig) -> ChainSpec:
    """The denoising chain that ``config`` describes."""
    return ChainSpec(**matching_fields(config, ChainSpec), reduction=config.log_prob_reduction)


def training_seeds(config: TrainingConfig) -> list[int]:
    """First seed of every environment, all below the tuning seeds; later episodes go on from its generator."""
    return np.random.default_rng(config.seed).choice(config.eval_seed, config.num_parallel_envs, replace=False).tolist()


def pick_device(name: str) -> str:
    """Resolve "auto"; raise ConfigError for an accelerator that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available[device])
    if not available[name]:
        raise ConfigError(f"device={name} is not available on this machine: use --device auto")
    return name


def build_policy(config: TrainingConfig, device: str) -> FlowPolicy:
    """Load the policy to fine-tune.

    Raises:
        ConfigError: the policy does not fit the config.
    """
    torch.manual_seed(config.seed)  # initial weights of noise head and critic
    policy = POLICY_BUILDERS[config.model_type](config, device)
    if policy.chunk_size != config.chunk_size:
        raise ConfigError(
            f"chunk_size={config.chunk_size}, but {config.policy_path} predicts {policy.chunk_size}: set chunk_size"
        )
    return policy


def _build_smolvla(config: TrainingConfig, device: str) -> FlowPolicy:
    from reinflow_smolvla import ReinFlowSmolVLA

    return _build_vla(config, device, ReinFlowSmolVLA, "tiny_smolvla")


def _build_pi0(config: TrainingConfig, device: str) -> FlowPolicy:
    from pi0_adapter import ReinFlowPi0

    options = pi0_options(config) | {"dtype": config.pi0_vlm_dtype, "tokenizer": config.pi0_tokenizer_path}
    return _build_vla(config, device, ReinFlowPi0, "tiny_pi0", **options)


def pi0_options(config: TrainingConfig) -> dict[str, Any]:
    """What ReinFlowPi0's constructor takes beside ``vla_settings``."""
    return {"gradient_checkpointing": config.pi0_gradient_checkpointing, "peft_rank": config.peft_rank}


def vla_settings(config: TrainingConfig) -> dict[str, Any]:
    """What ReinFlowVLA's constructor takes."""
    from reinflow_vla import TrainableGroups

    return {
        "num_denoising_steps": config.num_denoising_steps,
        "n_action_steps": config.n_action_steps,
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
        "groups": TrainableGroups(**matching_fields(config, TrainableGroups)),
        "critic_hidden_size": config.critic_hidden_size,
        "critic_state_dim": len(ENVIRONMENT_STATE_NAMES) if config.critic_input == "state" else 0,
    }


def _build_vla(
    config: TrainingConfig, device: str, family: type[ReinFlowVLA], embedded: str, **options: Any
) -> FlowPolicy:
    """A vision-language-action policy; ``embedded`` is the directory that the path "tiny" names."""
    path = locate_policy(model_dir() / embedded if config.policy_path == "tiny" else config.policy_path)
    _check_features(config, path)
    if config.compile_expert:
        _check_compiler(device)
    policy = family.from_pretrained(path, device, **vla_settings(config), **options)
    if config.compile_expert:
        policy.compile_expert()
    decisions = config.decisions_per_iteration
    plan = policy.plan_prefix_cache(
        blank_observation(env_config(config)), config.prefix_cache, decisions, config.prefix_cache_gb
    )
    print(plan.describe(decisions))
    return policy


def _check_compiler(device: str) -> None:
    """Compile something small now rather than the expert after the first rollout."""
    try:
        torch.compile(torch.nn.functional.silu)(torch.zeros(8, device=device))
    except RuntimeError as error:  # what torch's compilers derive their errors from
        raise ConfigError(
            f"compile_expert: torch.compile does not work on {device}: {error}. It needs a C++ compiler and Python's "
            "headers (apt-get install g++ python3-dev), on cuda Triton; or drop compile_expert"
        ) from error


def _check_features(config: TrainingConfig, directory: Path) -> None:
    """Refuse a policy for another robot or other cameras before its weights are read."""
    stored = read_json(directory / CONFIG_FILE)
    features = stored.get("input_features", {}) | stored.get("output_features", {})
    for name in (ACTION, OBS_STATE):
        shape = features.get(name, {}).get("shape")
        if shape != [NUM_JOINTS]:
            raise ConfigError(
                f"{directory} has {name} of shape {shape}, the SO-101 needs [{NUM_JOINTS}]: fine-tune the policy on "
                "SO-101 data first (lerobot-train)"
            )
    images = (name.removeprefix(OBS_IMAGES_PREFIX) for name in features if name.startswith(OBS_IMAGES_PREFIX))
    eyes = [name for name in images if not name.startswith("empty_camera_")]  # the library fills those in
    absent = [name for name in eyes if name not in config.cameras]
    if absent:
        raise ConfigError(
            f"cameras={' '.join(config.cameras)} lacks {' '.join(absent)}, which {directory} looks through: add them "
            "to cameras if the scene has them, or fine-tune the policy with the scene's camera names"
        )


def blank_observation(config: EnvConfig) -> Observation:
    """What one environment of ``config`` would show, all zeros."""
    return ObservationBuffer(config, 1).read()


def _build_flow_mlp(config: TrainingConfig, device: str) -> FlowPolicy:
    path = config.flow_mlp_pretrained_path
    policy = FlowMLP.from_pretrained(
        model_dir() / EMBEDDED_FLOW_MLP if path == "embedded" else Path(path),
        device,
        num_denoising_steps=config.num_denoising_steps,
        critic_hidden_size=config.critic_hidden_size,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
    )
    wanted = {
        "trunk": config.train_full_expert,  # holds the time embedding: train_time_mlp goes with it (training_checks)
        "head": config.train_action_head,
        "noise_mlp": config.train_noise_head,
        "critic": config.train_critic,
    }
    policy.train_only([name for name, learns in wanted.items() if learns])
    return policy


POLICY_BUILDERS: dict[str, Callable[[TrainingConfig, str], FlowPolicy]] = {
    "smolvla": _build_smolvla,
    "pi0": _build_pi0,
    "flow_mlp": _build_flow_mlp,
}


class TrainingRun:
    """Policy, environments, learner, tracker and counters of one run; a context manager.

    SIGINT and SIGTERM end the loop after the iteration at hand; the run is then saved as at any checkpoint. A second
    signal interrupts at once.
    """

    def __init__(self, config: TrainingConfig, run_dir: Path):
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.config, self.run_dir = config, run_dir
        self.device = pick_device(config.device)
        self.policy = build_policy(config, self.device)
        if config.prefix_cache == "auto" and config.model_type != "flow_mlp":  # a resumed run must keep the same
            config = self.config = dataclasses.replace(config, prefix_cache=cast(Any, self.policy).prefix_cache.keep)
        self.spec = chain_spec(config)
        self.learner = PPOLearner(
            self.policy, self.spec, LearnerSettings(**matching_fields(config, LearnerSettings)), config.seed
        )
        self.rollout_settings = RolloutSettings(**matching_fields(config, RolloutSettings))
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.env: ChunkVectorEnv = make_vector_env(
            env_config(config),
            config.num_parallel_envs,
            backend="subproc" if config.use_subproc_env else "auto",
        )
        cores, threads = min(self.env.num_envs, os.cpu_count() or 1), torch.get_num_threads()
        print(f"policy on {self.device}, {threads} torch threads; {self.env.num_envs} environments on {cores} cores")
        if config.render:
            cast(SequentialVectorEnv, self.env).envs[0].open_viewer()
        self.iteration = self.episodes = 0
        self.best_success = -1.0
        self.metrics: dict[str, float] = {}
        self.cursor: Cursor
        self.tracker: Tracker
        self.doctor: Doctor
        self.wandb_id: str | None = None
        self.stop_requested = False
        self._saved_at = self._logged_at = 0
        self._iteration_start = time.perf_counter()

    # --- Opening, closing, resuming ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, config: TrainingConfig) -> TrainingRun:
        """A new run in its own directory, or the saved one with ``config.resume``."""
        if config.resume:
            run = cls._resume(config)
        else:
            if config.auto_scale:
                config, report = auto_scale(config)
                print(report)
            stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
            run_dir = Path(config.output_dir or f"outputs/train/{stamp}_{config.preset}")
            run = cls(config, run_dir)
            config = run.config
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.json").write_text(json.dumps(config_to_json(config), indent=2) + "\n")
            run.cursor = Cursor.at(run.policy, run.env.reset(training_seeds(config)))
        run.tracker = open_tracker(
            run.run_dir,
            config=config_to_json(config),
            num_episodes=config.num_episodes,
            episodes_done=run.episodes,
            wandb_mode=config.wandb_mode if config.wandb_enabled else "off",
            wandb_project=config.wandb_project,
            wandb_run_id=run.wandb_id,
            resumed_iteration=run.iteration if config.resume else None,
        )
        run.wandb_id = run.tracker.wandb_run_id
        run.doctor = Doctor(run.run_dir, config_to_json(config), run.iteration if config.resume else None)
        return run

    @classmethod
    def _resume(cls, config: TrainingConfig) -> TrainingRun:
        run_dir = Path(config.output_dir)
        saved = config_from_json(json.loads((run_dir / "config.json").read_text()) | {"resume": True}, type(config))
        check_resumed(config, saved)
        run = cls(config, run_dir)
        run._load(checkpoint.resolve_checkpoint(run_dir))
        return run

    def __enter__(self) -> TrainingRun:
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

    def _load(self, directory: Path) -> None:
        tensors, state = checkpoint.load_training_state(directory)
        self.policy.load_trainable_state(tensors["policy"])
        checkpoint.load_optimizer(self.learner.policy_optimizer, state["policy_optimizer"], "policy optimizer")
        checkpoint.load_optimizer(self.learner.critic_optimizer, state["critic_optimizer"], "critic optimizer")
        self.learner.normalizer.load_state_dict(state["return_normalizer"])
        self.learner.lr_scale = state["lr_scale"]
        self.learner.generator.set_state(state["shuffle_rng"])
        self.generator.set_state(state["noise_rng"])
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.best_success, self.wandb_id = state["best_success"], state["wandb_id"]
        self._saved_at = self._logged_at = self.episodes
        self.cursor = Cursor.at(self.policy, self.env.set_state(state["env"]))
        checkpoint.set_rng_state(state["rng"])

    def save(self) -> None:
        """Write a checkpoint that ``--resume`` continues from, bit for bit."""
        state = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "best_success": self.best_success,
            "wandb_id": self.wandb_id,
            "policy_optimizer": self.learner.policy_optimizer.state_dict(),
            "critic_optimizer": self.learner.critic_optimizer.state_dict(),
            "return_normalizer": self.learner.normalizer.state_dict(),
            "lr_scale": self.learner.lr_scale,
            "shuffle_rng": self.learner.generator.get_state(),
            "noise_rng": self.generator.get_state(),
            "rng": checkpoint.rng_state(),
            "env": self.env.get_state(),
        }
        checkpoint.save_checkpoint(
            self.run_dir, self.iteration, self._write_policy, {"policy": self.policy.trainable_state()}, state
        )
        checkpoint.prune_checkpoints(self.run_dir, self.config.keep_checkpoints)
        self._saved_at = self.episodes

    def _write_policy(self, directory: Path) -> None:
        """A stock LeRobot policy, with the environment it was trained in beside it for reinflow-eval."""
        self.policy.save_pretrained(directory)
        (directory / POLICY_CARD).write_text(json.dumps(policy_card(self.config), indent=2) + "\n")

    # --- The verbs of the loop --------------------------------------------------------------------------------------

    def iterations(self) -> Iterator[int]:
        """Iteration numbers, from 1, until the episodes are used up or a signal came."""
        while self.episodes < self.config.num_episodes and not self.stop_requested:
            self._iteration_start = time.perf_counter()
            self.iteration += 1
            yield self.iteration

    def rollout(self) -> RolloutBuffer:
        """Act with exploration noise for whole episodes."""
        c, start = self.config, time.perf_counter()
        bounds = noise_bounds(
            self.episodes / c.num_episodes, c.sigma_min, c.sigma_max, c.noise_schedule,
            c.noise_decay_start, c.noise_decay_ratio,
        )  # fmt: skip
        self.policy.set_noise_bounds(*bounds)
        buffer, info, self.cursor = collect_rollout(
            self.policy, self.env, self.cursor, c.chunk_steps_per_rollout, self.spec, self.rollout_settings,
            self.learner.normalizer, self.generator,
        )  # fmt: skip
        self.episodes += len(info.episodes)
        self.metrics = _rollout_metrics(info) | {
            "noise/sigma_min": bounds[0],
            "noise/sigma_max": bounds[1],
            "time/rollout": time.perf_counter() - start,
        }
        return buffer

    def update(self, buffer: RolloutBuffer) -> None:
        """One PPO update."""
        c, start, done = self.config, time.perf_counter(), self.iteration - 1
        self.metrics |= self.learner.update(
            buffer,
            warmup_lr(max(done - c.critic_warmup_iters, 0), c.lr_warmup_iterations)
            * linear_decay(self.episodes / c.num_episodes, c.lr_decay_ratio),
            in_critic_warmup(done, c.critic_warmup_iters),
        )
        self.metrics["time/update"] = time.perf_counter() - start

    def due(self, interval: int, iteration: int) -> bool:
        """Whether something that happens every ``interval`` iterations happens now; 0 is never."""
        return interval > 0 and iteration % interval == 0

    def evaluate(self) -> None:
        """Noise-free success on tuning seeds. It chooses the best checkpoint: the last one within a standard error of
        the highest success so far, since what chance adds to a few hundred episodes must not cost training."""
        c = self.config
        result = self._evaluate(c.eval_seed, c.eval_episodes)
        self.metrics |= result.metrics() | {"time/eval": result.elapsed_s}
        if result.success_rate + result.standard_error >= self.best_success:
            self.best_success = max(self.best_success, result.success_rate)
            self.save()
            checkpoint.mark_best(self.run_dir, self.iteration)  # a kill in between costs only this link

    def _evaluate(self, first_seed: int, episodes: int) -> EvalResult:
        """Noise-free episodes with the policy that acts in rollouts. x_0 comes from a generator seeded with the first
        seed: as many episodes with as many environments give the same figures again."""
        num_envs = even_batch(episodes, self.config.num_parallel_envs)
        act = noise_free_actor(self.policy, self.spec, first_seed, self.device)
        with make_vector_env(env_config(self.config), num_envs, autoreset=False) as env:
            return evaluate(act, env, range(first_seed, first_seed + episodes))

    def log(self) -> None:
        """Metrics of this iteration to console, metrics.jsonl and wandb; the doctor reads them too."""
        self.metrics |= {
            "progress/episodes": float(self.episodes),
            "time/iteration": time.perf_counter() - self._iteration_start,
        }
        if self.episodes - self._logged_at >= self.config.log_interval:
            self._logged_at = self.episodes
            self.tracker.log(self.iteration, self.metrics)
            for finding in self.doctor.examine(self.iteration, self.metrics):
                self.tracker.alert(finding.rule, str(finding), error=finding.severity == "error")

    def save_if_due(self) -> None:
        """A checkpoint every ``save_interval`` episodes."""
        if self.episodes - self._saved_at >= self.config.save_interval:
            self.save()

    def finish(self) -> None:
        """Save where the loop ended; after a signal say how to go on."""
        if self._saved_at < self.episodes:
            self.save()
        if self.stop_requested:
            self.tracker.message(
                f"stopped at {self.episodes} episodes; go on with: "
                f"python train_reinflow.py --resume --output-dir {self.run_dir}"
            )

    def report(self, when: str) -> None:
        """Noise-free success on the reporting seeds, before training and of the best checkpoint after it."""
        if self.config.report_episodes == 0 or self.stop_requested or (when == "before" and self.iteration > 0):
            return
        if when == "after" and (self.run_dir / "checkpoints" / checkpoint.BEST).exists():
            best = checkpoint.resolve_checkpoint(self.run_dir / "checkpoints" / checkpoint.BEST)
            self.policy.load_trainable_state(checkpoint.load_training_state(best)[0]["policy"])
        result = self._evaluate(self.config.report_seed, self.config.report_episodes)
        write_eval_info(self.run_dir / f"eval_{when}.json", result.to_lerobot_info(TASK_GROUP))
        self.tracker.message(f"{when} training, seeds from {self.config.report_seed}: {result.summary()}")


def _rollout_metrics(info: RolloutInfo) -> dict[str, float]:
    """Means over the episodes that ended in the rollout."""
    episodes = info.episodes
    metrics = {"time/rollout_env": info.seconds_env, "time/rollout_policy": info.seconds_policy}
    if not episodes:
        return metrics
    metrics |= {
        "rollout/success_rate": float(np.mean([e.success for e in episodes])),
        "rollout/return_mean": float(np.mean([e.return_ for e in episodes])),
        "rollout/return_std": float(np.std([e.return_ for e in episodes])),
        "rollout/episode_length": float(np.mean([e.length for e in episodes])),
        "rollout/max_height": float(np.mean([e.max_height_m for e in episodes])),
        "rollout/clipped_targets": float(np.mean([e.clipped_targets for e in episodes])),
    }
    for term in episodes[0].reward_terms:
        metrics[f"reward/{term}"] = float(np.mean([e.reward_terms[term] for e in episodes]))
    return metrics
