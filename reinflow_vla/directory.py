"""Policy directories as LeRobot writes them: found, read strictly, and written so that they can be moved.

A directory is LeRobot's stock one (config.json, model.safetensors, policy_preprocessor.json, policy_postprocessor.json
with their safetensors). LeRobot stores the place of a local tokenizer as an absolute path, which breaks when the
directory moves; ours store a reference such as "./vlm" to a folder inside, which the loaders of the policy families
resolve against the directory itself.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow_vla.soundness import PolicyDirectoryError, check_sound, check_tokens, reading
from reinflow_vla.trust import check_data_only, check_steps, no_remote_code

if TYPE_CHECKING:  # heavy imports stay inside the functions: --help must be fast
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import PolicyProcessorPipeline
    from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"
ACTION, OBS_STATE, OBS_IMAGES_PREFIX = "action", "observation.state", "observation.images."  # LeRobot's feature names
STATISTICS = {  # by LeRobot's normalisation mode
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's, instead of the weights
POLICY_FILES = (CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE, POSTPROCESSOR_FILE)


def weights_file(directory: Path) -> Path:
    """The weights of a policy directory: its own, or an adapter's over a base."""
    whole = directory / WEIGHTS_FILE
    return whole if whole.is_file() or not (directory / ADAPTER_FILE).is_file() else directory / ADAPTER_FILE


def refuse_existing(directory: Path) -> None:
    """Raise PolicyDirectoryError if something is already there."""
    if directory.exists():
        raise PolicyDirectoryError(f"{directory} exists: choose another output directory or remove it first")


def refuse_inside(directory: Path, source: Path) -> None:
    """Raise PolicyDirectoryError if what is copied from ``source`` would be written into it."""
    if directory.resolve().is_relative_to(source.resolve()):
        raise PolicyDirectoryError(f"output_dir={directory} lies inside {source}, which is copied: choose another")


@contextlib.contextmanager
def quiet():
    """LeRobot prints to stdout while it builds a policy; keep that out of progress output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def locate_policy(reference: str | Path) -> Path:
    """Directory of a policy: a local directory, or a hub repository `owner/name` (downloaded or from the cache).

    Raises:
        PolicyDirectoryError: neither is there; or files are missing in the directory.
        UntrustedPolicyError: it is more than data.
    """
    directory = Path(reference)
    if not directory.is_dir():
        directory = download_policy(str(reference))
    adapter = (directory / ADAPTER_FILE).is_file() and (directory / ADAPTER_CONFIG).is_file()
    missing = [
        name for name in POLICY_FILES if not (directory / name).is_file() and not (adapter and name == WEIGHTS_FILE)
    ]
    if CONFIG_FILE not in missing and read_json(directory / CONFIG_FILE).get("type") == "flow_mlp":
        raise PolicyDirectoryError(f"{directory} is a flow_mlp: --preset flow_mlp --flow-mlp-pretrained-path takes it")
    if PREPROCESSOR_FILE in missing and not {CONFIG_FILE, WEIGHTS_FILE} & set(missing):
        raise PolicyDirectoryError(
            f"{directory} lacks {', '.join(missing)}: it is of a LeRobot before processors. Migrate it: python -m "
            f"lerobot.processor.migrate_policy_normalization --pretrained-path {reference}"
        )
    if missing:
        raise PolicyDirectoryError(
            f"{directory} lacks {', '.join(missing)}: a policy directory as LeRobot's save_pretrained writes it "
            "is needed, processors included (for a checkpoint, name its pretrained_model folder)"
        )
    check_trusted(directory)
    check_sound(directory, {directory / CONFIG_FILE: read_json(directory / CONFIG_FILE)})
    return directory.resolve()


def check_trusted(directory: Path) -> None:
    """Refuse a policy directory that is more than data, before anything else reads it.

    Raises:
        UntrustedPolicyError: it names or brings code, or reads files elsewhere.
        PolicyDirectoryError: a processor file is no JSON.
    """
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        if (directory / name).is_file():
            check_steps(directory / name, read_json(directory / name))
    check_data_only(directory)


def download_policy(repo_id: str) -> Path:
    """Local snapshot of a hub repository; raises PolicyDirectoryError with the remedy."""
    repo_id, _, revision = repo_id.partition("@")
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise PolicyDirectoryError(f"{repo_id}: no such directory, and not a hub repository of the form owner/name")
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    folder = Path(repo_id).parent
    if folder.is_dir() and not isinstance(try_to_load_from_cache(repo_id, CONFIG_FILE), str):
        raise PolicyDirectoryError(
            f"{repo_id}: no such directory, though {folder}/ is one, so this is not taken for a hub repository. Check "
            f"the path; for the repository run `hf download {repo_id}` before, or start from another folder"
        )
    try:
        return Path(snapshot_download(repo_id, revision=revision or None))
    except Exception as error:  # the hub client raises many types; all of them mean: not to be had
        raise PolicyDirectoryError(
            f"{repo_id} is no local directory and could not be taken from the Hugging Face hub or its cache "
            f"({type(error).__name__}: {error}). Go online (unset HF_HUB_OFFLINE), download it before with "
            f"`hf download {repo_id}`, or name a local policy directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """JSON object in a file; PolicyDirectoryError names the file when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyDirectoryError(f"{path} cannot be read as JSON ({error}): restore or re-export it") from error
    if not isinstance(content, dict):
        raise PolicyDirectoryError(f"{path} holds no JSON object: restore or re-export it")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def resolve_folder(directory: Path, reference: str) -> str:
    """Turn the stored place of a tokenizer (or VLM configuration) into one that loads from anywhere.

    A path relative to the policy directory wins; an absolute path must exist; `owner/name` is left to the hub.
    """
    inside = directory / reference  # an absolute reference stays what it is
    if inside.is_dir():
        check_data_only(inside)
        check_tokens(inside)
        return str(inside.resolve())
    if Path(reference).is_dir():
        check_data_only(Path(reference))
        check_tokens(Path(reference))
    looks_local = reference.startswith((".", "/", "~")) or reference.count("/") != 1
    if looks_local and not Path(reference).is_dir():
        raise PolicyDirectoryError(
            f"{directory / CONFIG_FILE} or {PREPROCESSOR_FILE} names the folder {reference!r}, which does not "
            "exist: put that folder into the policy directory and write its relative path, such as './vlm'"
        )
    return reference


