"""A training's run is opened here: policy, learner and environments of the one flat config, new or as saved."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow import ConfigError
from reinflow.env import usable_cores
from reinflow.launch import launched, local_rank
from reinflow.progress import spinner
from reinflow.settings import check_same_settings, config_to_json, cut, read_config, refuse_existing_run
from reinflow_so101.checks import FlatConfig
from reinflow_so101.command_line import (
    CHANGEABLE_ON_RESUME,
    fresh_directory,
    named_checkpoint,
    pick_device,
    this_command,
)
from reinflow_so101.door import LEROBOTS_STEPS, DoorSettings, Entrance, enter
from reinflow_so101.policy_card import known_env
from reinflow_so101.presets import PRESET_VALUES
from reinflow_so101.worlds import check_world, gym_world, make_world, world_card
from reinflow_vla.directory import brings_its_backbone
from so101_sim.tasks.registry import describe, how_to_choose, nearest_task

if TYPE_CHECKING:  # torch and LeRobot are loaded when a training starts
    from reinflow.env import ChunkVectorEnv
    from reinflow.policy import FlowPolicy
    from reinflow.run import Run
    from reinflow_so101.policies import PolicySettings


def open_run(config: FlatConfig) -> tuple[FlatConfig, Run]:
    """A new run in its own directory, or with ``config.resume`` the saved one; and its settings as they came out."""
    from reinflow.distributed import from_writer, is_writer
    from reinflow_so101.manifest import write_start

    config, start = _prepare(config)
    run_dir = Path(config.output_dir)
    if not (config.resume or config.output_dir):
        stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
        run_dir = from_writer(lambda: fresh_directory(f"outputs/train/{stamp}_{config.preset}"))
    config, run = make_run(config, run_dir, start)
    run = run.resume(start.checkpoint) if config.resume else run.start()
    if is_writer():
        write_start(run.run_dir, run.policy, config)
    return config, run


def check_start(config: FlatConfig) -> None:
    """Everything up to the first step of a training, without a trace: policy, scene, first images, room on the disk."""
    from reinflow.playing import begin

    config, start = _prepare(config)
    config, run = make_run(config, Path(config.output_dir), start)
    try:
        begin(run.policy, run.env, run.seeds)
        print(run.describe_room())
    finally:
        run.env.close()
    print("check passed: everything up to the first step works; nothing was written")


@dataclass(frozen=True)
class Start:
    """What a run starts from: the policy's directory, its weights' sha256, and the checkpoint that is resumed."""

    policy: Path
    weights: str = ""
    checkpoint: Path | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the policy is the checkpoint's own, which is in the environment's terms already."""
        return self.checkpoint is not None and self.policy.parent == self.checkpoint


def _prepare(config: FlatConfig) -> tuple[FlatConfig, Start]:
    """The config as it will be used, and what the run starts from: what needs no weights to be refused."""
    from reinflow.checkpoint import resolve_checkpoint
    from reinflow.distributed import from_writer
    from so101_sim.scene import check_scene
    from so101_sim.vector.warp import check_warp

    _refuse_other_settings(config)
    own_environments(config)
    if config.vector == "warp":
        check_warp()
    chosen, run_dir = None, Path(config.output_dir)
    if config.resume:
        check_same_settings(config_to_json(config), read_config(run_dir), CHANGEABLE_ON_RESUME)
        chosen = from_writer(lambda: resolve_checkpoint(named_checkpoint(config.checkpoint_path) or run_dir))
    elif config.output_dir:
        from_writer(lambda: refuse_existing_run(run_dir))
    if config.auto_scale:
        from reinflow_so101.auto_scale import auto_scale

        config, changes = auto_scale(config)
        print(changes)
    if config.image_size and not config.env_id:
        check_scene(config.env())
    start = _start_policy(config, chosen)
    config = settle(config, start.policy, DoorSettings() if start.is_copy else None)
    if not config.env_id:
        check_scene(config.env())
    return config, start


def _refuse_other_settings(config: FlatConfig) -> None:
    """Raise ConfigError where ranks were started with different settings: each would train something else."""
    from reinflow.distributed import gather

    first, *others = gather(config_to_json(config))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise ConfigError(
                    f"{name}={value} on rank 0, {other.get(name)} on rank {number}: start all ranks with the same flags"
                )


