"""Perception pre-training of the tiny SmolVLA; it stands for the pre-training that the real one has.

Rendered images with simulator labels, no actions. Two kinds of targets, trained together:

* detection, on every image token that the connector hands to the language model: does this token's cell hold the
  block's centre, and where in the cell? On synthetic images 250 steps of this left half the error, or less, of
  regressing the position from all tokens.
* pose, on the last prefix hidden state (the state token's, which the critic reads too): the block in the world, the
  tool in the world, the block as seen from the gripper. It makes the language model carry to later layers what the
  images show.

The heads are thrown away. RL trains the action expert on cached prefixes, so what these features hold is all that it
will ever see.

    reinflow-pretrain --policy-dir runs/tiny/base --output-dir runs/tiny/perception
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import run_command
from reinflow.progress import progress_bar
from reinflow.settings import POSITIVE, RATE, SEED, Range, check_ranges
from so101_mujoco_utils import FRAMES, SceneLayout, load_model
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from torch import Tensor

POSE_NAMES = (
    *(f"block_{axis}" for axis in "xyz"),
    *(f"tool_{axis}" for axis in "xyz"),
    *(f"block_in_gripper_{axis}" for axis in "xyz"),
    "block_yaw_sin4",
    "block_yaw_cos4",
)
POSE_SCALE_M = 0.1  # targets are in units of 10 cm, so that all of them are of order one
GRID_NONE, GRID_IGNORE = -1, -100  # detection classes besides the cells: no block in the image; only part of it


@dataclass(frozen=True)
class PretrainConfig:
    """Teach the vision tower, connector and language model where the block is, from rendered images."""

    policy_dir: Path
    """Tiny SmolVLA from reinflow-build-tiny."""
    output_dir: Path
    """Policy directory to write; refused if it exists."""
    samples: Annotated[int, POSITIVE] = 12_000
    """Rendered scenes for training, each seen by all cameras of the policy."""
    held_out: Annotated[int, POSITIVE] = 1_000
    """Scenes with other seeds, for the reported error."""
    steps: Annotated[int, POSITIVE] = 1_500
    """Optimiser steps."""
    batch_size: Annotated[int, POSITIVE] = 32
    """Small: early on, the number of steps counts, not the number of images per step."""
    lr: Annotated[float, RATE] = 1.5e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: Annotated[float, Range(0, 10)] = 1e-4
    """AdamW's, on everything."""
    block_radius_range: tuple[float, float] = (0.13, 0.34)
    """Metres from the base axis: wider than the task's, so that later tasks can use the same features."""
    block_angle_deg: Annotated[float, Range(0, 180)] = 65.0
    """To either side of straight ahead."""
    wrist_roll_deg: tuple[float, ...] = (5.96, -84.04)
    """Wrist angles of the start poses that are shown: both documented ones."""
    seed: Annotated[int, SEED] = 0
    """Of the scenes, the order of the batches and the heads."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class Scenes:
    """Rendered scenes with labels. n scenes, C cameras, image side w."""

    images: dict[str, NDArray[np.uint8]]  # camera: (n, 3, w, w)
    state: NDArray[np.float32]  # (n, 6) LeRobot degrees / percent
    pose: NDArray[np.float32]  # (n, len(POSE_NAMES)), metres / POSE_SCALE_M, sine and cosine as they are
    pixel: NDArray[np.float32]  # (n, C, 2) block centre, column and row in pixels
    visible: NDArray[np.int64]  # (n, C) 1 seen, GRID_NONE, GRID_IGNORE
    kind: NDArray[np.int64]  # (n,) 0 start pose, 1 expert trajectory, 2 near the block
    metres_per_pixel: NDArray[np.float32]  # (n, C) at the block's depth


# ------------------------------------------------------------------------------------------ scenes


class SceneSampler:
    """Draws block and arm, renders and labels."""

    def __init__(self, config: PretrainConfig, cameras: tuple[str, ...], image_size: int, seed: int) -> None:
        import mujoco

        from so101_sim.expert import ScriptedExpert
        from so101_sim.renderer import SceneRenderer

        self.config, self.cameras, self.size = config, cameras, image_size
        self.rng = np.random.default_rng(seed)
        self.model = load_model(None, cameras)
        self.layout = SceneLayout(self.model)
        self.data = mujoco.MjData(self.model)
        self.expert = ScriptedExpert(self.model)
        self.renderer = SceneRenderer(self.model, cameras, image_size)
        self.frame = FRAMES["lerobot"]
        self.home_rad = np.deg2rad(np.array(EnvConfig().starting_position))

    def draw_block(self) -> tuple[NDArray[np.float64], float]:
        """Block centre (3,) m, area-uniform over the configured range, and yaw in radians."""
        low, high = self.config.block_radius_range
        radius = math.sqrt(self.rng.uniform(low**2, high**2))
        angle = math.radians(self.rng.uniform(-self.config.block_angle_deg, self.config.block_angle_deg))
        position = np.array([radius * math.sin(angle), radius * math.cos(angle), 0.0125])
        return position, float(self.rng.uniform(-math.pi / 4, math.pi / 4))

    def start_pose(self) -> NDArray[np.float64]:
        """(6,) rad: a documented start pose, exact half of the time, else a few degrees off."""
        q_rad = self.home_rad.copy()
        q_rad[4] = math.radians(self.rng.choice(self.config.wrist_roll_deg))
        noise = np.deg2rad(self.rng.uniform(-5.0, 5.0, 6))
        return self.clip(q_rad + (noise if self.rng.random() < 0.5 else 0.0))

    def clip(self, q_rad: NDArray[np.float64]) -> NDArray[np.float64]:
        """Joint angles within the limits."""
        return np.clip(q_rad, self.layout.limits_rad[:, 0], self.layout.limits_rad[:, 1])

    def place(self, q_rad: NDArray[np.float64], position: NDArray[np.float64], yaw: float) -> None:
        """Put arm and block there, at rest."""
        import mujoco

        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self.layout.joint_qpos] = q_rad
        self.data.qpos[self.layout.block_qpos] = [*position, math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)]
        self.data.ctrl[self.layout.actuators] = q_rad

    def start_scene(self) -> list[dict[str, Any]]:
        """The arm at its start: what the policy sees at the first decision."""
        position, yaw = self.draw_block()
        self.place(self.start_pose(), position, yaw)
        return [self.label(0)]

    def near_scene(self) -> list[dict[str, Any]]:
        """The arm somewhere on its way to, or around, a point up to 6 cm off the block, jaw at any angle."""
        position, yaw = self.draw_block()
        aim = position + np.append(self.rng.uniform(-0.06, 0.06, 2), 0.0)
        plan = self.expert.plan(self.start_pose(), aim, yaw + self.rng.uniform(-0.5, 0.5))
        records = []
        for _ in range(4):  # planning costs as much as rendering: use a plan several times
            instant = 49 if self.rng.random() < 0.5 else int(self.rng.integers(20, 76))
            q_rad = plan[instant] + np.deg2rad(self.rng.normal(0.0, 3.0, 6))
            q_rad[5] = np.deg2rad(self.rng.uniform(-5.0, 60.0))
            self.place(self.clip(q_rad), position, yaw)
            records.append(self.label(2))
            position = aim + np.append(self.rng.uniform(-0.06, 0.06, 2), 0.0)
            yaw = float(self.rng.uniform(-math.pi / 4, math.pi / 4))
        return records

    def expert_scenes(self) -> list[dict[str, Any]]:
        """Instants of a simulated expert episode, the block pushed, grasped and lifted as it may be."""
        import mujoco

        position, yaw = self.draw_block()
        self.place(self.start_pose(), position, yaw)
        plan = self.expert.plan(self.data.qpos[self.layout.joint_qpos].copy(), position, yaw)
        plan = plan + np.deg2rad(self.rng.normal(0.0, 1.0, 6))
        instants = {50, 100, *self.rng.choice(np.arange(5, 140), 8, replace=False).tolist()}
        records = []
        for step, target in enumerate(plan):
            if step in instants:
                records.append(self.label(1))
            self.data.ctrl[self.layout.actuators] = target
            mujoco.mj_step(self.model, self.data, 10)
        return records

    def label(self, kind: int) -> dict[str, Any]:
        """Render the current configuration and measure it."""
        import mujoco

        images = self.renderer.render(self.data.qpos)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        block = self.data.body("block").xpos
        tool, axes = self.data.site("tool").xpos, self.data.site("tool").xmat.reshape(3, 3)
        face = self.data.body("block").xmat.reshape(3, 3)[:, 0]
        yaw4 = 4.0 * math.atan2(face[1], face[0])
        metres = np.concatenate([block, tool, (block - tool) @ axes]) / POSE_SCALE_M
        seen = [self.project(camera, images[camera], block) for camera in self.cameras]
        return {
            "images": {camera: images[camera].transpose(2, 0, 1) for camera in self.cameras},
            "state": self.frame.from_rad(self.data.qpos[self.layout.joint_qpos]),
            "pose": np.append(metres, [math.sin(yaw4), math.cos(yaw4)]),
            "pixel": [s[0] for s in seen],
            "visible": [s[1] for s in seen],
            "metres_per_pixel": [s[2] for s in seen],
            "kind": kind,
        }

    def project(
        self, camera: str, image: NDArray[np.uint8], block: NDArray[np.float64]
    ) -> tuple[tuple[float, float], int, float]:
        """Block centre in pixels (column, row), whether it is seen, and metres per pixel at its depth."""
        cam = self.model.camera(camera)
        x, y, z = (block - self.data.cam_xpos[cam.id]) @ self.data.cam_xmat[cam.id].reshape(3, 3)
        focal = self.size / 2 / math.tan(math.radians(float(self.model.cam_fovy[cam.id])) / 2)
        depth = max(-z, 1e-3)
        column, row = self.size / 2 + focal * x / depth, self.size / 2 - focal * y / depth
        red = (image[..., 0] > 90) & (image[..., 0] > 2 * image[..., 1].astype(int))
        inside = z < 0 and 0 <= column < self.size and 0 <= row < self.size
        if not red.any():
            return (column, row), GRID_NONE, depth / focal
        reach = int(0.012 * focal / depth) + 1
        rows = slice(max(0, int(row) - reach), int(row) + reach + 1)
        columns = slice(max(0, int(column) - reach), int(column) + reach + 1)
        seen = inside and red[rows, columns].mean() > 0.3
        return (column, row), 1 if seen else GRID_IGNORE, depth / focal


def sample_scenes(config: PretrainConfig, cameras: tuple[str, ...], size: int, count: int, seed: int) -> Scenes:
    """`count` scenes: 40 % at the start pose, 30 % on expert trajectories, 30 % near the block."""
    sampler = SceneSampler(config, cameras, size, seed)
    records: list[dict[str, Any]] = []
    parts = ((sampler.start_scene, 0.4), (sampler.expert_scenes, 0.7), (sampler.near_scene, 1.0))
    with progress_bar("rendering, scenes", count) as advance:
        for draw, share in parts:
            while len(records) < round(share * count):
                new = draw()
                records += new
                advance(len(new))
    sampler.renderer.close()
    records = records[:count]
    return Scenes(
        images={camera: np.stack([r["images"][camera] for r in records]) for camera in cameras},
        state=np.array([r["state"] for r in records], dtype=np.float32),
        pose=np.array([r["pose"] for r in records], dtype=np.float32),
        pixel=np.array([r["pixel"] for r in records], dtype=np.float32),
        visible=np.array([r["visible"] for r in records], dtype=np.int64),
        kind=np.array([r["kind"] for r in records], dtype=np.int64),
        metres_per_pixel=np.array([r["metres_per_pixel"] for r in records], dtype=np.float32),
    )


# --------------------------------------------------------------------------------------- the network


class PerceptionNet:
    """A policy's prefix with throw-away heads. B batch, C cameras, P image tokens per camera, W text width."""

    def __init__(self, policy: SmolVLAPolicy, instruction: dict[str, Tensor]) -> None:
        """`instruction`: tokens and mask (1, L) of the prompt, as the preprocessor makes them."""
        from torch import nn

        self.policy, self.instruction = policy, instruction
        vlm = policy.model.vlm_with_expert.get_vlm_model()
        width = policy.model.vlm_with_expert.config.text_config.hidden_size
        cameras = len(policy.config.image_features)
        self.detect = nn.ModuleList(nn.Linear(width, 3) for _ in range(cameras))
        self.no_block = nn.Parameter(_zeros(cameras))
        self.pose = nn.Linear(width, len(POSE_NAMES))
        self.parameters = [
            *(p for part in (vlm.vision_model, vlm.connector, vlm.text_model) for p in part.parameters()),
            *policy.model.state_proj.parameters(),
            *self.detect.parameters(),
            self.no_block,
            *self.pose.parameters(),
        ]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self._tokens: list[Tensor] = []
        vlm.connector.register_forward_hook(lambda _module, _inputs, output: self._tokens.append(output))

    def __call__(self, images: dict[str, Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        """Normalised inputs -> per camera (B, P, 3) presence logit and offset in the cell; pose (B, 11)."""
        import torch
        from lerobot.policies.common.vla_utils import make_att_2d_masks
        from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

        flow = self.policy.model
        self._tokens.clear()
        batch = {f"observation.images.{name}": image for name, image in images.items()} | {OBS_STATE: state}
        pixels, masks = self.policy.prepare_images(batch)
        tokens, mask = (
            self.instruction[key].expand(len(state), -1) for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK)
        )
        embeddings, pad, attend = flow.embed_prefix(pixels, masks, tokens, mask, state=self.policy.prepare_state(batch))
        (hidden, _), _ = flow.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attend),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        scale = math.sqrt(embeddings.shape[-1])  # as embed_prefix scales them
        return [head(t * scale) for head, t in zip(self.detect, self._tokens, strict=True)], self.pose(hidden[:, -1])


