"""A SmolVLA of the real size (450 M parameters) with random weights, written without the hub.

Sizes are those of SmolVLM2-500M-Video-Instruct's config.json, of which SmolVLA takes the first 16 layers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from smolvla_tiny import VLM_FOLDER, TinyConfig, build_vlm_folder, export_policy, identity_stats, quiet
from so101_mujoco_utils import CAMERA_NAMES, NUM_JOINTS

IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR = 512, 16, 4
TEXT = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 16, "num_attention_heads": 15,
    "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49_280, "max_position_embeddings": 8192,
}  # fmt: skip
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def write_real_smolvla(directory: Path, cameras: tuple[str, ...] = CAMERA_NAMES) -> None:
    """Write a policy directory; VLM and expert are bf16, as the library loads them."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import SmolVLMConfig

    folder = directory / VLM_FOLDER
    build_vlm_folder(folder, TinyConfig(directory, IMAGE_SIZE, PATCH_SIZE, SCALE_FACTOR))
    config = SmolVLMConfig.from_pretrained(folder)
    for part, sizes in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.save_pretrained(folder)
    shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    features = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, shape) for name in cameras}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (NUM_JOINTS,))
    smolvla = SmolVLAConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (NUM_JOINTS,))},
        device="cpu",
        vlm_model_name=str(folder.resolve()),
        load_vlm_weights=False,
        push_to_hub=False,
    )
    torch.manual_seed(0)
    with quiet():
        policy = SmolVLAPolicy(smolvla)
    policy.model.vlm_with_expert.to(torch.bfloat16)
    export_policy(policy, *make_pre_post_processors(smolvla, dataset_stats=identity_stats()), directory)
