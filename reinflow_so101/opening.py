"""A training's run is opened here: policy, learner and environments of the one flat config, new or as saved."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow import ConfigError, UserError
from reinflow.settings import check_same_settings, config_to_json, read_config, refuse_existing_run
from reinflow_so101.checks import FlatConfig
from reinflow_so101.command_line import (
    CHANGEABLE_ON_RESUME,
    fresh_directory,
    named_checkpoint,
    pick_device,
    this_command,
)

if TYPE_CHECKING:  # torch and LeRobot are loaded when a training starts
    from reinflow.policy import FlowPolicy
    from reinflow.run import Run


def open_run(config: FlatConfig) -> tuple[FlatConfig, Run]:
    """A new run in its own directory, or with ``config.resume`` the saved one; and its settings as they came out."""
    config, run_dir, chosen = _prepare(config)
    if not (config.resume or config.output_dir):
        stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
        run_dir = fresh_directory(f"outputs/train/{stamp}_{config.preset}")
    config, run = make_run(config, run_dir, chosen)
    return config, run.resume(chosen) if config.resume else run.start()


def check_start(config: FlatConfig) -> None:
    """Everything up to the first step of a training, without a trace: policy, scene, first images, room on the disk."""
    from reinflow.rollout import RolloutState

    config, run_dir, chosen = _prepare(config)
    config, run = make_run(config, run_dir, chosen)
    try:
        RolloutState.start(run.policy, run.env, run.seeds)
        print(run.describe_room())
    finally:
        run.env.close()
    print("check passed: everything up to the first step works; nothing was written")


def _prepare(config: FlatConfig) -> tuple[FlatConfig, Path, Path | None]:
    """The config as it will be used, its directory, the checkpoint to resume: what needs no policy to be refused."""
    from reinflow.checkpoint import resolve_checkpoint
    from so101_sim.scene import check_scene

    run_dir, chosen = Path(config.output_dir), None
    if config.resume:
        check_same_settings(config_to_json(config), read_config(run_dir), CHANGEABLE_ON_RESUME)
        chosen = resolve_checkpoint(named_checkpoint(config.checkpoint_path) or run_dir)
    elif config.output_dir:
        refuse_existing_run(run_dir)
    if config.auto_scale:
        from reinflow_so101.auto_scale import auto_scale

        config, changes = auto_scale(config)
        print(changes)
    check_scene(config.env())
    return config, run_dir, chosen


def make_run(config: FlatConfig, run_dir: Path, resumed: Path | None = None) -> tuple[FlatConfig, Run]:
    """Policy, learner and environments of ``config``, not started yet; and its settings as they came out.

    Args:
        config: of the training.
        run_dir: of the run.
        resumed: the checkpoint to go on from, which holds a policy too, should the one to start from be gone.
    """
    import torch

    from reinflow.learner import PPOLearner
    from reinflow.run import Run
    from reinflow_so101.doctor_rules import RULES
    from reinflow_so101.policies import build_policy
    from reinflow_so101.policy_card import policy_card
    from so101_sim.vector.make import make_vector_env

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = pick_device(config.device, or_any=config.resume)
    start, weights = _start_policy(config, resumed)
    wanted = replace(config.policy(), policy_path=str(start))
    policy = build_policy(wanted, config.env(), config.decisions_per_iteration, device)
    config = replace(config, **policy.settled())
    learner = PPOLearner(policy, config.chain(), config.learner(), config.seed)
    env = make_vector_env(
        config.env(), config.num_parallel_envs, "subproc" if config.use_subproc_env else "auto", viewer=config.render
    )
    cores = min(env.num_envs, os.cpu_count() or 1)
    print(f"policy on {device}, {torch.get_num_threads()} torch threads; {env.num_envs} environments on {cores} cores")
    run = Run(
        run_dir, policy, env, learner, config.run(), config_to_json(config),
        rules=RULES, changeable=CHANGEABLE_ON_RESUME, policy_card=policy_card(config.env()), start_weights=weights,
        resume_command=f"{this_command('reinflow-train')} --resume --output-dir {run_dir}",
    )  # fmt: skip
    return config, run


def _start_policy(config: FlatConfig, resumed: Path | None) -> tuple[Path, str]:
    """Directory of the policy to start from, and its weights' sha256. A resumed run whose start policy is gone or was
    changed goes on from the copy in its checkpoint.

    Raises:
        ConfigError: it is gone, and the checkpoint's copy cannot stand for it.
    """
    from reinflow.checkpoint import PRETRAINED, stored_value
    from reinflow.checksums import sha256
    from reinflow_so101.policies import FAMILIES
    from reinflow_vla.directory import WEIGHTS_FILE

    stored = str(stored_value(resumed, "start_weights") or "") if resumed else ""
    try:
        directory = FAMILIES[config.model_type].directory(config.policy_path)
        found = sha256(directory / WEIGHTS_FILE)
    except (UserError, OSError) as error:
        if resumed is None or not stored:
            if isinstance(error, UserError):
                raise
            raise ConfigError(f"{config.policy_path} holds no policy ({error}): name its directory") from error
        found = "not there"
    if not stored or found == stored:
        return directory, found
    if resumed is None or config.peft_rank or config.anchor_coeff:
        raise ConfigError(
            f"the policy that the run started from is gone from {config.policy_path}, or was changed; with peft_rank "
            "or anchor_coeff the checkpoint's copy cannot stand for it: put it back"
        )
    copy = resumed / PRETRAINED
    print(f"{config.policy_path} is gone or was changed: going on from the checkpoint's own copy {copy}")
    return copy, stored


def make_policy(config: FlatConfig, device: str = "cpu") -> FlowPolicy:
    """The policy that ``config`` trains; raises ConfigError if it does not fit."""
    from reinflow_so101.policies import build_policy

    return build_policy(config.policy(), config.env(), config.decisions_per_iteration, device)