def _zeros(size: int) -> Tensor:
    import torch

    return torch.zeros(size)


def cell_of(pixel: Tensor, image_size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 2) -> indices (B,) of their cells in a cells x cells grid, offsets (B, 2) from the cells' centres in
    half cells."""
    side = image_size / cells
    column_row = (pixel / side).floor().clamp(0, cells - 1)
    offset = pixel / side - column_row - 0.5
    return (column_row[:, 1] * cells + column_row[:, 0]).long(), 2.0 * offset


def perception_loss(
    detections: list[Tensor], no_block: Tensor, pose: Tensor, labels: dict[str, Tensor], image_size: int
) -> tuple[Tensor, dict[str, float]]:
    """Detection per camera (cross entropy over cells and "none", offset in the true cell) plus pose.

    Args:
        labels: pixel (B, C, 2), visible (B, C), pose (B, 11).
    """
    import torch
    import torch.nn.functional as F

    total, info = torch.zeros(()), {}
    for camera, detection in enumerate(detections):
        visible = labels["visible"][:, camera]
        cells = math.isqrt(detection.shape[1])
        cell, offset = cell_of(labels["pixel"][:, camera], image_size, cells)
        logits = torch.cat([detection[..., 0], no_block[camera].expand(len(cell), 1)], dim=1)  # (B, P + 1)
        target = torch.where(visible == 1, cell, torch.where(visible == GRID_NONE, cells**2, GRID_IGNORE))
        presence = F.cross_entropy(logits, target, ignore_index=GRID_IGNORE)
        seen = visible == 1
        found = detection[torch.arange(len(cell)), cell, 1:][seen]
        place = F.smooth_l1_loss(found, offset[seen], beta=0.1) if seen.any() else torch.zeros(())
        total = total + presence + 2.0 * place
        info[f"presence_{camera}"], info[f"place_{camera}"] = float(presence.detach()), float(place.detach())
    error = F.smooth_l1_loss(pose, labels["pose"], beta=0.1, reduction="none")
    # A block that no camera shows has no place to be learnt; the tool's follows from the joints.
    known = (labels["visible"] == 1).any(dim=1, keepdim=True).float()
    weight = torch.cat(
        [known.expand(-1, 3), torch.ones(len(pose), 3), known.expand(-1, 3), 0.2 * known.expand(-1, 2)], 1
    )
    pose_loss = (weight * error).sum() / weight.sum()
    info["pose"] = float(pose_loss.detach())
    return total + 4.0 * pose_loss, info


# ------------------------------------------------------------------------------------------ training


def pretrain(config: PretrainConfig) -> dict[str, float]:
    """Run the pre-training and write the policy directory with perception.json. Returns the held-out errors, mm."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors

    from reinflow.supervised import FitSettings, fit
    from reinflow_so101.stages.build_smolvla import identity_stats
    from reinflow_vla.directory import refuse_existing, write_json
    from reinflow_vla.smolvla_directory import export_policy, load_smolvla

    refuse_existing(config.output_dir)
    policy, preprocessor, _ = load_smolvla(config.policy_dir)
    cameras = tuple(key.removeprefix("observation.images.") for key in policy.config.image_features)
    size = policy.config.resize_imgs_with_padding[0]
    started = time.perf_counter()
    train = sample_scenes(config, cameras, size, config.samples, 2 * config.seed)
    held_out = sample_scenes(config, cameras, size, config.held_out, 2 * config.seed + 1)
    print(f"rendered {config.samples + config.held_out} scenes in {time.perf_counter() - started:.0f} s")
    stats = identity_stats()
    stats["observation.state"] = {
        "mean": torch.from_numpy(train.state.mean(0)),
        "std": torch.from_numpy(train.state.std(0)),
    }
    preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=stats)

    torch.manual_seed(config.seed)
    net = PerceptionNet(policy, prompt_tokens(preprocessor))
    data = scene_tensors(train, stats)
    order = torch.Generator().manual_seed(config.seed)

    def loss() -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(train.state), (config.batch_size,), generator=order)
        batch = {key: value[rows] for key, value in data.items()}
        return perception_loss(*forward(net, batch, cameras), batch, size)

    settings = FitSettings(config.steps, config.lr, config.weight_decay)
    for step, info in fit(net.parameters, loss, settings, label="pre-training"):
        if step % 100 == 0:
            figures = " ".join(f"{name} {value:.3f}" for name, value in info.items() if name != "loss")
            print(f"step {step} {time.perf_counter() - started:.0f} s  {figures}", flush=True)
        if step % 500 == 0 and step < config.steps:
            print(json.dumps(perception_errors(net, held_out, stats, size)), flush=True)
    errors = perception_errors(net, held_out, stats, size)
    export_policy(policy, preprocessor, postprocessor, config.output_dir)
    record = {"errors": errors, "config": {k: v for k, v in asdict(config).items() if not isinstance(v, Path)}}
    write_json(config.output_dir / "perception.json", record)
    return errors