def own_environments(config: FlatConfig) -> int:
    """How many of the run's environments are this rank's. Raises ConfigError where some rank would have none."""
    from reinflow.distributed import share, size

    if config.num_parallel_envs < size():
        raise ConfigError(
            f"num_parallel_envs={config.num_parallel_envs} cannot be shared by {size()} ranks: raise it to a multiple "
            "of them, or start fewer"
        )
    if size() > 1 and config.rollout_backend != "local":
        raise ConfigError(
            f"rollout_backend={config.rollout_backend} serves one learner, {size()} ranks were started: leave out "
            "torchrun, or take rollout_backend=local"
        )
    return len(share(config.num_parallel_envs))


def settle(config: FlatConfig, directory: Path, door: DoorSettings | None = None) -> FlatConfig:
    """Fields that are left to the policy, as it says; how it fits is printed, what does not fit a ConfigError.

    Args:
        config: of the training.
        directory: of the policy.
        door: how it fits, instead of what ``config`` says.
    """
    if config.model_type == "flow_mlp":
        from reinflow.flow_mlp import read_sizes

        sizes = read_sizes(directory)
        chunk, steps = sizes["chunk_size"], sizes["num_denoising_steps"]
        executed = sizes.get("n_action_steps", chunk)
        entrance = Entrance(directory, chunk_size=chunk, n_action_steps=executed, num_denoising_steps=steps)
        if config.env_id:
            check_world(config.world(), sizes["state_dim"], sizes["action_dim"], directory)
            own = gym_world(directory)
            if own and own.env_id != config.env_id:
                entrance.lines.append(f"the policy was made for {own.env_id}, {config.env_id} is played")
    else:
        entrance = enter(directory, door or cut(config, DoorSettings), config.cameras)
    if entrance.problems:
        raise ConfigError("; ".join(entrance.problems))
    config = _filled(config, entrance)
    if not config.env_id:
        _compare_task(config, entrance)
    if brings_its_backbone(directory):
        entrance.lines.append(
            "checkpoints bring their backbone's folder along; for LeRobot's own commands write a copy with its "
            "absolute path: reinflow-materialize --policy-dir RUN --output-dir DIR"
        )
    for line in entrance.lines:
        print(f"  {line}")
    return config


def _compare_task(config: FlatConfig, entrance: Entrance) -> None:
    """A line where the policy was made for another task than the one played, or says of none."""
    if elsewhere := gym_world(entrance.source):
        raise ConfigError(
            f"{entrance.source} acts in {elsewhere.env_id}: name it with --env-id {elsewhere.env_id}, or another policy"
        )
    known, played = known_env(entrance.source), config.env()
    if known is None:
        entrance.lines.append(
            f"the policy says of no task that it was made for: {nearest_task(played)} is played; {how_to_choose()}"
        )
    elif describe(known[0]) != describe(played):
        entrance.lines.append(f"the policy was made for another task: {describe(known[0])}")


def published_sizes(config: FlatConfig) -> FlatConfig:
    """Fields that are left to the policy, as those that LeRobot publishes have them."""
    published = Entrance(Path(config.policy_path), chunk_size=50, n_action_steps=50, image_size=256)
    published.num_denoising_steps = LEROBOTS_STEPS
    return _filled(config, published)


def _of_one_policy(config: FlatConfig) -> tuple[int, ...]:
    """Chunk sizes that nobody asked for: the default and the preset's, which are of one policy each."""
    return type(config).chunk_size, PRESET_VALUES[config.preset].get("chunk_size", 0)


def _filled(config: FlatConfig, entrance: Entrance) -> FlatConfig:
    """The config with the sizes of a policy where it leaves them to it; differences become lines of ``entrance``."""
    chunk, executed = config.chunk_size or entrance.chunk_size, config.n_action_steps or entrance.n_action_steps
    if chunk != entrance.chunk_size and chunk in _of_one_policy(config):
        entrance.lines.append(f"chunk_size {entrance.chunk_size}, as the policy predicts")
        if chunk != type(config).chunk_size:  # the preset's executes a part of it that is as little another policy's
            executed = entrance.n_action_steps
        chunk = entrance.chunk_size
    executed = min(executed, chunk)
    number, limit = config.chunks_per_episode, config.max_steps_per_episode
    if config.env_id:  # its time limit may strike within a chunk
        number = math.ceil(limit / executed)
    elif number * executed != limit:
        number = math.ceil(limit / executed)
        entrance.lines.append(f"{number} chunks of {executed} an episode: {number * executed} control steps")
    steps = config.num_denoising_steps or entrance.num_denoising_steps
    for name, ours, theirs in (
        ("n_action_steps", executed, entrance.n_action_steps), ("denoising steps", steps, entrance.num_denoising_steps)
    ):  # fmt: skip
        if ours != theirs:
            entrance.lines.append(f"{name}: {ours} here and in the export, the policy stores {theirs} (0 takes that)")
    return replace(
        config, chunk_size=chunk, n_action_steps=executed, chunks_per_episode=number, num_denoising_steps=steps,
        max_steps_per_episode=limit if config.env_id else number * executed,
        image_size=config.image_size or max(entrance.image_size, 8),
    )  # fmt: skip


