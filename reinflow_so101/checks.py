"""What a training's settings must satisfy together. Ranges of single fields stand in their annotations.

Free of torch and of files: contradictions are refused when the config is built, in half a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from reinflow import ConfigError
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import out_of_range
from so101_sim.tasks.registry import named

FlatConfig = Any
"""The one flat config of train_reinflow.py, which no room below may name."""

PI0_FIELDS = (
    "pi0_pretrained_path", "pi0_tokenizer_path", "peft_rank", "pi0_vlm_dtype", "pi0_gradient_checkpointing",
)  # fmt: skip

WORKER_FIELDS = ("num_rollout_workers", "rollout_worker_cpus", "rollout_worker_gpus")


def check_config(config: FlatConfig) -> None:
    """Raise one ConfigError that lists everything wrong with ``config``."""
    problems = list(out_of_range(config))
    if config.num_parallel_envs > 0:  # what a rollout holds is a quotient by it
        problems += [problem for check in CHECKS for problem in check(config)]
    if problems:
        raise ConfigError("; ".join(problems))


def _environment(c: FlatConfig) -> Iterator[str]:
    try:
        named(c.task)
    except ConfigError as error:
        yield str(error)
    if c.control_hz and c.steps_per_action != type(c).steps_per_action:
        yield f"steps_per_action={c.steps_per_action} is not read with control_hz={c.control_hz:g}: drop one"
    if c.calibration and c.joint_frame not in ("auto", "lerobot_m100_100"):
        yield f"calibration={c.calibration} is not read with joint_frame={c.joint_frame}: drop one"
    if c.image_size == 0:
        return  # the policy will say
    try:
        c.env()
    except ConfigError as error:
        yield str(error)


def _contradictions(c: FlatConfig) -> Iterator[str]:
    if c.chain_noise == "flow_sde":
        yield from _flow_sde(c)
    if c.sigma_min > c.sigma_max:
        yield f"sigma_min={c.sigma_min} exceeds sigma_max={c.sigma_max}: swap them, or make them equal for fixed noise"
    if c.policy_optimizer == "natural" and c.target_kl == 0:
        yield "target_kl=0 with policy_optimizer=natural: it is the length of a natural step, set it to e.g. 0.03"
    if c.policy_optimizer == "natural" and c.compile_expert:
        yield (
            "compile_expert gains nothing with policy_optimizer=natural, which watches every layer: drop it, or set "
            "policy_optimizer=adam"
        )
    if c.policy_optimizer == "natural" and (c.num_ppo_epochs != 1 or c.undo_overshoot):
        yield (
            f"num_ppo_epochs={c.num_ppo_epochs} and undo_overshoot={c.undo_overshoot} are not read with "
            "policy_optimizer=natural, which takes one step of measured length a rollout: set num_ppo_epochs=1 and "
            "drop undo_overshoot"
        )


def _flow_sde(c: FlatConfig) -> Iterator[str]:
    """What Flow-SDE's noise, whose std is given by the time alone, cannot be joined with."""
    if c.noise_last_step_only:
        yield "noise_last_step_only contradicts chain_noise=flow_sde, which draws the noisy step: drop one"
    if c.entropy_coeff:
        yield f"entropy_coeff={c.entropy_coeff} changes nothing with chain_noise=flow_sde, whose std is given: drop it"
    if c.train_noise_head and not (c.train_action_head or c.train_time_mlp or c.train_full_expert):
        yield "train_noise_head alone trains nothing with chain_noise=flow_sde: train a part of the policy"


def _sizes(c: FlatConfig) -> Iterator[str]:
    if c.n_action_steps > c.chunk_size > 0:
        yield f"n_action_steps={c.n_action_steps} exceeds chunk_size={c.chunk_size}: execute at most the whole chunk"
    whole = c.chunks_per_episode * c.n_action_steps
    if whole and whole != c.max_steps_per_episode and not c.env_id:
        yield (
            f"chunks_per_episode={c.chunks_per_episode} x n_action_steps={c.n_action_steps} is not "
            f"max_steps_per_episode={c.max_steps_per_episode}: change one of them"
        )
    batch = c.minibatch_size * c.gradient_accumulation_steps
    if batch > c.decisions_per_iteration > 0:
        yield (
            f"gradient_accumulation_steps={c.gradient_accumulation_steps} x minibatch_size={c.minibatch_size} needs "
            f"{batch} decisions, a rollout has {c.decisions_per_iteration}: raise episodes_per_iteration or lower one"
        )
    if c.episodes_per_iteration < c.num_parallel_envs and not c.rollout_steps:
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


def _workers(c: FlatConfig) -> Iterator[str]:
    """What rollout workers cannot be joined with, and their fields without them."""
    if c.rollout_backend == "local":
        unset = {f.name: f.default for f in dataclasses.fields(c)}
        for name in WORKER_FIELDS:
            if getattr(c, name) != unset[name]:
                yield f"{name}={getattr(c, name)} is not read with rollout_backend=local: add --rollout-backend ray"
        return
    if c.num_rollout_workers > c.num_parallel_envs:
        yield (
            f"num_rollout_workers={c.num_rollout_workers} exceeds num_parallel_envs={c.num_parallel_envs}: every "
            "worker plays at least one environment, raise num_parallel_envs"
        )
    for name in ("render", "use_subproc_env"):
        if getattr(c, name):
            yield f"{name} is not read with rollout_backend=ray, whose workers are processes of their own: drop it"


