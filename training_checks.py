"""What a TrainingConfig must satisfy, and where its flags start from (preset or saved run)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow import UserError

if TYPE_CHECKING:
    from train_reinflow import TrainingConfig

FIRST_REPORTING_SEED = 10_000
CHANGEABLE_ON_RESUME = {
    "num_episodes", "output_dir", "resume", "checkpoint_path", "save_interval", "keep_checkpoints", "log_interval",
    "wandb_enabled", "wandb_mode", "headless", "num_threads", "report_episodes",
    "prefix_cache", "prefix_cache_gb", "compile_expert",
}  # fmt: skip
POSITIVE = (
    "num_episodes", "num_parallel_envs", "episodes_per_iteration", "num_ppo_epochs", "num_critic_epochs",
    "minibatch_size", "gradient_accumulation_steps", "num_denoising_steps", "num_noise_coefficients", "chunk_size",
    "n_action_steps", "chunks_per_episode", "max_steps_per_episode", "steps_per_action", "image_size",
    "lift_threshold", "policy_lr", "critic_lr", "clip_epsilon", "grad_clip_norm", "sigma_min", "sigma_max",
    "eval_episodes", "save_interval", "log_interval", "keep_checkpoints", "critic_hidden_size",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "target_kl", "value_clip_epsilon", "entropy_coeff", "anchor_coeff", "lr_warmup_iterations",
    "critic_warmup_iters", "eval_interval", "eval_seed", "report_episodes", "report_seed", "num_threads",
    "start_noise_deg", "prefix_cache_gb", "peft_rank",
)  # fmt: skip
PI0_FIELDS = (
    "pi0_pretrained_path", "pi0_tokenizer_path", "peft_rank", "pi0_vlm_dtype", "pi0_gradient_checkpointing",
)  # fmt: skip
FRACTIONS = ("gamma", "gae_lambda", "lr_decay_ratio", "noise_decay_start", "noise_decay_ratio")


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the field and the remedy."""


