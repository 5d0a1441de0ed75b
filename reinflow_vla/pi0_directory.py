"""The one loader and writer of Pi0 and Pi0.5 directories, and the models of other sizes than the published ones.

LeRobot hard-codes the sizes of Pi0 (3.5 billion parameters) in its source. A directory with a ``sizes.json`` holds a
model of other sizes; ``reduced_sizes`` puts those in place of the hard-coded ones while a model is built. LeRobot's own
``from_pretrained`` works on such a directory inside the same context, and on one of the published sizes as it is.

LeRobot's ``from_pretrained`` also prints a warning and goes on with random weights when a file or a key is missing.
``load_pi0`` compares every key and every shape, and refuses.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow_vla.directory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_of_adapter,
    load_processors,
    locate_policy,
    quiet,
    read_json,
    read_policy_config,
    resolve_folder,
    save_policy,
    store_tokenizer,
    stored_tokenizer,
    write_json,
)
from reinflow_vla.soundness import PolicyDirectoryError, check_sound, check_tensors, reading, stored_tensors
from reinflow_vla.trust import check_data_only

if TYPE_CHECKING:  # heavy imports stay inside the functions: --help must be fast
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import PolicyProcessorPipeline
    from torch import Tensor

SIZES_FILE = "sizes.json"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_REFERENCE = f"./{TOKENIZER_FOLDER}"
GATED_TOKENIZER = "google/paligemma-3b-pt-224"  # hard-coded in LeRobot's processors
KINDS = ("pi0", "pi05")
NUM_HEADS = 8  # hard-coded in LeRobot's joint forward pass


@dataclass(frozen=True)
class Pi0Sizes:
    """Sizes that LeRobot hard-codes. 8 attention heads and 1 key/value head are as published."""

    vocab_size: int
    """Tokens; 257,152 in PaliGemma."""
    depth: int
    """Layers of the language model and of the expert; 18."""
    head_dim: int
    """Of both; 256."""
    vlm_width: int
    """Hidden size of the language model; 2048."""
    vlm_mlp_dim: int
    """16,384."""
    expert_width: int
    """Hidden size of the action expert; 1024."""
    expert_mlp_dim: int
    """4096."""
    vision_width: int
    """Hidden size of the vision tower; 1152."""
    vision_mlp_dim: int
    """4304."""
    vision_depth: int
    """27."""
    vision_heads: int
    """16."""
    patch_size: int
    """Pixels; (image size / patch size)^2 tokens per camera; 14."""
    initializer_range: float
    """Standard deviation of random weights: about 1/sqrt(width)."""


@contextmanager
def replaced(module: Any, replacements: dict[str, Any]) -> Iterator[None]:
    """Let ``module`` have other globals for a while."""
    originals = {name: getattr(module, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(module, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


@contextmanager
def reduced_sizes(sizes: Pi0Sizes | None) -> Iterator[None]:
    """Let LeRobot build Pi0 and Pi0.5 with ``sizes``; None leaves the published ones."""
    if sizes is None:
        yield
        return
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    with (
        replaced(modeling_pi0, _replacements(sizes, modeling_pi0)),
        replaced(modeling_pi05, _replacements(sizes, modeling_pi05)),
    ):
        yield


def _replacements(sizes: Pi0Sizes, module: Any) -> dict[str, Any]:
    """The three names through which a LeRobot module gets its sizes."""
    gemma_config, mapping = module.GemmaConfig, module.CONFIG_MAPPING
    paligemma = module.PaliGemmaForConditionalGenerationWithPiGemma

    def get_gemma_config(variant: str) -> Any:
        vlm = variant == "gemma_2b"
        return gemma_config(
            width=sizes.vlm_width if vlm else sizes.expert_width,
            depth=sizes.depth,
            mlp_dim=sizes.vlm_mlp_dim if vlm else sizes.expert_mlp_dim,
            num_heads=NUM_HEADS,
            num_kv_heads=1,
            head_dim=sizes.head_dim,
        )

    def gemma(**settings: Any) -> Any:
        changed = {"vocab_size": sizes.vocab_size, "initializer_range": sizes.initializer_range}
        return mapping["gemma"](**(settings | changed))

    def build_paligemma(config: Any) -> Any:
        config._vocab_size = config.image_token_index = config.text_config.vocab_size = sizes.vocab_size
        config.text_config.initializer_range = sizes.initializer_range
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = sizes.vision_width, sizes.vision_mlp_dim
        vision.num_hidden_layers, vision.num_attention_heads = sizes.vision_depth, sizes.vision_heads
        vision.patch_size, vision.projection_dim = sizes.patch_size, sizes.vlm_width
        config.projection_dim = sizes.vlm_width
        return paligemma(config=config)

    return {
        "get_gemma_config": get_gemma_config,
        "CONFIG_MAPPING": {"paligemma": mapping["paligemma"], "gemma": gemma},
        "PaliGemmaForConditionalGenerationWithPiGemma": build_paligemma,
    }


def stored_sizes(directory: Path) -> Pi0Sizes | None:
    """Sizes of a directory's model, None for the published ones; raises PolicyDirectoryError."""
    file = directory / SIZES_FILE
    if not file.is_file():
        return None
    content, names = read_json(file), {field.name for field in fields(Pi0Sizes)}
    if content.keys() != names:
        raise PolicyDirectoryError(
            f"{file} has the fields {sorted(content)}, not {sorted(names)}: restore it, or build the policy anew"
        )
    check_sound(directory, {file: content})
    if not all(type(value) in (int, float) and value > 0 for value in content.values()):
        raise PolicyDirectoryError(f"{file} has a size that is not above 0: restore it, or build the policy anew")
    return Pi0Sizes(**content)


