"""Policies without weights: the real classes on torch's meta device, of any size, in seconds.

Sizes come from a policy directory, or are those that LeRobot publishes; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from torch import Tensor

from reinflow_so101.policies import FAMILIES, PolicySettings, pi0_options, vla_settings
from reinflow_vla.base import OBS_IMAGES_PREFIX, ReinFlowVLA
from reinflow_vla.directory import quiet, resolve_folder
from so101_mujoco_utils import NUM_JOINTS
from so101_sim.config import EnvConfig

PUBLISHED = ("lerobot/smolvla_base", "lerobot/pi0", "lerobot/pi0_base", "lerobot/pi05_base")
SMOLVLM_TEXT = {
    "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 16, "num_attention_heads": 15,
    "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49_280,
}  # fmt: skip
SMOLVLM_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMOLVLM_IMAGE = (512, 16, 4)  # pixels, patch, pixel shuffle


def skeleton(wanted: PolicySettings, env: EnvConfig) -> ReinFlowVLA:
    """The policy that a training would take, on the meta device.

    A local directory says its sizes; a published hub name stands for the published ones.

    Raises:
        PolicyDirectoryError: neither.
    """
    family = FAMILIES[wanted.model_type]
    directory = None if wanted.policy_path in PUBLISHED else family.directory(wanted.policy_path)
    build = _smolvla if wanted.model_type == "smolvla" else _pi0
    with torch.device("meta"):
        return build(wanted, env, directory)


def _features(env: EnvConfig, image_size: int) -> dict[str, Any]:
    """Input and output features of a published policy that looks through the environment's cameras."""
    from lerobot.configs import FeatureType, PolicyFeature

    image = PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))
    joints = (NUM_JOINTS,)
    inputs = {OBS_IMAGES_PREFIX + name: image for name in env.cameras}
    return {
        "input_features": inputs | {"observation.state": PolicyFeature(FeatureType.STATE, joints)},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, joints)},
        "device": "cpu",
    }


def _pi0(wanted: PolicySettings, env: EnvConfig, directory: Path | None) -> ReinFlowVLA:
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    from pi0_adapter import ReinFlowPi0
    from reinflow_vla.pi0_directory import build_model, stored_sizes

    if directory is None:
        kind = PI05Config if "pi05" in wanted.policy_path else PI0Config
        chunk = {"chunk_size": wanted.chunk_size, "n_action_steps": wanted.n_action_steps}
        config: Any = kind(**_features(env, 224), **chunk)
    else:
        config = PreTrainedConfig.from_pretrained(directory, cli_overrides=["--device=cpu"])
    config.dtype, config.device = wanted.pi0_vlm_dtype, "meta"
    policy = build_model(config, None if directory is None else stored_sizes(directory))
    return ReinFlowPi0(policy, None, None, **pi0_options(wanted), **vla_settings(wanted))


def _smolvla(wanted: PolicySettings, env: EnvConfig, directory: Path | None) -> ReinFlowVLA:
    from lerobot.policies.smolvla import configuration_smolvla  # noqa: F401 - registers the type

    with TemporaryDirectory() as folder:
        if directory is None:
            config = published_smolvla(env, wanted.chunk_size, wanted.n_action_steps, Path(folder))
        else:
            config = PreTrainedConfig.from_pretrained(directory, cli_overrides=["--device=cpu"])
            config.vlm_model_name = resolve_folder(directory, config.vlm_model_name)
        config.load_vlm_weights, config.device = False, "meta"
        return _wrapped_smolvla(wanted, config)


def _wrapped_smolvla(wanted: PolicySettings, config: Any) -> ReinFlowVLA:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from reinflow_smolvla import ReinFlowSmolVLA

    with quiet():
        policy = SmolVLAPolicy(config)
    vision = policy.model.vlm_with_expert.get_vlm_model().vision_model
    # The library looks up positions by the content of a mask, which meta tensors do not have.
    embeddings = vision.embeddings

    def embed(pixel_values: Tensor, **_: Any) -> Tensor:
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + embeddings.position_embedding.weight

    embeddings.forward = embed
    return ReinFlowSmolVLA(policy, None, None, **vla_settings(wanted))


def published_smolvla(env: EnvConfig, chunk_size: int, n_action_steps: int, folder: Path) -> Any:
    """SmolVLAConfig of smolvla_base with the environment's cameras; ``folder`` gets SmolVLM2-500M's configuration and a
    byte tokenizer."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from transformers import SmolVLMConfig

    from reinflow_so101.stages.build_smolvla import TinyConfig, build_vlm_folder

    with torch.device("cpu"):
        build_vlm_folder(folder, TinyConfig(folder, *SMOLVLM_IMAGE))
    vlm = SmolVLMConfig.from_pretrained(folder)
    for part, sizes in ((vlm.text_config, SMOLVLM_TEXT), (vlm.vision_config, SMOLVLM_VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    vlm.save_pretrained(folder)
    return SmolVLAConfig(
        **_features(env, SMOLVLM_IMAGE[0]), chunk_size=chunk_size, n_action_steps=n_action_steps,
        vlm_model_name=str(folder), load_vlm_weights=False, push_to_hub=False,
    )  # fmt: skip