def make_run(config: FlatConfig, run_dir: Path, start: Start | None = None) -> tuple[FlatConfig, Run]:
    """Policy, learner and environments of ``config``, not started yet; and its settings as they came out.

    Args:
        config: of the training.
        run_dir: of the run.
        start: what it starts from; None is the policy that ``config`` names.
    """
    from reinflow.learner import PPOLearner
    from reinflow.run import Run
    from reinflow_so101.doctor_rules import RULES
    from reinflow_so101.manifest import manifest
    from reinflow_so101.policies import build_policy
    from reinflow_so101.report.after import RESULTS

    device = _own_part_of_the_machine(config)
    wanted = replace(config.policy(), policy_path=str(start.policy)) if start else config.policy()
    if start and start.is_copy:
        wanted = replace(wanted, rename_map="", normalization="auto", joint_frame="auto", calibration="")
    with spinner("loading the policy"):
        policy = build_policy(wanted, config.env(), config.chunk_steps_per_rollout * own_environments(config), device)
    config = replace(config, **_settled(policy))
    learner = PPOLearner(policy, config.chain(), config.learner(), config.seed, config.rescore_log_probs)
    env = _environments(config, wanted, policy, start)
    print(manifest(policy, config))
    print(_who_works_where(device, env))
    run = Run(
        run_dir, policy, env, learner, config.run(), config_to_json(config),
        rules=RULES, changeable=CHANGEABLE_ON_RESUME, policy_card=world_card(config.world()),
        start_weights=start.weights if start else "",
        resume_command=f"{this_command('reinflow-train')} --resume --output-dir {run_dir}",
        tags=(config.preset, config.env_id or nearest_task(config.env()), config.model_type), results=RESULTS,
    )  # fmt: skip
    return config, run


def _environments(
    config: FlatConfig, wanted: PolicySettings, policy: FlowPolicy, start: Start | None
) -> ChunkVectorEnv:
    """Those of ``config``: in this process, or with copies of ``policy`` on rollout workers."""
    if config.rollout_backend == "local":
        backend = "subproc" if config.use_subproc_env else config.vector
        if backend == "warp":
            print("vector=warp: MuJoCo Warp compiles its kernels once on every machine, which takes a minute or two")
        with spinner("making the environments"):
            return make_world(
                config.world(), own_environments(config), backend, viewer=config.render, device=str(policy.device)
            )
    from reinflow.checkpoint import LAST, PRETRAINED
    from reinflow.rollout_workers import RolloutWorkers
    from reinflow_so101.workers import Copy, for_workers

    directory, weights = Path(wanted.policy_path), start.weights if start else ""
    name = config.policy_path
    if start and start.checkpoint and start.is_copy:  # any of the run's will do: all differ in what workers are sent
        directory, weights = start.checkpoint.parent / LAST / PRETRAINED, ""
        name = str(directory)
    settings = for_workers(replace(wanted, **policy.settled()), name, directory)
    make = Copy(settings, config.env(), config.world(), config.chunk_steps_per_rollout, weights)
    with spinner("starting rollout workers"):
        return RolloutWorkers(
            policy, make, config.num_parallel_envs, config.num_rollout_workers,
            config.rollout_worker_cpus, config.rollout_worker_gpus,
        )  # fmt: skip


def _own_part_of_the_machine(config: FlatConfig) -> str:
    """The device of this process; it takes its threads, and as one of several ranks its share of them and its GPU.

    Raises:
        ConfigError: there is no such device, or it is not one that each rank has for itself.
    """
    import torch

    if launched():  # a preset's number is of a whole machine
        torch.set_num_threads(min(config.num_threads or usable_cores(), usable_cores()))
    elif config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = _own_device(config)
    _refuse_shared_gpu(config, device)
    return device


