"""The embedded policy: a tiny but real SmolVLA, and the one loader and writer of SmolVLA directories.

LeRobot's own `SmolVLAPolicy` class with a SmolVLM of about a million parameters, a byte-level tokenizer and a
processor built here, so that every stage of the project runs on a 2-core CPU without the hub.

A policy directory (policy_directory.py) holds `vlm/` besides the stock files: the tokenizer and the SmolVLM
configuration, referred to as "./vlm". `load_smolvla` resolves that, and `reinflow-materialize` writes a copy with
absolute paths for programs that know only LeRobot.

    reinflow-build-tiny --output-dir runs/tiny/base            # random weights, seconds
    reinflow-pretrain --policy-dir runs/tiny/base --output-dir runs/tiny/perception
    reinflow-materialize --policy-dir model/tiny_smolvla --output-dir /some/where
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy_directory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PolicyDirectoryError,
    load_processors,
    locate_policy,
    quiet,
    read_json,
    refuse_existing,
    resolve_folder,
    save_policy,
    store_tokenizer,
    stored_tokenizer,
    write_json,
)
from reinflow import run_command

if TYPE_CHECKING:  # heavy imports stay inside the functions: --help must be fast
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.processor import PolicyProcessorPipeline

VLM_FOLDER = "vlm"
VLM_REFERENCE = f"./{VLM_FOLDER}"  # "./" keeps it from ever being read as a hub repository's name
TINY_CAMERAS = ("camera_up", "wrist_camera")
NUM_JOINTS = 6


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


@dataclass(frozen=True)
class MaterializeConfig:
    """Copy a policy directory and write absolute paths into it, for programs that know only LeRobot."""

    policy_dir: Path
    """Directory to copy (for instance model/tiny_smolvla)."""
    output_dir: Path
    """Where the copy goes and must stay; refused if it exists."""


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
        freeze_vision_encoder=False,
        train_expert_only=False,
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


# ---------------------------------------------------------------------------------- loading, writing


def load_smolvla(
    policy_dir: str | Path, device: str = "cpu", num_steps: int | None = None
) -> tuple[SmolVLAPolicy, PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Load policy (fp32, eval mode), preprocessor and postprocessor from any SmolVLA directory, strictly.

    The VLM's own weights are never fetched separately: model.safetensors holds all of them, and a key that is
    missing, unexpected or of another shape is an error.

    Args:
        policy_dir: local policy directory or hub repository.
        device: where policy and preprocessed batches live; the postprocessor returns CPU tensors.
        num_steps: denoising steps; None keeps the stored number.

    Raises:
        PolicyDirectoryError: naming the file and the remedy.
    """
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    directory = locate_policy(policy_dir)
    stored = read_json(directory / CONFIG_FILE)
    if stored.get("type") != "smolvla":
        raise PolicyDirectoryError(f"{directory / CONFIG_FILE} is of type {stored.get('type')!r}, not 'smolvla'")
    tokenizer = resolve_folder(directory, stored_tokenizer(directory))
    config = PreTrainedConfig.from_pretrained(directory, cli_overrides=[f"--device={device}"])
    config.vlm_model_name = resolve_folder(directory, config.vlm_model_name)
    config.load_vlm_weights = False
    config.num_steps = config.num_steps if num_steps is None else num_steps
    try:
        with quiet():
            policy = SmolVLAPolicy.from_pretrained(directory, config=config, strict=True)
    except RuntimeError as error:
        raise PolicyDirectoryError(
            f"{directory / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {error}. Take both from one export"
        ) from error
    remedy = f"Download it before with `hf download {tokenizer}`, or put it into {directory} as {VLM_REFERENCE}"
    return policy, *load_processors(directory, config, tokenizer, remedy)


def export_policy(
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    directory: Path,
) -> None:
    """Write a stock LeRobot policy directory that holds everything it needs and can be moved.

    A local VLM folder is copied in as `vlm/` and referred to as "./vlm"; a hub name stays as it is.
    """
    save_policy(policy, preprocessor, postprocessor, directory)
    source = Path(policy.config.vlm_model_name)
    if source.is_dir():
        if source.resolve() != (directory / VLM_FOLDER).resolve():
            shutil.copytree(source, directory / VLM_FOLDER, dirs_exist_ok=True)
        write_references(directory, VLM_REFERENCE)


def write_references(directory: Path, reference: str) -> None:
    """Write the place of the VLM folder into config.json and policy_preprocessor.json."""
    # The folder holds no weights; model.safetensors holds them all.
    changes = {"vlm_model_name": reference, "load_vlm_weights": False, "pretrained_path": None}
    write_json(directory / CONFIG_FILE, read_json(directory / CONFIG_FILE) | changes)
    store_tokenizer(directory, reference)


def materialize(policy_dir: str | Path, output_dir: str | Path) -> Path:
    """Copy a SmolVLA or Pi0 directory and write absolute paths, so that stock LeRobot loads it from anywhere.

    A Pi0 of other than the published sizes loads inside ``pi0_directory.reduced_sizes`` only.

    Returns:
        The absolute path of the copy. It must not be moved afterwards (materialise again instead).
    """
    source, target = locate_policy(policy_dir), Path(output_dir).resolve()
    refuse_existing(target)
    vlm_name = read_json(source / CONFIG_FILE).get("vlm_model_name")
    folder = Path(resolve_folder(source, str(vlm_name or stored_tokenizer(source))))
    if not folder.is_dir():
        raise PolicyDirectoryError(f"{source} refers to the hub ({folder}): LeRobot loads it as it is, nothing to do")
    shutil.copytree(source, target)
    inside = target / folder.name
    if folder.parent != source:
        shutil.copytree(folder, inside, dirs_exist_ok=True)
    if vlm_name:
        write_references(target, str(inside))
    else:
        store_tokenizer(target, str(inside))
    return target


def predict_chunk(
    policy: SmolVLAPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    batch: dict[str, Any],
) -> Any:
    """Action chunk by LeRobot's own sampler, in the environment's units: tensor (N, chunk_size, 6).

    The flow's initial noise comes from torch's global generator: seed it for repeatable actions.

    Args:
        batch: raw policy inputs: `observation.images.<camera>` float (N, 3, h, w) in [0, 1],
            `observation.state` (N, 6) in the policy's units, `task` list of N strings.
    """
    return postprocessor(policy.predict_action_chunk(preprocessor(batch)))


# ----------------------------------------------------------------------------------------- commands


def build_main() -> None:
    """reinflow-build-tiny."""
    import tyro

    config = tyro.cli(TinyConfig, description=TinyConfig.__doc__)
    run_command("reinflow-build-tiny", lambda: build_policy(config))


def materialize_main() -> None:
    """reinflow-materialize."""
    import tyro

    config = tyro.cli(MaterializeConfig, description=MaterializeConfig.__doc__)
    run_command("reinflow-materialize", lambda: print(f"wrote {materialize(config.policy_dir, config.output_dir)}"))
