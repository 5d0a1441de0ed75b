"""Whether a policy directory is sound: sizes, names, shapes and types, before a model of that size is built."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow import UserError
from reinflow.checksums import check_sums

if TYPE_CHECKING:
    from torch import Tensor


class PolicyDirectoryError(UserError, RuntimeError):
    """A policy directory cannot be read or written; the message names the file and the remedy."""


REMEDY = "take another copy or export of the policy"
LARGEST_INT, LARGEST = 2**24, {  # of any whole number in a configuration, and of some by the end of their names
    "layers": 256, "depth": 256, "heads": 1_024, "chunk_size": 1_000, "action_steps": 1_000, "num_steps": 1_000,
    "inference_steps": 1_000, "tokenizer_max_length": 4_096, "with_padding": 4_096, "image_resolution": 4_096,
    "empty_cameras": 16, "image_size": 4_096, "longest_edge": 16_384,
}  # fmt: skip


def check_sound(directory: Path, configurations: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse a directory that was damaged since we wrote it, or whose configurations ask for absurd sizes.

    Args:
        directory: of a policy.
        configurations: file -> content of those that say how large the model is.

    Raises:
        DamagedFileError: it does not fit its checksums.
        PolicyDirectoryError: a number is out of all bounds.
    """
    check_sums(directory, f"{REMEDY} (after a change on purpose remove checksums.json)")
    for file, content in configurations.items():
        for path, value in _numbers(content):
            largest = next((most for end, most in LARGEST.items() if path.split(".")[0].endswith(end)), LARGEST_INT)
            if abs(value) > largest if isinstance(value, int) else not math.isfinite(value):
                raise PolicyDirectoryError(f"{file} has {path}={value}, which no policy has: {REMEDY}")


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a JSON tree by the name they stand under, items of lists with their index behind it."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _numbers(value, name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _numbers(value, f"{path.split('.', maxsplit=1)[0]}.{index}")
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield path, node


LONGEST_TOKEN = 512  # characters; a tokenizer takes minutes over a special token of tens of thousands


def check_tokens(folder: Path) -> None:
    """Raise PolicyDirectoryError for a tokenizer's folder whose special tokens are absurdly long."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # whoever needs the file says what is wrong with it
        special = content.get("added_tokens") if isinstance(content, dict) and name == "tokenizer.json" else content
        if any(len(text) > LONGEST_TOKEN for text in _texts(special)):
            raise PolicyDirectoryError(f"{folder / name} has a special token of over {LONGEST_TOKEN} letters: {REMEDY}")


def _texts(node: Any, name: str = "") -> Iterator[str]:
    """Strings of a JSON tree, keys included; a chat template is no token."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from _texts(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, name)
    elif isinstance(node, str) and name != "chat_template":
        yield node


def stored_tensors(file: Path) -> dict[str, Tensor]:
    """Names, shapes and types in a safetensors file, as tensors without content.

    Raises:
        PolicyDirectoryError: it cannot be read, or holds numbers that are no weights.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    try:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                entry = content.get_slice(name)
                kind = entry.get_dtype()
                if kind not in types:
                    raise PolicyDirectoryError(f"{file}: {name} is of type {kind}, weights are {', '.join(types)}")
                found[name] = torch.empty(entry.get_shape(), dtype=types[kind], device="meta")
    except (SafetensorError, OSError) as error:
        raise PolicyDirectoryError(f"{file} cannot be read ({error}): {REMEDY}") from error
    return found


def check_tensors(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise PolicyDirectoryError unless a file's tensors have the names and shapes of the model's."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [name for name in sorted(expected.keys() & found.keys()) if expected[name].shape != found[name].shape]
    problems = [
        f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", other))
        if names
    ]
    if problems:
        raise PolicyDirectoryError(
            f"{file} does not fit config.json beside it: {'; '.join(problems)}. Take both from one export"
        )


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Within it whatever LeRobot or transformers raise means: this directory cannot be read."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file shows itself in any way
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        raise PolicyDirectoryError(
            f"{directory} cannot be read by LeRobot ({type(error).__name__}: {reason}): {REMEDY}"
        ) from error