def _own_device(config: FlatConfig) -> str:
    import torch

    device = pick_device(config.device, or_any=config.resume)
    gpus = torch.cuda.device_count() if device == "cuda" and launched() else 0
    if gpus <= 1:  # none, the only one, or the one that the launcher lets this process see
        return device
    if local_rank() >= gpus:
        raise ConfigError(
            f"device=cuda: {gpus} GPUs for rank {local_rank()} of this machine: start a rank for each GPU"
        )
    torch.cuda.set_device(local_rank())
    os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(local_rank()))  # else all draw on the first
    return f"cuda:{local_rank()}"


def _refuse_shared_gpu(config: FlatConfig, device: str) -> None:
    """Raise ConfigError where two ranks compute on one GPU, or ranks on different kinds of device: their first sum
    would fail or never end."""
    import torch

    from reinflow.distributed import gather, size

    if size() == 1:
        return
    kind = torch.device(device).type
    gpu = str(torch.cuda.get_device_properties(device).uuid) if kind == "cuda" else ""
    kinds, gpus = zip(*gather((kind, gpu)), strict=True)
    if len(set(kinds)) > 1:
        each = ", ".join(f"{kind} on rank {kinds.index(kind)}" for kind in dict.fromkeys(kinds))
        raise ConfigError(f"device={config.device} is {each}: name one that all ranks have, such as --device cpu")
    if kind == "cuda" and len(set(gpus)) < len(gpus):
        raise ConfigError(f"device={config.device}: ranks share a GPU: start a rank for each GPU, or take --device cpu")


def _who_works_where(device: str, env: ChunkVectorEnv) -> str:
    import torch

    from reinflow.distributed import size
    from reinflow.rollout_workers import RolloutWorkers

    each = f"{size()} ranks, the first of them: " if size() > 1 else ""
    environments = f"{env.num_envs} environments on {min(env.num_envs, usable_cores())} cores"
    if isinstance(env, RolloutWorkers):
        environments = env.describe()
    return f"{each}policy on {device}, {torch.get_num_threads()} torch threads; {environments}"


def _settled(policy: FlowPolicy) -> dict[str, object]:
    """What the policy chose by itself. Raises ConfigError where the ranks' policies chose differently."""
    from reinflow.distributed import gather

    chosen = gather(policy.settled())
    for number, other in enumerate(chosen):
        if other != chosen[0]:
            raise ConfigError(f"rank 0 chose {chosen[0]}, rank {number} {other}: name one, such as prefix_cache=kv")
    return dict(chosen[0])


def _start_policy(config: FlatConfig, resumed: Path | None) -> Start:
    """The policy to start from. A resumed run goes on from its checkpoint's copy, in the environment's terms and sound
    by its sums: what has become of the original, its statistics or a data set since does not matter.

    Raises:
        ConfigError: adapters or an anchor need the original, which is gone or was changed.
    """
    from reinflow.checkpoint import PRETRAINED, stored_value
    from reinflow.checksums import sha256
    from reinflow_so101.policies import FAMILIES
    from reinflow_vla.directory import weights_file

    stored = str(stored_value(resumed, "start_weights") or "") if resumed else ""
    if resumed and not (config.peft_rank or config.anchor_coeff):
        print(f"going on from the checkpoint's own copy of the policy in {resumed}")
        return Start(resumed / PRETRAINED, stored, resumed)
    try:
        directory = FAMILIES[config.model_type].directory(config.policy_path)
        found = sha256(weights_file(directory))
    except OSError as error:
        raise ConfigError(f"{config.policy_path} holds no policy ({error}): name its directory") from error
    if stored and found != stored:
        raise ConfigError(
            f"the policy in {config.policy_path} was changed since the run started from it; with peft_rank or "
            "anchor_coeff the checkpoint's copy cannot stand for it: put it back"
        )
    return Start(directory, found, resumed)


def make_policy(config: FlatConfig, device: str = "cpu") -> FlowPolicy:
    """The policy that ``config`` trains; raises ConfigError if it does not fit."""
    from reinflow_so101.policies import build_policy

    return build_policy(config.policy(), config.env(), config.decisions_per_iteration, device)
