"""The embedded policy's start: a tiny but real SmolVLA with random weights.

LeRobot's own `SmolVLAPolicy` class with a SmolVLM of about a million parameters, a byte-level tokenizer and a
processor built here, so that every stage of the project runs on a 2-core CPU without the hub.

    reinflow-build-tiny --output-dir runs/tiny/base            # random weights, seconds
    reinflow-pretrain --policy-dir runs/tiny/base --output-dir runs/tiny/perception
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinflow import run_command
from reinflow_vla.directory import quiet, refuse_existing
from reinflow_vla.smolvla_directory import VLM_FOLDER, export_policy
from reinflow_vla.soundness import PolicyDirectoryError
from so101_mujoco_utils import NUM_JOINTS

TINY_CAMERAS = ("camera_up", "wrist_camera")


@dataclass(frozen=True)
class TinyConfig:
    """Build a tiny SmolVLA with random weights (the start of reinflow-pretrain)."""

    output_dir: Path
    """Policy directory to write; refused if it exists."""
    image_size: int = 96
    """Side of the square camera images in pixels: a 25 mm block is about 3 pixels of camera_up."""
    patch_size: int = 8
    """Vision patch in pixels: (image_size / patch_size)^2 patches per camera."""
    scale_factor: int = 3
    """Pixel shuffle of the connector: scale_factor^2 patches become one token (16 tokens per camera)."""
    vision_hidden_size: int = 64
    """Width of the vision tower."""
    vision_layers: int = 3
    """Depth of the vision tower."""
    text_hidden_size: int = 96
    """Width of the language model; the action expert has .75 of it."""
    text_layers: int = 4
    """Depth of the language model and of the action expert."""
    chunk_size: int = 50
    """Actions per chunk: one second at 50 Hz."""
    num_steps: int = 4
    """Denoising steps at inference; the training loss does not depend on it."""
    initializer_range: float = 0.1
    """Standard deviation of the random weights: about 1/sqrt(width), as the usual .02 is for a width of 1000."""
    seed: int = 0
    """Seed of the random weights."""


# ---------------------------------------------------------------------------------------- building


def byte_tokenizer() -> Any:
    """A tokenizer of one token per byte: any instruction can be written, nothing has to be learnt or downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>"]
    specials += ["<global-img>", "<end_of_utterance>"]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )


def build_vlm_folder(folder: Path, config: TinyConfig) -> None:
    """Write tokenizer, image processor and SmolVLM configuration (no weights) into `folder`."""
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    fast = byte_tokenizer()
    edge = {"longest_edge": config.image_size}
    sampling = {"fps": 1, "max_frames": 4, "video_size": edge}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=edge, max_image_size=edge),
        tokenizer=fast,
        video_processor=SmolVLMVideoProcessor(
            size=edge, max_image_size=edge, num_frames=4, fps=1, video_sampling=sampling
        ),
        image_seq_len=(config.image_size // config.patch_size // config.scale_factor) ** 2,
    )
    vlm_config(fast, config).save_pretrained(folder)
    processor.save_pretrained(folder)


def vlm_config(tokenizer: Any, config: TinyConfig) -> Any:
    """SmolVLMConfig of the tiny model."""
    from transformers import SmolVLMConfig

    heads = config.text_hidden_size // 24
    text = {
        "model_type": "llama",
        "hidden_size": config.text_hidden_size,
        "intermediate_size": 2 * config.text_hidden_size,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 24,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        "initializer_range": config.initializer_range,
    }
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": 2 * config.vision_hidden_size,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": 4,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "initializer_range": config.initializer_range,
    }
    return SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=config.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        vocab_size=len(tokenizer),
    )


