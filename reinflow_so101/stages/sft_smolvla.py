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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError, run_command
from reinflow.seeds import FIRST_TUNING_SEED
from reinflow_so101.policy_card import write_card
from reinflow_so101.stages.datasets import SftError, check_dataset
from reinflow_so101.stages.demonstrations import DECISION_STEPS, quiet_lerobot
from reinflow_vla.adaptation import known_cameras
from reinflow_vla.directory import OBS_IMAGES_PREFIX, locate_policy, refuse_existing, write_json
from so101_sim.config import EnvConfig

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
    """Policy directory to start from: that of reinflow-pretrain, or an earlier SFT."""
    dataset_root: Path
    """Dataset of reinflow-demos."""
    output_dir: Path
    """Gets checkpoints/<step>/, sft.json and metrics.jsonl; refused if it exists."""
    repo_id: str = "local/so101_pick"
    """Name of the dataset."""
    episodes: int = 0
    """Train on the first so many episodes; 0 takes all but the held-out ones. Few demonstrations make a weak policy."""
    held_out: int = 20
    """Episodes at the end of the dataset that are only used to report action errors."""
    steps: int = 1_500
    """Optimiser steps."""
    batch_size: int = 64
    """Frames per step."""
    lr: float = 1e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: float = 1e-4
    """AdamW's."""
    train_vision: bool = False
    """Train vision tower and connector as well: three times slower, for features that pre-training did not give."""
    train_prefix: bool = False
    """Train language model and state_proj as well. A few hundred demonstrations make them forget: their error of the
    block's place, 2.9 mm after pre-training, grew to 7.8 mm (benchmarks/perception.py), and RL cannot mend that."""
    decision_share: float = 0.75
    """Share of each batch near the frames at which a policy decides; the rest is spread over the episode."""
    jitter: int = 2
    """Largest distance from such a frame, in control steps. The arm hardly moves just then, so a policy that sees many
    frames around a decision cannot tell them apart and runs ahead of the expert's clock."""
    one_step_share: float = 0.3
    """Share of each batch at flow time 1, pure noise, where every sampler starts and one with a single step ends.
    LeRobot's draw of flow times alone leaves K = 1 twice as imprecise as K = 4."""
    save_every: int = 250
    """Steps between checkpoints."""
    eval_episodes: int = 64
    """Noise-free episodes at every checkpoint; 0 skips them."""
    eval_seed: int = FIRST_TUNING_SEED
    """First seed of these: tuning seeds, 5,000 to 9,999."""
    num_steps: tuple[int, ...] = (1, 4)
    """Denoising steps to evaluate with; the first is stored in the exported policy."""
    starting_position: tuple[float, ...] = (0.06, -100.21, 89.95, 66.46, -84.04, 1.0)
    """Start pose of the evaluation, MuJoCo degrees; as in the demonstrations."""
    seed: int = 0
    """Of batches and flow noise."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decision_share <= 1.0:
            raise ConfigError(f"decision_share is {self.decision_share}: use 0 to 1")
        if not 0.0 <= self.one_step_share <= 1.0:
            raise ConfigError(f"one_step_share is {self.one_step_share}: use 0 to 1")
        if not self.num_steps or min(self.num_steps) < 1:
            raise ConfigError(f"num_steps is {self.num_steps}: name at least one number of denoising steps, 1 or more")
        if min(self.steps, self.batch_size, self.save_every) < 1:
            raise ConfigError("steps, batch_size and save_every must be at least 1")


# ------------------------------------------------------------------------------------------- the data


@dataclass
class Demonstrations:
    """E episodes of L frames in memory; images of the kept frames only."""

    state: NDArray[np.float32]  # (E, L, 6)
    action: NDArray[np.float32]  # (E, L, 6)
    images: dict[str, NDArray[np.uint8]]  # camera key: (M, 3, h, w), M kept frames
    kept: NDArray[np.int64]  # (E, L) row in images, -1 where the frame is not kept
    instruction: str
    stats: dict[str, dict[str, NDArray[np.float32]]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Frames per episode."""
        return self.state.shape[1]