def policy_class(kind: str) -> type[PreTrainedPolicy]:
    """PI0Policy or PI05Policy."""
    from lerobot.policies.pi0.modeling_pi0 import PI0Policy
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    return {"pi0": PI0Policy, "pi05": PI05Policy}[kind]


def build_model(config: PreTrainedConfig, sizes: Pi0Sizes | None) -> PreTrainedPolicy:
    """A Pi0 or Pi0.5 with random weights, in eval mode; the action expert is fp32 whatever ``config.dtype`` says."""
    import torch

    with reduced_sizes(sizes), quiet():
        policy = policy_class(config.type)(config)
    # Before any weight is loaded: through bf16 parameters an expert that was trained in fp32 would be rounded.
    expert = "model.paligemma_with_expert.gemma_expert.model."
    dtypes = {name: p.dtype for name, p in policy.named_parameters() if name.startswith(expert)}
    policy.narrow = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}  # what plain LeRobot rounds
    policy.model.paligemma_with_expert.gemma_expert.model.float()
    policy.reduced_sizes = sizes
    return policy.eval()


def load_pi0(
    policy_dir: str | Path, device: str = "cpu", *, dtype: str | None = None, tokenizer: str = ""
) -> tuple[PreTrainedPolicy, PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Load policy (eval mode), preprocessor and postprocessor from a Pi0 or Pi0.5 directory, strictly.

    Args:
        policy_dir: local policy directory or hub repository.
        device: where policy and preprocessed batches live; the postprocessor returns CPU tensors.
        dtype: "bfloat16" or "float32" of the language model; None keeps the stored one. The vision tower and the
            expert are fp32 in any case.
        tokenizer: folder with the tokenizer's files, instead of the stored place.

    Raises:
        PolicyDirectoryError: naming the file and the remedy.
    """
    import torch

    directory = locate_policy(policy_dir)
    kind = read_json(directory / CONFIG_FILE).get("type")
    if kind not in KINDS:
        raise PolicyDirectoryError(f"{directory / CONFIG_FILE} is of type {kind!r}, not one of {KINDS}")
    if base_of_adapter(directory):
        raise PolicyDirectoryError(f"{directory} is an adapter of a Pi0, which is not read here: merge it first")
    sizes = stored_sizes(directory)
    config = read_policy_config(directory, device)
    config.dtype = dtype or config.dtype
    config.compile_model = False  # it would compile the library's sampler, which training does not call
    if config.use_relative_actions:
        raise PolicyDirectoryError(
            f"{directory / CONFIG_FILE} has use_relative_actions=true: its postprocessor adds the last state it saw, "
            "which several environments would mix up. Fine-tune a policy with absolute actions"
        )
    if tokenizer and not Path(tokenizer).is_dir():
        raise PolicyDirectoryError(f"pi0_tokenizer_path={tokenizer} is no directory: name one with tokenizer.json")
    if tokenizer:
        check_data_only(Path(tokenizer))
    name = tokenizer or resolve_folder(directory, stored_tokenizer(directory))
    processors = load_processors(directory, config, name, tokenizer_remedy(name))  # before 3.5 billion weights
    without_memory = copy(config)  # before any is taken for what a damaged configuration asks for
    without_memory.device = "meta"
    with reading(directory):
        with torch.device("meta"):
            check_weights(build_model(without_memory, sizes), directory / WEIGHTS_FILE)
        policy = build_model(config, sizes)
        _load_weights(policy, directory / WEIGHTS_FILE)
    return policy, *processors


def tokenizer_remedy(name: str) -> str:
    """What to do when the tokenizer ``name`` cannot be had."""
    licence = ""
    if name == GATED_TOKENIZER:
        licence = (
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, make a read token, "
            "`hf auth login`. "
        )
    return (
        f"{licence}Online, unset HF_HUB_OFFLINE. Offline, copy a folder with its tokenizer.json and "
        "tokenizer_config.json here and name it: --pi0-tokenizer-path DIR"
    )


def _translated(policy: PreTrainedPolicy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names pass through the library's own translation of openpi's."""
    translated = policy._fix_pytorch_state_dict_keys(dict(tensors), policy.config)
    return {name if name.startswith("model.") else f"model.{name}": value for name, value in translated.items()}


def check_weights(policy: PreTrainedPolicy, file: Path) -> None:
    """Raise PolicyDirectoryError unless every name and shape in a file fits ``policy``, which may be on meta."""
    try:
        check_tensors(file, _translated(policy, stored_tensors(file)), policy.state_dict())
    except PolicyDirectoryError as error:
        raise PolicyDirectoryError(
            f"{error}. LeRobot would go on with random weights here (exports of 0.6 and the hub's lerobot/pi0_base, "
            "lerobot/pi05_base fit)"
        ) from error


def _load_weights(policy: PreTrainedPolicy, file: Path) -> None:
    """Copy a safetensors file into ``policy``; raises PolicyDirectoryError unless every key and shape fits."""
    from safetensors.torch import load_file

    from reinflow.training_state import refuse_not_finite, strict_load

    weights = _translated(policy, load_file(file))
    refuse_not_finite(weights.items(), str(file))
    try:
        strict_load(dict(policy.state_dict()), weights, str(file), any_dtype=True)
    except ValueError as error:
        raise PolicyDirectoryError(
            f"{error} LeRobot would go on with random weights here. Take {CONFIG_FILE} and {WEIGHTS_FILE} from one "
            "export of LeRobot 0.6 (the hub's lerobot/pi0_base and lerobot/pi05_base)"
        ) from error


def export_pi0(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    directory: Path,
) -> None:
    """Write a stock LeRobot policy directory that holds everything it needs and can be moved.

    A local tokenizer folder is copied in as `tokenizer/` and referred to as "./tokenizer"; a hub name stays.
    """
    save_policy(policy, preprocessor, postprocessor, directory)
    if policy.reduced_sizes is not None:
        write_json(directory / SIZES_FILE, asdict(policy.reduced_sizes))
    source = Path(stored_tokenizer(directory))
    if source.is_dir():
        if source.resolve() != (directory / TOKENIZER_FOLDER).resolve():
            shutil.copytree(source, directory / TOKENIZER_FOLDER, dirs_exist_ok=True)
        store_tokenizer(directory, TOKENIZER_REFERENCE)
