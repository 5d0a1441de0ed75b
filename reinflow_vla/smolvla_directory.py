"""The one loader and writer of SmolVLA directories.

A directory (directory.py) holds `vlm/` besides the stock files: the tokenizer and the SmolVLM configuration, referred
to as "./vlm". `load_smolvla` resolves that; programs that know only LeRobot need absolute paths (reinflow-materialize).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reinflow_vla.directory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_of_adapter,
    load_processors,
    locate_policy,
    merge_adapter,
    quiet,
    read_json,
    read_policy_config,
    require_cached,
    resolve_folder,
    save_policy,
    store_tokenizer,
    stored_tokenizer,
    write_json,
)
from reinflow_vla.soundness import PolicyDirectoryError, check_sound, check_tensors, reading, stored_tensors
from reinflow_vla.trust import no_remote_code

if TYPE_CHECKING:  # heavy imports stay inside the functions: --help must be fast
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.processor import PolicyProcessorPipeline

VLM_FOLDER = "vlm"
VLM_REFERENCE = f"./{VLM_FOLDER}"  # "./" keeps it from ever being read as a hub repository's name


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
        CheckpointError: a weight is not finite.
        PolicyDirectoryError: naming the file and the remedy.
    """
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from reinflow.training_state import refuse_not_finite

    directory = locate_policy(policy_dir)
    stored = read_json(directory / CONFIG_FILE)
    if stored.get("type") != "smolvla":
        raise PolicyDirectoryError(f"{directory / CONFIG_FILE} is of type {stored.get('type')!r}, not 'smolvla'")
    tokenizer = resolve_folder(directory, stored_tokenizer(directory))
    config = read_policy_config(directory, device)
    config.vlm_model_name = resolve_folder(directory, config.vlm_model_name)
    config.load_vlm_weights = False
    config.num_steps = config.num_steps if num_steps is None else num_steps
    vlm, base = Path(config.vlm_model_name) / CONFIG_FILE, base_of_adapter(directory) or directory
    weights = base / WEIGHTS_FILE
    if not vlm.parent.is_dir():
        require_cached(config.vlm_model_name, directory, VLM_REFERENCE)
    if vlm.is_file():
        check_sound(directory, {vlm: read_json(vlm)})
    with reading(directory), quiet(), no_remote_code():
        with torch.device("meta"):  # before memory is taken for what a damaged configuration asks for
            check_tensors(weights, stored_tensors(weights), SmolVLAPolicy(config).state_dict())
        policy = SmolVLAPolicy.from_pretrained(base, config=config, strict=True)
        if base != directory:
            policy = merge_adapter(policy, directory)
    if base != directory:
        print(f"the adapter in {directory} is folded into its base {base}")
    refuse_not_finite(policy.state_dict().items(), str(directory / WEIGHTS_FILE))
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