def check_config(config: TrainingConfig) -> None:
    """Raise one ConfigError that lists everything wrong with ``config``."""
    problems = [
        problem
        for check in (_ranges, _contradictions, _credit, _seeds, _models, _flow_mlp, _pi0, _files)
        for problem in check(config)
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _ranges(config: TrainingConfig) -> Iterator[str]:
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            yield f"{name} must be positive, got {getattr(config, name)}"
    for name in NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            yield f"{name} must not be negative, got {getattr(config, name)}"
    for name in FRACTIONS:
        if not 0 <= getattr(config, name) <= 1:
            yield f"{name} must lie in [0, 1], got {getattr(config, name)}"
    low, high = config.block_radius_range
    if not 0 < low <= high:
        yield f"block_radius_range needs 0 < low <= high, got {low} {high}"
    if not config.cameras:
        yield "cameras is empty: name at least one, e.g. camera_up"


def _contradictions(c: TrainingConfig) -> Iterator[str]:
    if c.sigma_min > c.sigma_max:
        yield f"sigma_min={c.sigma_min} exceeds sigma_max={c.sigma_max}: swap them, or make them equal for fixed noise"
    if c.policy_optimizer == "natural" and c.target_kl == 0:
        yield "target_kl=0 with policy_optimizer=natural: it is the length of a natural step, set it to e.g. 0.03"
    if c.policy_optimizer == "natural" and c.compile_expert:
        yield (
            "compile_expert gains nothing with policy_optimizer=natural, which watches every layer: drop it, or set "
            "policy_optimizer=adam"
        )
    if c.n_action_steps > c.chunk_size:
        yield f"n_action_steps={c.n_action_steps} exceeds chunk_size={c.chunk_size}: execute at most the whole chunk"
    if c.chunks_per_episode * c.n_action_steps != c.max_steps_per_episode:
        yield (
            f"chunks_per_episode={c.chunks_per_episode} x n_action_steps={c.n_action_steps} is not "
            f"max_steps_per_episode={c.max_steps_per_episode}: change one of them"
        )
    batch = c.minibatch_size * c.gradient_accumulation_steps
    if batch > c.decisions_per_iteration:
        yield (
            f"gradient_accumulation_steps={c.gradient_accumulation_steps} x minibatch_size={c.minibatch_size} needs "
            f"{batch} decisions, a rollout has {c.decisions_per_iteration}: raise episodes_per_iteration or lower one"
        )
    if c.episodes_per_iteration < c.num_parallel_envs:
        yield (
            f"episodes_per_iteration={c.episodes_per_iteration} is below num_parallel_envs={c.num_parallel_envs}: "
            "every environment plays at least one episode per rollout"
        )
    if c.use_subproc_env and c.num_parallel_envs == 1:
        yield "use_subproc_env needs num_parallel_envs > 1"
    if c.render and c.headless:
        yield "render and headless contradict each other: drop one"
    if c.render and c.num_parallel_envs > 1:
        yield "render shows one environment: set num_parallel_envs=1 or drop render"


def _credit(c: TrainingConfig) -> Iterator[str]:
    if c.credit == "decision":
        return
    if c.model_type != "flow_mlp" and c.critic_input != "state":
        yield f"credit={c.credit} needs a critic that sees every control step: set critic_input=state"
    if c.discount_per != "control_step":
        yield f"credit={c.credit} discounts control steps, discount_per={c.discount_per}: set discount_per=control_step"
    if not c.train_critic:
        yield f"credit={c.credit} needs a critic: set train_critic, or credit=decision"


def _seeds(c: TrainingConfig) -> Iterator[str]:
    if c.eval_seed + c.eval_episodes > FIRST_REPORTING_SEED:
        yield (
            f"eval_seed={c.eval_seed} + eval_episodes={c.eval_episodes} reaches the reporting seeds "
            f"(from {FIRST_REPORTING_SEED}): checkpoints must not be chosen by them, lower eval_seed"
        )
    if c.eval_seed < c.num_parallel_envs:
        yield f"eval_seed={c.eval_seed} leaves no seed below it for each of num_parallel_envs: raise eval_seed"
    if c.report_seed < FIRST_REPORTING_SEED:
        yield f"report_seed={c.report_seed} lies in the training seeds: use {FIRST_REPORTING_SEED} or more"
    if c.seed >= FIRST_REPORTING_SEED:
        yield f"seed={c.seed} is a reporting seed: train with one below {FIRST_REPORTING_SEED}"


def _models(c: TrainingConfig) -> Iterator[str]:
    trained = (c.train_action_head, c.train_time_mlp, c.train_full_expert, c.train_noise_head)
    if not any(trained):
        yield "train_action_head, train_time_mlp, train_full_expert and train_noise_head are all off: nothing to train"
    if c.noise_basis == "white" and c.noise_last_step_only and c.num_denoising_steps == 1:
        yield "noise_last_step_only changes nothing with num_denoising_steps=1: drop it"
    if c.noise_basis == "dct" and c.num_noise_coefficients > c.n_action_steps:
        yield (
            f"num_noise_coefficients={c.num_noise_coefficients} exceeds n_action_steps={c.n_action_steps}: "
            "a chunk has no more cosines than steps"
        )


def _flow_mlp(c: TrainingConfig) -> Iterator[str]:
    """What the state-based policy cannot do, and fields that would be ignored beside the chosen model_type."""
    unset = {f.name: f.default for f in dataclasses.fields(c)}
    if c.model_type != "flow_mlp":
        if c.flow_mlp_pretrained_path != unset["flow_mlp_pretrained_path"]:
            yield (
                f"flow_mlp_pretrained_path={c.flow_mlp_pretrained_path} is not read with model_type={c.model_type}: "
                "use --preset flow_mlp or drop it"
            )
        return
    for name in ("prefix_cache", "prefix_cache_gb", "compile_expert"):
        if getattr(c, name) != unset[name]:
            yield f"{name}={getattr(c, name)} is not read with model_type=flow_mlp, which is no transformer: drop it"
    if c.pretrained_path != unset["pretrained_path"]:
        yield (
            f"pretrained_path={c.pretrained_path} names a SmolVLA, which model_type=flow_mlp does not read: start from "
            "--preset flow_mlp and name the policy by flow_mlp_pretrained_path"
        )
    if c.n_action_steps != c.chunk_size:
        yield (
            f"n_action_steps={c.n_action_steps} is not chunk_size={c.chunk_size}: a flow_mlp's layers are as wide as "
            "its chunk, it executes all that it predicts; make one of that width with reinflow-sft-mlp --chunk-size"
        )
    if c.train_time_mlp != c.train_full_expert:
        yield (
            f"train_time_mlp={c.train_time_mlp} but train_full_expert={c.train_full_expert}: a flow_mlp embeds flow "
            "time in its trunk, set both alike"
        )


def _pi0(c: TrainingConfig) -> Iterator[str]:
    """What Pi0 cannot do, and its fields beside another model_type."""
    unset = {f.name: f.default for f in dataclasses.fields(c)}
    if c.model_type != "pi0":
        for name in PI0_FIELDS:
            if getattr(c, name) != unset[name]:
                value = f"{name}={getattr(c, name)}"
                yield f"{value} is not read with model_type={c.model_type}: use --preset pi0 or drop it"
        return
    if c.pretrained_path != unset["pretrained_path"]:
        yield (
            f"pretrained_path={c.pretrained_path} names a SmolVLA, which model_type=pi0 does not read: name the policy "
            "by pi0_pretrained_path"
        )
    if c.n_action_steps != c.chunk_size:
        yield (
            f"n_action_steps={c.n_action_steps} is not chunk_size={c.chunk_size}: Pi0's action tokens see each other "
            "in both directions, so it executes all that it predicts; make them equal"
        )
    if c.peft_rank and not c.train_full_expert:
        yield f"peft_rank={c.peft_rank} adapts the expert, which train_full_expert=False freezes: set one of them"


def _files(c: TrainingConfig) -> Iterator[str]:
    if c.checkpoint_path and Path(c.checkpoint_path).is_file():
        yield (
            f"checkpoint_path={c.checkpoint_path} is a file: pickled checkpoints are not loaded; "
            "name a run directory or a directory under its checkpoints/"
        )
    run = Path(c.output_dir)
    if c.output_dir and not c.resume and (run / "config.json").exists():
        yield f"output_dir={c.output_dir} holds a run already: add --resume, or choose another directory"


def resume_directory(checkpoint_path: str, output_dir: str) -> Path:
    """Run directory that --resume continues.

    Raises:
        ConfigError: neither checkpoint_path nor output_dir is one.
    """
    for field, value in (("checkpoint_path", checkpoint_path), ("output_dir", output_dir)):
        path = Path(value)
        for candidate in (path, *path.parents[:3]) if value else ():
            if (candidate / "config.json").exists() and (candidate / "checkpoints").exists():
                return candidate
        if value and field == "output_dir":
            raise ConfigError(f"output_dir={value} holds no run to resume (no config.json with checkpoints/)")
    raise ConfigError("resume needs the run: give its directory as --output-dir (or --checkpoint-path)")


def config_to_json(config: TrainingConfig) -> dict[str, Any]:
    """JSON-able dict of all fields."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(data: Mapping[str, Any], config_type: type[TrainingConfig]) -> TrainingConfig:
    """Inverse of ``config_to_json``; unknown or missing fields are an error."""
    fields = {f.name: f for f in dataclasses.fields(config_type)}
    if data.keys() != fields.keys():
        raise ConfigError(
            f"config.json was written by another version: missing {sorted(fields.keys() - data.keys())}, "
            f"unknown {sorted(data.keys() - fields.keys())}"
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return config_type(**values)


def flag_value(argv: Sequence[str], *names: str) -> str:
    """Value of the first of ``names`` among the flags, before the parser runs; "" without one."""
    for i, word in enumerate(argv):
        for name in names:
            if word == name and i + 1 < len(argv):
                return argv[i + 1]
            if word.startswith(name + "="):
                return word.split("=", 1)[1]
    return ""


def starting_point(argv: Sequence[str], presets: Mapping[str, TrainingConfig]) -> TrainingConfig:
    """The config whose fields the flags override: a preset's, or with --resume the run's own."""
    if "--resume" in argv:
        run = resume_directory(
            flag_value(argv, "--checkpoint-path", "--checkpoint_path"),
            flag_value(argv, "--output-dir", "--output_dir"),
        )
        some = next(iter(presets.values()))
        saved = json.loads((run / "config.json").read_text()) | {"resume": True, "output_dir": str(run)}
        return config_from_json(saved, type(some))
    preset = flag_value(argv, "--preset") or "smolvla"
    if preset not in presets:
        raise ConfigError(f"preset={preset} is unknown: choose one of {sorted(presets)}")
    return presets[preset]


def check_resumed(config: TrainingConfig, saved: TrainingConfig) -> None:
    """Only settings that do not change the run's meaning may differ from the saved ones."""
    given, stored = config_to_json(config), config_to_json(saved)
    changed = [k for k in given if given[k] != stored[k] and k not in CHANGEABLE_ON_RESUME]
    if changed:
        raise ConfigError(
            "a resumed run keeps its settings; these differ from config.json: "
            + ", ".join(f"{k} ({stored[k]} -> {given[k]})" for k in changed)
            + ". Leave them out, or start a new run with --pretrained-path on the checkpoint"
        )