def frames_to_keep(length: int, jitter: int, stride: int = 5) -> NDArray[np.int64]:
    """Frames of an episode that can be drawn: all near the decisions, and every fifth."""
    frame = np.arange(length)
    near = np.abs(frame[:, None] - decisions(length)).min(axis=1) <= jitter
    return frame[near | (frame % stride == 0)]


def decisions(length: int) -> NDArray[np.int64]:
    """Control steps at which a policy with whole chunks decides."""
    return np.arange(0, length, DECISION_STEPS)


def read_demonstrations(root: Path, repo_id: str, jitter: int) -> Demonstrations:
    """Read and decode a dataset of equally long episodes.

    Raises:
        SftError: it is not there, or its episodes differ in length.
    """
    check_dataset(root)
    quiet_lerobot()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    try:
        dataset = LeRobotDataset(repo_id, root=root, video_backend="pyav")
    except Exception as error:  # a half-written one shows itself in any way
        reason = " ".join(str(error).split())[:200]
        raise SftError(
            f"{root} cannot be read by LeRobot ({type(error).__name__}: {reason}): record it again"
        ) from error
    columns = dataset.hf_dataset.with_format("numpy", columns=["observation.state", "action", "episode_index"])[:]
    episode = np.asarray(columns["episode_index"])
    lengths = np.unique(np.bincount(episode))
    if len(lengths) != 1:
        raise SftError(f"{root} has episodes of {lengths.min()} to {lengths.max()} frames, equal lengths are needed")
    length = int(lengths[0])
    keep = frames_to_keep(length, jitter)
    kept = np.full((len(episode) // length, length), -1, dtype=np.int64)
    kept[:, keep] = np.arange(len(kept) * len(keep)).reshape(len(kept), -1)
    images: dict[str, list[NDArray[np.uint8]]] = {key: [] for key in dataset.meta.camera_keys}
    for index in np.flatnonzero(kept.reshape(-1) >= 0):
        frame = dataset[int(index)]
        for key, rows in images.items():
            rows.append((frame[key] * 255.0).round().byte().numpy())
    return Demonstrations(
        state=np.stack(columns["observation.state"]).astype(np.float32).reshape(len(kept), length, -1),
        action=np.stack(columns["action"]).astype(np.float32).reshape(len(kept), length, -1),
        images={key: np.stack(rows) for key, rows in images.items()},
        kept=kept,
        instruction=str(dataset.meta.tasks.index[0]),
        stats={"action": {name: np.asarray(dataset.meta.stats["action"][name]) for name in ("mean", "std")}},
    )


def draw_frames(
    rng: np.random.Generator, config: SftConfig, data: Demonstrations, episodes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Episode and frame (B,) each of one batch: near the decisions, or anywhere."""
    episode = rng.integers(episodes, size=config.batch_size)
    near = rng.choice(decisions(data.length), config.batch_size)
    near = near + rng.integers(-config.jitter, config.jitter + 1, config.batch_size)
    anywhere = rng.choice(frames_to_keep(data.length, config.jitter), config.batch_size)
    frame = np.where(rng.random(config.batch_size) < config.decision_share, np.abs(near), anywhere)
    return episode, np.minimum(frame, data.length - 1)


def chunk_at(action: Tensor, episode: Tensor, frame: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Actions (E, L, 6) -> the chunks (B, chunk_size, 6) from these frames on, and which entries are beyond the end."""
    import torch

    index = frame[:, None] + torch.arange(chunk_size)  # (B, chunk_size)
    beyond = index >= action.shape[1]
    return action[episode[:, None], index.clamp(max=action.shape[1] - 1)], beyond


class TrainingBatches:
    """Normalised tensors of the demonstrations, and batches of them in the form `SmolVLAPolicy.forward` takes."""

    def __init__(
        self, data: Demonstrations, policy: SmolVLAPolicy, preprocessor: PolicyProcessorPipeline, cache: bool
    ) -> None:
        """`cache`: precompute image tokens, for a frozen vision tower."""
        import torch

        self.data, self.chunk_size = data, policy.config.chunk_size
        everything = preprocessor(
            {
                "observation.state": torch.from_numpy(data.state),
                "action": torch.from_numpy(data.action),
                "task": [data.instruction],
            }
        )
        self.state, self.action = everything["observation.state"], everything["action"]
        self.prompt = {key: value for key, value in everything.items() if key.startswith("observation.language")}
        self.images = {key: torch.from_numpy(images) for key, images in data.images.items()}
        self.tokens = {key: image_tokens(policy, images) for key, images in self.images.items()} if cache else None

    def observations(self, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> dict[str, Tensor]:
        """Model inputs of these frames; images (B, 3, h, w), or blank ones if their tokens are cached."""
        import torch

        from reinflow_vla.base import unit_images

        rows = torch.from_numpy(self.data.kept[episode, frame])
        batch = {key: value.expand(len(rows), -1) for key, value in self.prompt.items()}
        batch["observation.state"] = self.state[torch.from_numpy(episode), torch.from_numpy(frame)]
        for key, images in self.images.items():
            blank = self.tokens is not None
            batch[key] = torch.zeros(()).expand(len(rows), *images.shape[1:]) if blank else unit_images(images[rows])
        return batch

    def batch(self, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> dict[str, Tensor]:
        """`observations` with the action chunk and its padding mask."""
        import torch

        chunk, beyond = chunk_at(self.action, torch.from_numpy(episode), torch.from_numpy(frame), self.chunk_size)
        return {**self.observations(episode, frame), "action": chunk, "action_is_pad": beyond}

    @contextmanager
    def vision(self, policy: SmolVLAPolicy, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> Iterator[None]:
        """Within it the policy takes the cached image tokens of these frames instead of running its vision tower."""
        import torch

        if self.tokens is None:
            yield
            return
        rows = torch.from_numpy(self.data.kept[episode, frame])
        waiting = iter([self.tokens[key][rows] for key in policy.config.image_features])
        network = policy.model.vlm_with_expert
        network.embed_image = lambda _image: next(waiting)
        try:
            yield
        finally:
            del network.embed_image


def image_tokens(policy: SmolVLAPolicy, images: Tensor) -> Tensor:
    """Image tokens (M, P, W) of images (M, 3, h, w) uint8 of one camera."""
    import torch

    from reinflow_vla.base import unit_images

    key = next(iter(policy.config.image_features))
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), 128):
            pixels, _ = policy.prepare_images({key: unit_images(images[start : start + 128])})
            parts.append(policy.model.vlm_with_expert.embed_image(pixels[0]))
    return torch.cat(parts)


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


def finetune(config: SftConfig) -> dict[str, Any]:
    """Run the fine-tuning; returns the record of the last checkpoint."""
    import torch
    from rich.progress import track

    from reinflow.supervised import FitSettings, fit
    from reinflow_vla.smolvla_directory import load_smolvla

    refuse_existing(config.output_dir)
    started = time.perf_counter()
    cameras, _ = known_cameras(locate_policy(config.policy_dir))
    check_dataset(config.dataset_root, [OBS_IMAGES_PREFIX + name for name in cameras])
    data = read_demonstrations(config.dataset_root, config.repo_id, config.jitter)
    available = len(data.state) - config.held_out
    if available < max(1, config.episodes):
        raise SftError(
            f"{config.dataset_root} has {len(data.state)} episodes: too few for episodes={config.episodes} beside "
            f"held_out={config.held_out}; record more or lower them"
        )
    episodes = config.episodes or available
    policy, preprocessor, _ = load_smolvla(config.policy_dir, num_steps=config.num_steps[0])
    preprocessor, postprocessor = with_action_statistics(policy, preprocessor, data)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    batches = TrainingBatches(data, policy, preprocessor, cache=not config.train_vision)
    parameters = trainable_parameters(policy, config.train_vision, config.train_prefix)
    print(
        f"{episodes} episodes, {len(data.images)} cameras, ready after {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    config.output_dir.mkdir(parents=True)
    write_json(
        config.output_dir / "sft.json", {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    )
    record: dict[str, Any] = {}
    losses: list[float] = []
    training_s, began = 0.0, time.perf_counter()
    steps = fit(
        parameters,
        lambda: batch_loss(policy, batches, draw_frames(rng, config, data, episodes), config.one_step_share),
        FitSettings(config.steps, config.lr, config.weight_decay),
    )
    for step, info in track(steps, "fine-tuning", config.steps):
        training_s += time.perf_counter() - began
        losses.append(info["loss"])
        if step % config.save_every == 0 or step == config.steps:
            record = {
                "step": step,
                "loss": round(float(np.mean(losses[-100:])), 5),
                "samples_per_s": round(step * config.batch_size / training_s, 1),
                "action_error": action_errors(
                    policy, postprocessor, batches, config, range(available, len(data.state))
                ),
                "success": evaluate_success(policy, preprocessor, postprocessor, config),
            }
            save(config, policy, preprocessor, postprocessor, record)
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
) -> dict[str, list[float]]:
    """Mean absolute error per joint (degrees, gripper percent) of each decision's chunk on held-out expert states."""
    import torch

    errors: dict[str, list[float]] = {}
    if not len(episodes):
        return errors
    policy.config.num_steps = config.num_steps[0]
    for decision in decisions(batches.data.length):
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
        )
        off = (postprocessor(predicted) - truth).abs()[~beyond]
        errors[f"t{decision}"] = [round(float(value), 2) for value in off.mean(dim=0)]
    return errors


def task_environment(config: SftConfig, policy: SmolVLAPolicy) -> EnvConfig:
    """EnvConfig of the task that the policy is evaluated on."""
    cameras = tuple(key.removeprefix(OBS_IMAGES_PREFIX) for key in policy.config.image_features)
    size = policy.config.resize_imgs_with_padding[0]
    return EnvConfig(cameras=cameras, image_size=size, randomize_block=True, starting_position=config.starting_position)


def evaluate_success(
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    config: SftConfig,
) -> dict[str, float]:
    """Noise-free success rate on the tuning seeds, by number of denoising steps."""
    from reinflow.env import take_rows
    from reinflow.evaluate import evaluate_seeds
    from reinflow.noise import episode_noise
    from reinflow.rollout import whole_tiles
    from reinflow_vla.base import lerobot_batch
    from so101_sim.vector.make import make_vector_env

    if not config.eval_episodes:
        return {}
    env = task_environment(config, policy)

    shape = (policy.config.chunk_size, policy.config.max_action_dim)

    def act(observation: Observation, seeds: Sequence[int], decision: int) -> NDArray[np.float64]:
        rows = whole_tiles(len(seeds))  # as noise_free_actor
        x_0 = episode_noise([seeds[row] for row in rows], [decision] * len(rows), shape, "x_0")
        batch = preprocessor(lerobot_batch(take_rows(observation, rows), env.cameras))
        return postprocessor(policy.predict_action_chunk(batch, noise=x_0)).double().numpy()[: len(seeds)]

    success, make_env = {}, partial(make_vector_env, env)
    for num_steps in config.num_steps:
        policy.config.num_steps = num_steps
        result = evaluate_seeds(act, make_env, config.eval_seed, config.eval_episodes, NUM_EVAL_ENVS)
        success[f"K{num_steps}"] = round(result.success_rate, 4)
    policy.config.num_steps = config.num_steps[0]
    return success


def save(
    config: SftConfig,
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    record: dict[str, Any],
) -> None:
    """Write checkpoints/<step>/ with its environment (reinflow.json) and append the record to metrics.jsonl."""
    from reinflow_vla.smolvla_directory import export_policy

    directory = config.output_dir / "checkpoints" / f"{record['step']:06d}"
    export_policy(policy, preprocessor, postprocessor, directory)
    write_card(directory, task_environment(config, policy))
    line = json.dumps(record)
    with (config.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    """reinflow-sft."""
    import tyro

    config = tyro.cli(SftConfig, description=SftConfig.__doc__)
    run_command("reinflow-sft", lambda: finetune(config))
