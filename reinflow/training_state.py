"""Training state in memory <-> tensors and JSON: trees of arrays, random generators, optimisers, strict loading."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reinflow import UserError
from reinflow.natural import NaturalGradient

ARRAYS = "arrays"  # the tensor group that state.json refers to
# Keys that mark packed values in JSON; a plain dict must not use them.
_ARRAY, _TUPLE, _ITEMS = "__array__", "__tuple__", "__items__"


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be written, found or trusted; the message names the file or key and the remedy."""


# ---------------------------------------------------------------- trees of arrays <-> tensors + JSON


def pack_tree(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into tensors and a JSON-able rest that refers to them.

    Torch tensors, numpy arrays and numpy scalars become named tensors; int dict keys (as in optimizer states) and
    tuples survive. ``unpack_tree`` restores every leaf with its type, dtype and bits.

    Raises:
        CheckpointError: a leaf is neither a JSON scalar nor a numeric array; names its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(tree, "state", tensors)


def _pack(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if node is None or type(node) in (bool, int, float, str):
        return node
    if isinstance(node, Tensor):
        tensors[path] = node.detach()
        return {_ARRAY: "torch", "key": path}
    if isinstance(node, np.ndarray | np.generic):
        try:
            tensors[path] = torch.from_numpy(np.array(node))
        except TypeError as error:
            raise CheckpointError(f"cannot store {path}: numpy dtype {node.dtype} is not numeric") from error
        return {_ARRAY: "numpy" if isinstance(node, np.ndarray) else "scalar", "key": path}
    if isinstance(node, list):
        return [_pack(value, f"{path}.{i}", tensors) for i, value in enumerate(node)]
    if isinstance(node, tuple):
        return {_TUPLE: [_pack(value, f"{path}.{i}", tensors) for i, value in enumerate(node)]}
    if isinstance(node, Mapping):
        packed = [(key, _pack(value, f"{path}.{key}", tensors)) for key, value in node.items()]
        if all(isinstance(key, str) and key not in (_ARRAY, _TUPLE, _ITEMS) for key, _ in packed):
            return dict(packed)
        if all(type(key) in (str, int) for key, _ in packed):
            return {_ITEMS: [[key, value] for key, value in packed]}
        raise CheckpointError(f"cannot store {path}: dict keys must be str or int, got {list(node)[:5]}")
    raise CheckpointError(
        f"cannot store {path}: {type(node).__name__} is neither a JSON value nor an array; convert it before saving"
    )


def unpack_tree(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """Inverse of pack_tree.

    Raises:
        CheckpointError: a tensor that the JSON refers to is missing, or one is left over.
    """
    used: set[str] = set()
    tree = _unpack(packed, tensors, used)
    check_keys(tensors, used, "arrays of the training state")
    return tree


def _unpack(node: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if isinstance(node, list):
        return [_unpack(value, tensors, used) for value in node]
    if not isinstance(node, dict):
        return node
    if _ARRAY in node:
        key = node["key"]
        used.add(key)
        if key not in tensors:
            raise CheckpointError(f"training state refers to the array {key!r}, which is not in {ARRAYS}.safetensors")
        if node[_ARRAY] == "torch":
            return tensors[key]
        array = tensors[key].numpy()
        return array if node[_ARRAY] == "numpy" else array[()]
    if _TUPLE in node:
        return tuple(_unpack(value, tensors, used) for value in node[_TUPLE])
    if _ITEMS in node:
        return {key: _unpack(value, tensors, used) for key, value in node[_ITEMS]}
    return {key: _unpack(value, tensors, used) for key, value in node.items()}


# ---------------------------------------------------------------- random number generators


def rng_state() -> dict[str, Any]:
    """State of torch's (CPU, and CUDA or MPS where in use), numpy's and Python's global generators, for the state."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one is meant)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (str(name), np.asarray(keys), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what rng_state returned.

    Generators of accelerators that this machine has not got (or has in another number) cannot be restored; that is
    a warning, as a run may go on elsewhere, but it then is not bitwise the same.

    Raises:
        CheckpointError: a generator's state is missing.
    """
    missing = {"torch", "cuda", "numpy", "python"} - set(state)
    if missing:
        raise CheckpointError(f"RNG state lacks {sorted(missing)}")
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state["cuda"] and len(state["cuda"]) == devices:
        torch.cuda.set_rng_state_all(state["cuda"])
    elif state["cuda"]:
        warnings.warn(
            f"the checkpoint holds {len(state['cuda'])} CUDA generators, this machine has {devices} CUDA devices: "
            "they start afresh and the run will not be bitwise the same",
            stacklevel=2,
        )
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ---------------------------------------------------------------- strict loading into live objects


def check_keys(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raise a CheckpointError that names every missing and unexpected key."""
    found, expected = set(found), set(expected)
    problems = []
    if expected - found:
        problems.append(f"missing {_shorten(expected - found)}")
    if found - expected:
        problems.append(f"unexpected {_shorten(found - expected)}")
    if problems:
        raise CheckpointError(
            f"{what}: {'; '.join(problems)}. The checkpoint was written with another model or configuration: resume "
            "with the one that its config.json names"
        )


def _shorten(keys: set[str], limit: int = 8) -> str:
    listed = ", ".join(sorted(keys)[:limit])
    return listed if len(keys) <= limit else f"{listed} and {len(keys) - limit} more"


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], what: str) -> None:
    """Load an optimizer's state_dict after checking that it belongs to the same parameters.

    Torch matches parameters by position alone, so their number per group, their names (for an optimizer built from
    named parameters) and the shapes of their moments are compared first.

    Raises:
        CheckpointError: they differ.
    """
    check_keys(state, ("state", "param_groups"), what)
    own, saved = optimizer.state_dict()["param_groups"], state["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (own, saved))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"{what}: parameter groups of {saved_sizes} parameters in the checkpoint, {sizes} in the model; "
            "were the train_* flags the same?"
        )
    for group, saved_group in zip(own, saved, strict=True):
        if "param_names" in group and "param_names" in saved_group:
            check_keys(saved_group["param_names"], group["param_names"], what)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved for index in group["params"]]
    own_shapes = optimizer.state_shapes if isinstance(optimizer, NaturalGradient) else None
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in state["state"].get(index, {}).items():
            own_shape = own_shapes(parameter)[name] if own_shapes else tuple(parameter.shape)
            if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != own_shape:
                saved_shape = tuple(value.shape)
                raise CheckpointError(f"{what}: {name} of parameter {index} is {saved_shape}, not {own_shape}")
    optimizer.load_state_dict(dict(state))


def strict_load(target: dict[str, Tensor], source: dict[str, Tensor], what: str, any_dtype: bool = False) -> None:
    """Copy ``source`` into ``target`` in place; nothing is changed if they do not fit.

    Raises:
        CheckpointError: names, shapes or (unless ``any_dtype``) dtypes differ; all of them are listed.
    """
    shared = sorted(target.keys() & source.keys())
    missing, unexpected = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    misshapen = [name for name in shared if target[name].shape != source[name].shape]
    retyped = [name for name in shared if target[name].dtype != source[name].dtype and not any_dtype]
    if missing or unexpected or misshapen or retyped:
        raise CheckpointError(
            f"{what} does not fit this policy: missing {missing[:8]}, unexpected {unexpected[:8]}, "
            f"other shape {misshapen[:8]}, other dtype {retyped[:8]}. Use the settings the checkpoint was written with."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise a CheckpointError that names the tensors of ``what`` with a NaN or an infinity in them."""
    bad = {name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())}
    if bad:
        raise CheckpointError(f"{what} is damaged: NaN or infinity in {_shorten(bad)}. Take another copy or checkpoint")
