"""A SmolVLA of the real size (450 M parameters) with random weights, written without the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from reinflow_so101.skeletons import published_smolvla
from reinflow_so101.stages.build_smolvla import VLM_FOLDER, export_policy, identity_stats, quiet
from so101_mujoco_utils import CAMERA_NAMES
from so101_sim.config import EnvConfig
from train_reinflow import TrainingConfig


def write_real_smolvla(directory: Path, cameras: tuple[str, ...] = CAMERA_NAMES) -> None:
    """Write a policy directory; VLM and expert are bf16, as the library loads them."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    folder = (directory / VLM_FOLDER).resolve()
    chunk = TrainingConfig.chunk_size
    smolvla = published_smolvla(EnvConfig(cameras=cameras), chunk, chunk, folder)
    torch.manual_seed(0)
    with quiet():
        policy = SmolVLAPolicy(smolvla)
    policy.model.vlm_with_expert.to(torch.bfloat16)
    preprocessor, postprocessor = make_pre_post_processors(smolvla, dataset_stats=identity_stats())
    export_policy(policy, preprocessor, postprocessor, directory)