def brings_its_backbone(directory: Path) -> bool:
    """Whether a policy names its backbone or tokenizer by a folder of this machine and not by a hub repository: its
    exports hold that folder, under a relative path, which LeRobot would look for in the working directory."""
    stored = read_json(directory / CONFIG_FILE)
    if stored.get("type") not in ("smolvla", "pi0", "pi05"):
        return False
    try:
        named = stored.get("vlm_model_name") or stored_tokenizer(directory)
        return Path(resolve_folder(directory, str(named))).is_dir()
    except PolicyDirectoryError:  # a tokenizer that is gone; who needs it says so
        return False


def base_of_adapter(directory: Path) -> Path | None:
    """The policy directory that a PEFT adapter directory builds on; None for one with weights of its own."""
    if weights_file(directory).name != ADAPTER_FILE:
        return None
    base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise PolicyDirectoryError(f"{directory / ADAPTER_CONFIG} names no base_model_name_or_path: add the base")
    return locate_policy(base)


def merge_adapter(policy: PreTrainedPolicy, directory: Path) -> PreTrainedPolicy:
    """``policy`` with the adapter in a PEFT directory folded into its weights."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    adapted = PeftModel.from_pretrained(policy, directory)
    with safe_open(directory / ADAPTER_FILE, "pt") as content:
        stored = set(content.keys())
    if stored != (wanted := set(get_peft_model_state_dict(adapted))):
        raise PolicyDirectoryError(
            f"{directory / ADAPTER_FILE} does not fit its base: {len(stored - wanted)} tensors have no place there and "
            f"{len(wanted - stored)} are missing. Take adapter and base of one training"
        )
    merged = adapted.merge_and_unload()
    merged.config.use_peft = False
    return merged


def require_cached(repo_id: str, directory: Path, reference: str) -> None:
    """Raise PolicyDirectoryError if a hub repository is asked for offline and its configuration is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(repo_id, CONFIG_FILE), str):
        raise PolicyDirectoryError(
            f"{directory} takes configuration and tokenizer of its language model from the hub's {repo_id}, not "
            f'in the cache: once, with HF_HUB_OFFLINE unset, run `hf download {repo_id} --exclude "*.safetensors"` or '
            f"put those files into {directory / reference}, with {reference!r} as vlm_model_name and tokenizer_name"
        )


def stored_tokenizer(directory: Path) -> str:
    """Tokenizer name in a directory's policy_preprocessor.json."""
    file = directory / PREPROCESSOR_FILE
    for step in read_json(file).get("steps", []):
        if step.get("registry_name") == "tokenizer_processor":
            return str(step["config"]["tokenizer_name"])
    raise PolicyDirectoryError(f"{file} has no tokenizer_processor step: is it a VLA's? Re-export it with LeRobot")