def build_policy(config: TinyConfig) -> None:
    """Write a tiny SmolVLA with random weights and identity statistics as a policy directory.

    Raises:
        PolicyDirectoryError: the output directory exists, or the sizes do not divide.
    """
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    refuse_existing(config.output_dir)
    if config.image_size % (config.patch_size * config.scale_factor):
        raise PolicyDirectoryError(
            f"image_size {config.image_size} must be a multiple of patch_size * scale_factor "
            f"({config.patch_size} * {config.scale_factor}): choose another of the three"
        )
    folder = config.output_dir / VLM_FOLDER
    build_vlm_folder(folder, config)
    inputs, outputs = tiny_features(config.image_size)
    smolvla_config = SmolVLAConfig(
        input_features=inputs,
        output_features=outputs,
        device="cpu",
        vlm_model_name=str(folder.resolve()),
        load_vlm_weights=False,
        resize_imgs_with_padding=(config.image_size, config.image_size),
        num_vlm_layers=config.text_layers,
        chunk_size=config.chunk_size,
        n_action_steps=config.chunk_size,
        num_steps=config.num_steps,
        freeze_vision_encoder=True,  # as smolvla_base; pre-training and reinflow-sft say for themselves what learns
        train_expert_only=True,
        train_state_proj=False,
        optimizer_lr=1e-3,  # lerobot-train takes it from here; LeRobot's 1e-4 is for an expert ten times as wide
        push_to_hub=False,
    )
    torch.manual_seed(config.seed)
    with quiet():
        policy = SmolVLAPolicy(smolvla_config)
    # The policy multiplies image tokens by sqrt(width) before the language model: start them at unit size there.
    projection = policy.model.vlm_with_expert.get_vlm_model().connector.modality_projection.proj
    torch.nn.init.normal_(projection.weight, std=(projection.in_features * config.text_hidden_size) ** -0.5)
    copy_noised_action(policy.model)
    preprocessor, postprocessor = make_pre_post_processors(smolvla_config, dataset_stats=identity_stats())
    export_policy(policy, preprocessor, postprocessor, config.output_dir)


def tiny_features(image_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Input and output features of a tiny policy, as LeRobot's configs want them."""
    from lerobot.configs import FeatureType, PolicyFeature

    image = PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))
    inputs = {f"observation.images.{name}": image for name in TINY_CAMERAS}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (NUM_JOINTS,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (NUM_JOINTS,))}


def copy_noised_action(flow: Any, amplitude: float = 0.3) -> None:
    """Start the action expert as the velocity ``v(x_t) = x_t``, to a third of a percent.

    With one denoising step the action is ``x_0 - v(x_0)``: what is not copied exactly from the noise stays in the
    action. From random weights that error was .07 of the noise's std after supervised training and cost 21 points of
    success. So each joint gets a channel of the residual stream that carries ``amplitude * x_t`` past all layers
    (``silu(x) - silu(-x) = x``) to the velocity head, while the other channels start nearly constant and keep the final
    norm still. The supervised stage trains everything from there.
    """
    import torch

    joints = torch.arange(NUM_JOINTS)
    mirrored = joints + NUM_JOINTS
    width = flow.action_in_proj.out_features
    with torch.no_grad():
        flow.action_in_proj.weight.zero_()
        flow.action_in_proj.bias.zero_()
        flow.action_in_proj.weight[joints, joints] = 1.0
        flow.action_time_mlp_in.weight[:, :width] = 0.0  # the second half reads the flow time
        flow.action_time_mlp_in.weight[: 2 * NUM_JOINTS] = 0.0
        flow.action_time_mlp_in.bias[: 2 * NUM_JOINTS] = 0.0
        flow.action_time_mlp_in.weight[joints, joints] = 1.0
        flow.action_time_mlp_in.weight[mirrored, joints] = -1.0
        flow.action_time_mlp_out.weight[:, : 2 * NUM_JOINTS] = 0.0
        flow.action_time_mlp_out.weight[joints] = 0.0
        flow.action_time_mlp_out.weight[joints, joints] = amplitude
        flow.action_time_mlp_out.weight[joints, mirrored] = -amplitude
        flow.action_time_mlp_out.bias.normal_()
        flow.action_time_mlp_out.bias[joints] = 0.0
        for layer in flow.vlm_with_expert.lm_expert.layers:
            readers = [layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.up_proj]
            if layer.self_attn.k_proj.in_features == width:  # cross-attention layers read keys and values elsewhere
                readers += [layer.self_attn.k_proj, layer.self_attn.v_proj]
            for reader in readers:
                reader.weight[:, joints] = 0.0
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(0.3)
                writer.weight[joints] = 0.0
        flow.action_out_proj.weight.zero_()
        flow.action_out_proj.bias.zero_()
        flow.action_out_proj.weight[joints, joints] = 1.0 / amplitude


def identity_stats() -> dict[str, dict[str, Any]]:
    """Normaliser statistics that change nothing; the supervised stage replaces them by the dataset's."""
    import torch

    unit = {"mean": torch.zeros(NUM_JOINTS), "std": torch.ones(NUM_JOINTS)}
    return {"observation.state": dict(unit), "action": dict(unit)}


# ----------------------------------------------------------------------------------------- commands


def main() -> None:
    """reinflow-build-tiny."""
    import tyro

    config = tyro.cli(TinyConfig, description=TinyConfig.__doc__)
    run_command("reinflow-build-tiny", lambda: build_policy(config))