def prompt_tokens(preprocessor: Any, instruction: str = "pick up the block") -> dict[str, Tensor]:
    """Tokens and mask (1, L) of an instruction, through the policy's own preprocessor."""
    import torch

    batch = preprocessor({"observation.state": torch.zeros(1, 6), "task": [instruction]})
    return {key: value for key, value in batch.items() if key.startswith("observation.language")}


def scene_tensors(scenes: Scenes, stats: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Scenes as tensors, the state normalised as the preprocessor does it; images stay uint8."""
    import torch

    state = (torch.from_numpy(scenes.state) - stats["observation.state"]["mean"]) / stats["observation.state"]["std"]
    labels = {key: torch.from_numpy(getattr(scenes, key)) for key in ("pose", "pixel", "visible")}
    return {camera: torch.from_numpy(images) for camera, images in scenes.images.items()} | labels | {"state": state}


def forward(
    net: PerceptionNet, batch: dict[str, Tensor], cameras: tuple[str, ...]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Detections, the "none" logits (C,) and the pose of one batch of scene tensors."""
    from reinflow_vla.base import unit_images

    detections, pose = net({camera: unit_images(batch[camera]) for camera in cameras}, batch["state"])
    return detections, net.no_block, pose


def perception_errors(
    net: PerceptionNet, scenes: Scenes, stats: dict[str, dict[str, torch.Tensor]], size: int
) -> dict[str, float]:
    """Held-out errors in mm (median and 90th percentile) by camera, and of the state token's hidden state."""
    import torch

    cameras, data = tuple(scenes.images), scene_tensors(scenes, stats)
    detections: list[list[Tensor]] = [[] for _ in cameras]
    poses = []
    with torch.no_grad():
        for first in range(0, len(scenes.state), 100):
            batch = {key: value[first : first + 100] for key, value in data.items()}
            found, _, pose = forward(net, batch, cameras)
            poses.append(pose)
            for camera, detection in enumerate(found):
                detections[camera].append(detection)
    errors: dict[str, float] = {}
    for camera, name in enumerate(cameras):
        detection = torch.cat(detections[camera])
        cells = math.isqrt(detection.shape[1])
        best = detection[..., 0].argmax(dim=1)
        centre = (
            torch.stack([best % cells, best // cells], dim=1) + 0.5 + 0.5 * detection[torch.arange(len(best)), best, 1:]
        )
        metres_per_pixel = torch.from_numpy(scenes.metres_per_pixel[:, camera])
        off = (centre * (size / cells) - data["pixel"][:, camera]).norm(dim=1) * metres_per_pixel * 1e3
        errors |= _summary(name, off[(data["visible"][:, camera] == 1)])
        if name == "camera_up":
            errors |= _summary(
                "camera_up_start", off[(data["visible"][:, camera] == 1) & torch.from_numpy(scenes.kind == 0)]
            )
    off = (torch.cat(poses) - data["pose"])[:, :9].unflatten(1, (3, 3)).norm(dim=2) * POSE_SCALE_M * 1e3  # (n, 3)
    known = (data["visible"] == 1).any(dim=1)
    start = torch.from_numpy(scenes.kind == 0)
    errors |= _summary("state_token_block_start", off[known & start, 0])
    errors |= _summary("state_token_tool", off[:, 1])
    return errors | _summary("state_token_block_in_gripper", off[known & ~start, 2])


def _summary(name: str, values: Tensor) -> dict[str, float]:
    return {
        f"{name}_median_mm": round(float(values.median()), 2),
        f"{name}_p90_mm": round(float(values.quantile(0.9)), 2),
    }


def main() -> None:
    """reinflow-pretrain."""
    import tyro

    config = tyro.cli(PretrainConfig, description=PretrainConfig.__doc__)
    run_command("reinflow-pretrain", lambda: print(json.dumps(pretrain(config), indent=2)))