def _vector(c: FlatConfig) -> Iterator[str]:
    """What a chosen form of the environments cannot be joined with."""
    if c.vector == "auto":
        return
    if c.use_subproc_env and c.vector != "subproc":
        yield f"use_subproc_env contradicts vector={c.vector}: drop one"
    if c.render and c.vector != "sequential":
        yield f"render shows the sequential form, not vector={c.vector}: drop one"
    if c.env_id:
        yield f"vector={c.vector} is of the arm and not read with env_id={c.env_id}: drop it"
    if c.rollout_backend != "local":
        yield f"vector={c.vector} is not read with rollout_backend={c.rollout_backend}: drop one"


def _credit(c: FlatConfig) -> Iterator[str]:
    if c.credit == "decision":
        return
    if c.model_type != "flow_mlp" and c.critic_input != "state":
        yield f"credit={c.credit} needs a critic that sees every control step: set critic_input=state"
    if c.discount_per != "control_step":
        yield f"credit={c.credit} discounts control steps, discount_per={c.discount_per}: set discount_per=control_step"
    if not c.train_critic:
        yield f"credit={c.credit} needs a critic: set train_critic, or credit=decision"


def _seeds(c: FlatConfig) -> Iterator[str]:
    if c.eval_seed + c.eval_episodes > FIRST_REPORTING_SEED:
        yield (
            f"eval_seed={c.eval_seed} + eval_episodes={c.eval_episodes} reaches the reporting seeds "
            f"(from {FIRST_REPORTING_SEED}): checkpoints must not be chosen by them, lower eval_seed"
        )
    if c.eval_seed < 1:
        yield f"eval_seed={c.eval_seed} leaves no seed below it to train with: raise it, e.g. to {FIRST_TUNING_SEED}"
    if c.report_seed < FIRST_REPORTING_SEED:
        yield f"report_seed={c.report_seed} is a training or tuning seed: use {FIRST_REPORTING_SEED} or more"
    if c.seed >= FIRST_REPORTING_SEED:
        yield f"seed={c.seed} is a reporting seed: train with one below {FIRST_REPORTING_SEED}"


def _models(c: FlatConfig) -> Iterator[str]:
    trained = (c.train_action_head, c.train_time_mlp, c.train_full_expert, c.train_noise_head)
    if not any(trained):
        yield "train_action_head, train_time_mlp, train_full_expert and train_noise_head are all off: nothing to train"
    if c.heads_first and not (c.train_action_head or c.train_noise_head):
        yield f"heads_first={c.heads_first} with train_action_head and train_noise_head off: nothing learns at first"
    if c.noise_basis == "white" and c.noise_last_step_only and c.num_denoising_steps == 1:
        yield "noise_last_step_only changes nothing with num_denoising_steps=1: drop it"
    if c.noise_basis == "dct" and c.num_noise_coefficients > c.n_action_steps > 0:
        yield (
            f"num_noise_coefficients={c.num_noise_coefficients} exceeds n_action_steps={c.n_action_steps}: "
            "a chunk has no more cosines than steps"
        )


def _flow_mlp(c: FlatConfig) -> Iterator[str]:
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
    if c.heads_first:
        yield f"heads_first={c.heads_first}, but a flow_mlp has no update of its heads alone: add --heads-first 0"
    if c.pretrained_path != unset["pretrained_path"]:
        yield (
            f"pretrained_path={c.pretrained_path} names a SmolVLA, which model_type=flow_mlp does not read: start from "
            "--preset flow_mlp and name the policy by flow_mlp_pretrained_path"
        )
    if c.train_time_mlp != c.train_full_expert:
        yield (
            f"train_time_mlp={c.train_time_mlp} but train_full_expert={c.train_full_expert}: a flow_mlp embeds flow "
            "time in its trunk, set both alike"
        )


def _pi0(c: FlatConfig) -> Iterator[str]:
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
    if c.n_action_steps != c.chunk_size and c.n_action_steps and c.chunk_size:
        yield (
            f"n_action_steps={c.n_action_steps} is not chunk_size={c.chunk_size}: Pi0's action tokens see each other "
            "in both directions, so it executes all that it predicts; make them equal"
        )
    if c.peft_rank and not c.train_full_expert:
        yield f"peft_rank={c.peft_rank} adapts the expert, which train_full_expert=False freezes: set one of them"


def _gym(c: FlatConfig) -> Iterator[str]:
    """Fields that a Gymnasium environment does not read, and what it needs."""
    if not c.env_id:
        return
    if c.model_type != "flow_mlp":
        yield f"env_id={c.env_id} is seen by its state, model_type={c.model_type} by images: use model_type=flow_mlp"
    if c.credit != "decision":
        yield f"credit={c.credit} needs the arm's simulator state: drop it with env_id={c.env_id}"
    unread = ("use_subproc_env", "render", "control_hz", "rename_map", "calibration", "auto_scale")
    for name in unread:
        if getattr(c, name):
            yield f"{name} is of the arm and not read with env_id={c.env_id}: drop it"


CHECKS = (_contradictions, _sizes, _workers, _vector, _environment, _credit, _seeds, _models, _flow_mlp, _pi0, _gym)
