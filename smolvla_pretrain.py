"""Perception pre-training of the tiny SmolVLA; it stands for the pre-training that the real one has.

Rendered images with simulator labels, no actions. Two kinds of targets, trained together:

* detection, on every image token that the connector hands to the language model: does this token's cell hold the
  block's centre, and where in the cell? A dense target of this kind finds a 3-pixel block about four times sooner
  than regressing its position from all tokens does.
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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
    samples: int = 12_000
    """Rendered scenes for training, each seen by all cameras of the policy."""
    held_out: int = 1_000
    """Scenes with other seeds, for the reported error."""
    steps: int = 1_500
    """Optimiser steps."""
    batch_size: int = 32
    """Small: early on, the number of steps counts, not the number of images per step."""
    lr: float = 1.5e-3
    """Peak of AdamW's learning rate; 50 steps of warm-up, then a cosine to zero."""
    weight_decay: float = 1e-4
    """AdamW's, on everything."""
    block_radius_range: tuple[float, float] = (0.13, 0.34)
    """Metres from the base axis: wider than the task's, so that later tasks can use the same features."""
    block_angle_deg: float = 65.0
    """To either side of straight ahead."""
    wrist_roll_deg: tuple[float, ...] = (5.96, -84.04)
    """Wrist angles of the start poses that are shown: both documented ones."""
    seed: int = 0
    """Of the scenes, the order of the batches and the heads."""


@dataclass
class Scenes:
    """Rendered scenes with labels. n scenes, C cameras, image side w."""

    images: dict[str, NDArray[np.uint8]]  # camera: (n, 3, w, w)
    state: NDArray[np.float32]  # (n, 6) LeRobot degrees / percent
    pose: NDArray[np.float32]  # (n, len(POSE_NAMES)), metres / POSE_SCALE_M, sine and cosine as they are
    pixel: NDArray[np.float32]  # (n, C, 2) block centre, column and row in pixels
    visible: NDArray[np.int64]  # (n, C) 1 seen, GRID_NONE, GRID_IGNORE
    kind: NDArray[np.int64]  # (n,) 0 start pose, 1 expert trajectory, 2 near the block
    metres_per_pixel: NDArray[np.float32]  # (n, C) at the block


# ------------------------------------------------------------------------------------------ scenes


class SceneSampler:
    """Draws block and arm, renders and labels."""

    def __init__(self, config: PretrainConfig, cameras: tuple[str, ...], image_size: int, seed: int) -> None:
        import mujoco

        from so101_expert import ScriptedExpert
        from so101_gym_env import EnvConfig
        from so101_mujoco_utils import FRAMES, SceneLayout, load_model
        from so101_scene import SceneRenderer

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
            q_rad = plan[self.rng.choice([self.rng.integers(20, 76), 49])] + np.deg2rad(self.rng.normal(0.0, 3.0, 6))
            q_rad[5] = np.deg2rad(self.rng.uniform(-5.0, 60.0))
            self.place(self.clip(q_rad), position, yaw)
            records.append(self.label(2))
            self.rng.random()
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
        window = red[max(0, int(row) - reach) : int(row) + reach + 1, max(0, int(column) - reach) : int(column) + reach + 1]
        return (column, row), 1 if inside and window.mean() > 0.3 else GRID_IGNORE, depth / focal


def sample_scenes(config: PretrainConfig, cameras: tuple[str, ...], size: int, count: int, seed: int) -> Scenes:
    """`count` scenes: 40 % at the start pose, 30 % on expert trajectories, 30 % near the block."""
    sampler = SceneSampler(config, cameras, size, seed)
    records: list[dict[str, Any]] = []
    parts = ((sampler.start_scene, 0.4), (sampler.expert_scenes, 0.7), (sampler.near_scene, 1.0))
    for draw, share in parts:
        while len(records) < round(share * count):
            records += draw()
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
