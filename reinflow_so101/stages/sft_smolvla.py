"""Supervised fine-tuning of the tiny SmolVLA on demonstrations, in memory.

The loss is LeRobot's own `SmolVLAPolicy.forward`. What differs from lerobot-train is where the batches come from:
the dataset is read and decoded once, three quarters of each batch are the frames that matter (those a policy decides
at: control steps 0, 50, 100, give or take a few), and with a frozen vision tower its image tokens are computed once.
Language model and state_proj stay as they were pre-trained unless asked for.
lerobot-train samples frames uniformly, and the arm's own pose gives the answer away in all but the first of them: a
tiny policy trained so does not learn to look. Speeds of both are in model/tiny_smolvla/README.md.

    reinflow-sft --policy-dir runs/tiny/perception --dataset-root runs/demos --output-dir runs/tiny/sft
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError, run_command
from reinflow.progress import spinner
from reinflow.seeds import FIRST_REPORTING_SEED, FIRST_TUNING_SEED
from reinflow.settings import FRACTION, NOT_NEGATIVE, POSITIVE, RATE, SEED, Range, check_ranges
from reinflow.stage import StageDirectory
from reinflow_so101.door import DoorSettings, enter, read_rename_map
from reinflow_so101.policies import FAMILIES
from reinflow_so101.policy_card import CARD_FILE, as_seen_by, card_env, env_of_task, known_env, write_card
from reinflow_so101.stages.batches import TrainingBatches, chunk_at
from reinflow_so101.stages.datasets import (
    Demonstrations,
    SftError,
    camera_names,
    check_dataset,
    decisions,
    read_demonstrations,
)
from reinflow_so101.stages.demonstrations import DECISION_STEPS
from reinflow_vla.adaptation import known_cameras
from reinflow_vla.directory import (
    CONFIG_FILE,
    OBS_IMAGES_PREFIX,
    read_json,
    refuse_existing,
)
from so101_mujoco_utils import CAMERA_NAMES
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import DEFAULT_TASK, describe, how_to_choose, named

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.processor import PolicyProcessorPipeline
    from torch import Tensor, nn

    from reinflow.env import Observation

NUM_EVAL_ENVS = 32


@dataclass(frozen=True)
class SftConfig:
    """Fine-tune a tiny SmolVLA on a LeRobotDataset of whole episodes."""

    policy_dir: Path
    """SmolVLA to start from: a policy directory or hub id; "tiny-base" names the embedded base, "tiny" the embedded
    policy."""
    dataset_root: Path
    """LeRobotDataset of reinflow-demos, lerobot-record or a simulator; episodes of any length."""
    output_dir: Path
    """Gets checkpoints/<step>/, sft.json and metrics.jsonl; refused if it exists."""
    repo_id: str = "local/so101_pick"
    """Name of the dataset."""
    episodes: Annotated[int, NOT_NEGATIVE] = 0
    """Train on the first so many episodes; 0 takes all but the held-out ones. Few demonstrations make a weak policy."""
    held_out: Annotated[int, NOT_NEGATIVE] = 20
    """Episodes at the end of the dataset that are only used to report action errors."""
    steps: Annotated[int, POSITIVE] = 1_500
    """Optimiser steps."""
    batch_size: Annotated[int, POSITIVE] = 64
    """Frames per step."""
    lr: Annotated[float, RATE] = 1e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    """AdamW's."""
    train_vision: bool = False
    """Train vision tower and connector as well: three times slower, for features that pre-training did not give."""
    train_prefix: bool = False
    """Train language model and state_proj as well. A few hundred demonstrations make them forget: their error of the
    block's place, 2.9 mm after pre-training, grew to 7.8 mm (benchmarks/perception.py), and RL cannot mend that."""
    decision_share: Annotated[float, FRACTION] = 0.75
    """Share of each batch near the frames at which a policy decides; the rest is spread over the episode."""
    jitter: Annotated[int, Range(0, 1_000)] = 2
    """Largest distance from such a frame, in control steps. The arm hardly moves just then, so a policy that sees many
    frames around a decision cannot tell them apart and runs ahead of the expert's clock."""
    one_step_share: Annotated[float, FRACTION] = 0.3
    """Share of each batch at flow time 1, pure noise, where every sampler starts and one with a single step ends.
    LeRobot's draw of flow times alone leaves K = 1 twice as imprecise as K = 4."""
    save_every: Annotated[int, POSITIVE] = 250
    """Steps between checkpoints."""
    eval_episodes: Annotated[int, NOT_NEGATIVE] = 64
    """Noise-free episodes at every checkpoint; 0 skips them."""
    eval_seed: Annotated[int, SEED] = FIRST_TUNING_SEED
    """First seed of these: tuning seeds, 5,000 to 9,999."""
    num_steps: tuple[int, ...] = (1, 4)
    """Denoising steps to evaluate with; the first is stored in the exported policy."""
    task: str = ""
    """Named task of the evaluation, such as lift or lift_wide; empty takes what the dataset was recorded for, else what
    the policy was made for."""
    rename_map: str = ""
    """Which recorded camera is which of the policy's, and for the evaluation which of the scene's, in LeRobot's form:
    '{"observation.images.front": "observation.images.camera_up"}'. Empty: by name."""
    control_hz: Annotated[float, Range(1, 1_000, or_zero=True)] = 0.0
    """Frames a second of the dataset, where they are not 50: the evaluation drives the arm at that rate."""
    seed: Annotated[int, SEED] = 0
    """Of batches and flow noise."""
    resume: bool = False
    """Go on with a fine-tuning that was cut off, from its last checkpoint."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.num_steps or min(self.num_steps) < 1:
            raise ConfigError(f"num_steps is {self.num_steps}: name at least one number of denoising steps, 1 or more")
        if self.eval_seed + self.eval_episodes > FIRST_REPORTING_SEED:
            raise ConfigError(
                f"eval_seed is {self.eval_seed} for {self.eval_episodes} episodes: seeds from {FIRST_REPORTING_SEED} "
                "up are for reporting, checkpoints are chosen by those below"
            )
        if self.task:
            named(self.task)


# ------------------------------------------------------------------------------------------- batches


def draw_frames(
    rng: np.random.Generator,
    config: SftConfig,
    data: Demonstrations,
    episodes: int,
    every: int = DECISION_STEPS,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Episode and frame (B,) each of one batch: near the decisions, or anywhere."""
    episode = rng.integers(episodes, size=config.batch_size)
    length = data.lengths[episode]
    near = rng.integers(-(-length // every)) * every
    near = np.abs(near + rng.integers(-config.jitter, config.jitter + 1, config.batch_size))
    place = rng.integers([len(data.stored[row]) for row in episode])
    anywhere = np.array([data.stored[row][at] for row, at in zip(episode, place, strict=True)])
    frame = np.where(rng.random(config.batch_size) < config.decision_share, near, anywhere)
    return episode, np.minimum(frame, length - 1)


# --------------------------------------------------------------------------------------- fine-tuning


def trainable_parameters(policy: SmolVLAPolicy, train_vision: bool, train_prefix: bool) -> list[nn.Parameter]:
    """Switch gradients on for all that is to learn and the loss reaches, off for the rest; returns the former."""
    policy.requires_grad_(True)
    vlm = policy.model.vlm_with_expert.vlm
    for part in (vlm.model.text_model, policy.model.state_proj):
        part.requires_grad_(train_prefix)
    vlm.lm_head.requires_grad_(False)
    for part in (vlm.model.vision_model, vlm.model.connector):
        part.requires_grad_(train_vision)
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def with_action_statistics(
    policy: SmolVLAPolicy, preprocessor: PolicyProcessorPipeline, data: Demonstrations
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """New processors: action statistics of the dataset; those of the state stay, state_proj was pre-trained on them."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import NormalizerProcessorStep

    stored = next(step.stats for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep))
    stats = {
        "observation.state": {name: torch.as_tensor(stored["observation.state"][name]) for name in ("mean", "std")}
    }
    stats["action"] = {name: torch.from_numpy(value).float() for name, value in data.stats["action"].items()}
    return make_pre_post_processors(policy.config, dataset_stats=stats)


def whole_data(config: SftConfig, directory: Path, every: int) -> Demonstrations:
    """The demonstrations, checked before they are decoded; raises SftError."""
    cameras = recorded_cameras(config, directory)
    check_dataset(config.dataset_root, list(cameras.values()), config.control_hz)
    size = read_json(directory / CONFIG_FILE).get("resize_imgs_with_padding")
    data = read_demonstrations(
        config.dataset_root, config.repo_id, config.jitter, cameras, every, config.control_hz,
        (size[1], size[0]) if size else None,
    )  # fmt: skip
    if len(data.state) - config.held_out < max(1, config.episodes):
        raise SftError(
            f"{config.dataset_root} has {len(data.state)} episodes: too few for episodes={config.episodes} beside "
            f"held_out={config.held_out}; record more or lower them"
        )
    return data


def finetune(config: SftConfig) -> dict[str, Any]:
    """Run the fine-tuning; returns the record of the last checkpoint."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
    if not config.resume:
        refuse_existing(config.output_dir)
    with StageDirectory.open(config.output_dir, settings, config.resume, "reinflow-sft", "sft.json") as stage:
        record = _finetune(config, stage)
        stage.finish(record)
    return record


def _finetune(config: SftConfig, stage: StageDirectory) -> dict[str, Any]:
    import torch

    from reinflow.supervised import FitSettings, Progress, fit
    from reinflow_vla.smolvla_directory import load_smolvla

    started = time.perf_counter()
    directory = FAMILIES["smolvla"].directory(str(config.policy_dir))
    every = int(read_json(directory / CONFIG_FILE).get("n_action_steps") or DECISION_STEPS)
    data = whole_data(config, directory, every)
    available = len(data.state) - config.held_out
    episodes = config.episodes or available
    game = played(config, directory, int(np.median(data.lengths)), every)
    with spinner("loading the policy"):
        policy, preprocessor, _ = load_smolvla(directory, num_steps=config.num_steps[0])
    preprocessor, postprocessor = with_action_statistics(policy, preprocessor, data)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    batches = TrainingBatches(data, policy, preprocessor, cache=not config.train_vision)
    parameters = trainable_parameters(policy, config.train_vision, config.train_prefix)
    print(
        f"{episodes} episodes of {data.lengths.min()} to {data.lengths.max()} frames, {len(data.images)} cameras, "
        f"ready after {time.perf_counter() - started:.0f} s\n{game.summary()}", flush=True,
    )  # fmt: skip
    learned = {"policy": torch.nn.ParameterList(parameters)}
    progress = Progress(stage.progress_dir, learned, {"batches": rng}, config.save_every)
    stage.resumed_at(progress.done)
    record: dict[str, Any] = {}
    losses: list[float] = []
    training_s, began = 0.0, time.perf_counter()
    steps = fit(
        parameters,
        lambda: batch_loss(policy, batches, draw_frames(rng, config, data, episodes, every), config.one_step_share),
        FitSettings(config.steps, config.lr, config.weight_decay),
        progress,
        "fine-tuning",
    )
    for step, info in steps:
        training_s += time.perf_counter() - began
        losses.append(info["loss"])
        if step % config.save_every == 0 or step == config.steps:
            record = {
                "step": step,
                "loss": round(float(np.mean(losses[-100:])), 5),
                "samples_per_s": round(len(losses) * config.batch_size / training_s, 1),
                "action_error": action_errors(
                    policy, postprocessor, batches, config, range(available, len(data.state)), every
                ),
                "success": evaluate_success(policy, preprocessor, postprocessor, config, game),
            }
            save(config, policy, preprocessor, postprocessor, record, game.env if game.known else None)
        began = time.perf_counter()
    return record


def batch_loss(
    policy: SmolVLAPolicy,
    batches: TrainingBatches,
    frames: tuple[NDArray[np.int64], NDArray[np.int64]],
    one_step_share: float,
) -> tuple[Tensor, dict[str, float]]:
    """Flow-matching loss of the batch of these frames; a share of it at flow time 1."""
    import torch

    policy.train()
    flow_time = policy.model.sample_time(len(frames[0]), batches.state.device)
    flow_time[torch.rand(len(flow_time)) < one_step_share] = 1.0
    with batches.vision(policy, *frames):
        loss, _ = policy.forward(batches.batch(*frames), time=flow_time)
    return loss, {}


# ---------------------------------------------------------------------------------------- measuring


def action_errors(
    policy: SmolVLAPolicy,
    postprocessor: PolicyProcessorPipeline,
    batches: TrainingBatches,
    config: SftConfig,
    episodes: range,
    every: int = DECISION_STEPS,
) -> dict[str, list[float]]:
    """Mean absolute error per joint (degrees, gripper percent) of each decision's chunk on held-out expert states, for
    the decisions that all held-out episodes last for."""
    import torch

    errors: dict[str, list[float]] = {}
    if not len(episodes):
        return errors
    policy.config.num_steps = config.num_steps[0]
    for decision in decisions(int(batches.data.lengths[list(episodes)].min()), every):
        episode, frame = np.array(episodes), np.full(len(episodes), decision)
        noise_generator = torch.Generator().manual_seed(config.seed)
        shape = (len(episode), policy.config.chunk_size, policy.config.max_action_dim)
        noise = torch.randn(shape, generator=noise_generator)
        with batches.vision(policy, episode, frame):
            predicted = policy.predict_action_chunk(batches.observations(episode, frame), noise=noise)
        truth, beyond = chunk_at(
            torch.from_numpy(batches.data.action),
            torch.from_numpy(episode),
            torch.from_numpy(frame),
            predicted.shape[1],
            batches.lengths,
        )
        off = (postprocessor(predicted) - truth).abs()[~beyond]
        errors[f"t{decision}"] = [round(float(value), 2) for value in off.mean(dim=0)]
    return errors


@dataclass(frozen=True)
class Played:
    """What the policy is evaluated on."""

    env: EnvConfig
    cameras: dict[str, str]  # the scene's -> the policy's
    why: str  # this task
    known: bool  # whether somebody says that it is this task; a guess is not written beside the policy
    lines: tuple[str, ...] = ()  # how its cameras were found
    refused: str = ""  # why nothing can be played

    def summary(self) -> str:
        """For people."""
        if self.refused:
            return f"no evaluation: {self.refused}"
        return "\n".join([f"evaluated on {describe(self.env)}; {self.why}", *self.lines])


def checked_rename_map(config: SftConfig, cameras: Sequence[str], recorded: Sequence[str]) -> dict[str, str]:
    """--rename-map, recorded or the scene's -> the policy's. Raises ConfigError for other names."""
    given = read_rename_map(config.rename_map)
    strange = [name for name in given if name not in (*recorded, *CAMERA_NAMES)]
    strange += [name for name in given.values() if name not in cameras]
    if strange:
        raise ConfigError(
            f"rename_map names {', '.join(strange)}: it goes from what is recorded ({', '.join(recorded) or 'none'}) "
            f"or the scene's ({', '.join(CAMERA_NAMES)}) to what the policy looks through ({', '.join(cameras)})"
        )
    for known in (recorded, CAMERA_NAMES):
        targets = [given[name] for name in given if name in known]
        if len(set(targets)) < len(targets):
            raise ConfigError(f"rename_map gives two cameras to one of the policy's: {given}")
    return given


def recorded_cameras(config: SftConfig, policy_dir: Path) -> dict[str, str]:
    """The policy's image feature -> the dataset's, by name or as --rename-map says."""
    cameras, _ = known_cameras(policy_dir)
    recorded = camera_names(config.dataset_root)
    given = {theirs: name for name, theirs in checked_rename_map(config, cameras, recorded).items() if name in recorded}
    return {OBS_IMAGES_PREFIX + name: OBS_IMAGES_PREFIX + given.get(name, name) for name in cameras}


def played(config: SftConfig, policy_dir: Path, frames: int, every: int) -> Played:
    """The task of the evaluation: as --task, the dataset, or the policy says; else a guess, as long as the
    demonstrations are."""
    card = config.dataset_root / "meta" / CARD_FILE
    data, own = card_env(card) if card.is_file() else None, known_env(policy_dir)
    known = bool(config.task or data or own)
    if config.task:
        env, why = env_of_task(policy_dir, config.task), "as --task says"
    elif data:
        env, why = as_seen_by(policy_dir, data), f"as {card} says"
    elif own:
        env, why = own[0], f"as {own[1]} says"
    else:
        env, why = env_of_task(policy_dir, DEFAULT_TASK), "nothing says what the data was recorded for"
        env = replace(env, max_steps_per_episode=every * -(-max(frames, env.max_steps_per_episode) // every))
    if config.control_hz:
        env = replace(env, control_hz=config.control_hz)
    cameras, _ = known_cameras(policy_dir)
    rename = checked_rename_map(config, cameras, camera_names(config.dataset_root))
    rename = {ours: theirs for ours, theirs in rename.items() if ours in CAMERA_NAMES}
    entrance = enter(policy_dir, DoorSettings(rename_map=json.dumps(rename) if rename else ""), CAMERA_NAMES)
    scene = {ours: theirs for theirs, ours in entrance.cameras.items() if ours in CAMERA_NAMES}
    why, lines = f"{why}; {how_to_choose()}", tuple(line for line in entrance.lines if line.startswith("cameras"))
    if len(scene) == len(cameras):
        return Played(replace(env, cameras=tuple(scene)), scene, why, known, lines)
    refused = (
        f"the policy looks through {', '.join(cameras)}, the scene has {', '.join(CAMERA_NAMES)}; --rename-map says "
        "which is which"
    )
    return Played(env, {}, why, known, lines, refused)


def evaluate_success(
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    config: SftConfig,
    game: Played,
) -> dict[str, float]:
    """Noise-free success rate on the tuning seeds, by number of denoising steps."""
    from reinflow.env import take_rows
    from reinflow.evaluate import evaluate_seeds
    from reinflow.noise import episode_noise
    from reinflow.rollout import whole_tiles
    from reinflow_vla.base import lerobot_batch
    from so101_sim.vector.make import make_vector_env

    if not config.eval_episodes or game.refused:
        return {}
    shape = (policy.config.chunk_size, policy.config.max_action_dim)

    def act(observation: Observation, seeds: Sequence[int], decision: int) -> NDArray[np.float64]:
        rows = whole_tiles(len(seeds))  # as noise_free_actor
        x_0 = episode_noise([seeds[row] for row in rows], [decision] * len(rows), shape, "x_0")
        batch = preprocessor(renamed(lerobot_batch(take_rows(observation, rows), game.env.cameras), game.cameras))
        chunk = policy.predict_action_chunk(batch, noise=x_0)[:, : policy.config.n_action_steps]
        return postprocessor(chunk).double().numpy()[: len(seeds)]

    success, make_env = {}, partial(make_vector_env, game.env)
    for num_steps in config.num_steps:
        policy.config.num_steps = num_steps
        result = evaluate_seeds(act, make_env, config.eval_seed, config.eval_episodes, NUM_EVAL_ENVS)
        success[f"K{num_steps}"] = round(result.success_rate, 4)
    policy.config.num_steps = config.num_steps[0]
    return success


def renamed(batch: dict[str, Any], cameras: dict[str, str]) -> dict[str, Any]:
    """A batch in the policy's names for its images."""
    names = {OBS_IMAGES_PREFIX + ours: OBS_IMAGES_PREFIX + theirs for ours, theirs in cameras.items()}
    return {names.get(key, key): value for key, value in batch.items()}


def save(
    config: SftConfig,
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    record: dict[str, Any],
    env: EnvConfig | None,
) -> None:
    """Write checkpoints/<step>/ with its environment (reinflow.json) and append the record to metrics.jsonl."""
    from reinflow.training_state import refuse_not_finite
    from reinflow_vla.smolvla_directory import export_policy

    refuse_not_finite(policy.state_dict().items(), f"the policy at step {record['step']}, with lr={config.lr},")
    directory = config.output_dir / "checkpoints" / f"{record['step']:06d}"
    shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed before it could note it
    export_policy(policy, preprocessor, postprocessor, directory)
    if env:
        write_card(directory, env)
    line = json.dumps(record)
    with (config.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    """reinflow-sft."""
    import tyro

    config = tyro.cli(SftConfig, description=SftConfig.__doc__)
    run_command("reinflow-sft", lambda: finetune(config))