def store_tokenizer(directory: Path, reference: str) -> None:
    """Write the tokenizer's place into a directory's policy_preprocessor.json."""
    content = read_json(directory / PREPROCESSOR_FILE)
    for step in content["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = reference
    write_json(directory / PREPROCESSOR_FILE, content)


HARMLESS = (
    "optimizer", "scheduler", "lr_", "learning_rate", "train_", "freeze_", "dropout", "gradient", "compile", "device",
    "push_to", "repo", "private", "license", "tags", "log_", "save_", "eval_", "seed", "version", "description",
)  # fmt: skip
"""Beginnings of fields that say how a policy is trained, kept or named, not what it computes."""


def read_policy_config(directory: Path, device: str) -> PreTrainedConfig:
    """The config.json of a directory as LeRobot's own class, for ``device``.

    A field that this LeRobot does not know is left out and said, if it is empty or of no consequence for what the
    policy computes.

    Raises:
        PolicyDirectoryError: it cannot be read, or has an unknown field of consequence.
    """
    from dataclasses import fields
    from tempfile import TemporaryDirectory

    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import factory  # noqa: F401 - registers the types

    file, content = directory / CONFIG_FILE, read_json(directory / CONFIG_FILE)
    kinds = PreTrainedConfig.get_known_choices()
    if content.get("type") not in kinds:
        raise PolicyDirectoryError(f"{file} is of type {content.get('type')!r}, not one of {', '.join(sorted(kinds))}")
    outputs = content.get("output_features")
    if not isinstance(outputs, dict) or ACTION not in outputs:  # LeRobot would take the padded width for it
        raise PolicyDirectoryError(f"{file} has no {ACTION} in output_features: restore it from the policy's export")
    known = {field.name for field in fields(kinds[content["type"]])} | {"type"}
    unknown = {name: value for name, value in content.items() if name not in known}
    grave = {name: value for name, value in unknown.items() if value and not name.startswith(HARMLESS)}
    if grave:
        raise PolicyDirectoryError(
            f"{file} has {', '.join(f'{name}={value!r}' for name, value in sorted(grave.items()))}, which this LeRobot "
            "does not know and which may change what the policy computes: update LeRobot, or remove the field if not"
        )
    if unknown:
        print(f"{CONFIG_FILE}: {', '.join(sorted(unknown))} is unknown to this LeRobot, of no consequence: ignored")
    with TemporaryDirectory() as folder, reading(directory):
        write_json(Path(folder) / CONFIG_FILE, {name: content[name] for name in content if name in known})
        return PreTrainedConfig.from_pretrained(folder, cli_overrides=[f"--device={device}"])


def load_processors(
    directory: Path, config: PreTrainedConfig, tokenizer: str, remedy: str
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Pre- and postprocessor of a directory, with its batches on ``config.device``.

    Raises:
        PolicyDirectoryError: the tokenizer cannot be had; the message ends with ``remedy``.
    """
    from lerobot.policies.factory import make_pre_post_processors

    overrides = {"device_processor": {"device": config.device}, "tokenizer_processor": {"tokenizer_name": tokenizer}}
    try:
        with no_remote_code():
            processors = make_pre_post_processors(
                config, pretrained_path=str(directory), preprocessor_overrides=overrides
            )
    except Exception as error:  # a damaged file shows itself in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PolicyDirectoryError(
            f"the processors of {directory} with the tokenizer {tokenizer!r} could not be loaded ({reason}). {remedy}"
        ) from error
    for pipeline in processors:
        _require_statistics(directory, pipeline)
    return processors


def _require_statistics(directory: Path, pipeline: PolicyProcessorPipeline) -> None:
    """Raise PolicyDirectoryError for a normaliser without statistics of what it normalises: LeRobot would pass the raw
    values on."""
    from lerobot.processor.normalize_processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    for step in pipeline.steps:
        if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
            keys = [ACTION] if isinstance(step, UnnormalizerProcessorStep) else [OBS_STATE]
            known = step.state_dict()
            for key in keys:
                mode = step.norm_map.get(step.features[key].type) if key in step.features else None
                missing = [
                    f"{key}.{name}"
                    for name in STATISTICS.get(mode.name if mode else "", ())
                    if f"{key}.{name}" not in known
                ]
                if missing:
                    raise PolicyDirectoryError(
                        f"the processors of {directory} hold no {', '.join(missing)}: LeRobot would leave joints and "
                        "actions as they are. Fine-tune the policy on SO-101 data first (lerobot-train writes them)"
                    )
                if mode and mode.name in STATISTICS:
                    _require_spread(directory, key, mode.name, known)


def _require_spread(directory: Path, key: str, mode: str, known: Mapping[str, Tensor]) -> None:
    """Raise PolicyDirectoryError for statistics that are not finite or have no spread: joints would become nonsense."""
    import torch

    low, high = (known[f"{key}.{name}"] for name in STATISTICS[mode])
    spread = high if mode == "MEAN_STD" else high - low
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (spread > 0)).all()):
        raise PolicyDirectoryError(
            f"the processors of {directory} hold unusable {key}.{STATISTICS[mode][-1]} ({spread.tolist()}): every "
            "joint needs a finite spread above 0. Use data in which each joint moves, or restore the file"
        )


def save_policy(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    directory: Path,
) -> None:
    """Write the stock files of a policy directory; a reference to the place it was loaded from is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(directory)
    preprocessor.save_pretrained(directory, config_filename=PREPROCESSOR_FILE)
    postprocessor.save_pretrained(directory, config_filename=POSTPROCESSOR_FILE)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600, and a shared installation is read by others
    config = read_json(directory / CONFIG_FILE)
    write_json(directory / CONFIG_FILE, config | {"pretrained_path": None})
