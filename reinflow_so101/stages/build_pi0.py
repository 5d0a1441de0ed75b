"""A tiny but real Pi0 (or Pi0.5): LeRobot's own classes at a ten-thousandth of the size, built offline.

It has random weights: it shows that every stage runs on a 2-core CPU without the hub, not that Pi0 learns the task.

    reinflow-build-tiny-pi0 --output-dir model/tiny_pi0        # how the embedded one was made, seconds
    reinflow-build-tiny-pi0 --output-dir runs/pi05 --kind pi05
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reinflow import run_command
from reinflow_so101.stages.build_smolvla import byte_tokenizer, tiny_features
from reinflow_vla.directory import refuse_existing
from reinflow_vla.pi0_directory import TOKENIZER_FOLDER, Pi0Sizes, build_model, export_pi0, replaced
from reinflow_vla.soundness import PolicyDirectoryError

STATE_MEAN_DEG = (0.0, -60.0, 60.0, 60.0, -45.0, 15.0)  # a reaching arm, the gripper half open
STATE_STD_DEG = (15.0, 30.0, 30.0, 20.0, 20.0, 15.0)
QUANTILE_STDS = 2.33  # q01 and q99 of a Gaussian lie this many standard deviations from its mean


@dataclass(frozen=True)
class TinyPi0Config:
    """Build a tiny Pi0 or Pi0.5 with random weights."""

    output_dir: Path
    """Policy directory to write; refused if it exists."""
    kind: Literal["pi0", "pi05"] = "pi0"
    """pi0 has the state in the suffix, pi05 writes it into the prompt and modulates its norms by the flow time."""
    image_size: int = 96
    """Side of the square camera images in pixels."""
    patch_size: int = 16
    """Vision patch in pixels: (image_size / patch_size)^2 tokens per camera."""
    vision_width: int = 32
    """Width of the vision tower, 2 layers deep."""
    vlm_width: int = 48
    """Width of the language model."""
    expert_width: int = 32
    """Width of the action expert."""
    depth: int = 2
    """Layers of language model and expert."""
    head_dim: int = 16
    """Of the 8 attention heads."""
    chunk_size: int = 50
    """Actions per chunk: one second at 50 Hz."""
    num_steps: int = 2
    """Denoising steps at inference."""
    seed: int = 0
    """Seed of the random weights."""


def tiny_sizes(config: TinyPi0Config, vocab_size: int) -> Pi0Sizes:
    """Everything that LeRobot would hard-code."""
    return Pi0Sizes(
        vocab_size=vocab_size,
        depth=config.depth,
        head_dim=config.head_dim,
        vlm_width=config.vlm_width,
        vlm_mlp_dim=2 * config.vlm_width,
        expert_width=config.expert_width,
        expert_mlp_dim=2 * config.expert_width,
        vision_width=config.vision_width,
        vision_mlp_dim=2 * config.vision_width,
        vision_depth=2,
        vision_heads=4,
        patch_size=config.patch_size,
        initializer_range=0.1,
    )


def reaching_stats() -> dict[str, dict[str, Any]]:
    """Normaliser statistics with which a random policy moves around a reaching posture; degrees and percent."""
    import torch

    mean, std = torch.tensor(STATE_MEAN_DEG), torch.tensor(STATE_STD_DEG)
    stats = {"mean": mean, "std": std, "q01": mean - QUANTILE_STDS * std, "q99": mean + QUANTILE_STDS * std}
    return {"observation.state": dict(stats), "action": dict(stats)}


def lerobot_config(config: TinyPi0Config) -> Any:
    """PI0Config or PI05Config of the tiny model."""
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    inputs, outputs = tiny_features(config.image_size)
    # One token per byte: the prompt, and for pi05 six numbers of up to three digits.
    kind, prompt = (PI0Config, 48) if config.kind == "pi0" else (PI05Config, 96)
    return kind(
        input_features=inputs,
        output_features=outputs,
        device="cpu",
        image_resolution=(config.image_size, config.image_size),
        chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size,
        num_inference_steps=config.num_steps,
        tokenizer_max_length=prompt,
        push_to_hub=False,
    )


def make_processors(settings: Any, tokenizer: Path) -> Any:
    """The library's pre- and postprocessor with a local tokenizer instead of the gated one that it hard-codes."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.pi0 import processor_pi0
    from lerobot.policies.pi05 import processor_pi05

    step = processor_pi0.TokenizerProcessorStep

    def local_step(**options: Any) -> Any:
        return step(**(options | {"tokenizer_name": str(tokenizer.resolve())}))

    replacement = {"TokenizerProcessorStep": local_step}
    with replaced(processor_pi0, replacement), replaced(processor_pi05, replacement):
        return make_pre_post_processors(settings, dataset_stats=reaching_stats())


def build_policy(config: TinyPi0Config) -> None:
    """Write a tiny Pi0 or Pi0.5 with random weights as a policy directory.

    Raises:
        PolicyDirectoryError: the output directory exists, or the sizes do not divide.
    """
    import torch

    refuse_existing(config.output_dir)
    if config.image_size % config.patch_size:
        raise PolicyDirectoryError(
            f"image_size {config.image_size} must be a multiple of patch_size {config.patch_size}: choose another"
        )
    tokenizer, folder = byte_tokenizer(), config.output_dir / TOKENIZER_FOLDER
    tokenizer.save_pretrained(folder)
    settings = lerobot_config(config)
    torch.manual_seed(config.seed)
    policy = build_model(settings, tiny_sizes(config, len(tokenizer)))
    preprocessor, postprocessor = make_processors(settings, folder)
    export_pi0(policy, preprocessor, postprocessor, config.output_dir)


def main() -> None:
    """reinflow-build-tiny-pi0."""
    import tyro

    config = tyro.cli(TinyPi0Config, description=TinyPi0Config.__doc__)
    run_command("reinflow-build-tiny-pi0", lambda: build_policy(config))
