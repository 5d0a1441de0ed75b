"""Full training state on disk: atomic, strict, and readable without running anyone's code.

    <run>/checkpoints/000040/pretrained_model/           written by the policy: a stock policy directory
                            /training_state/state.json   counters, schedules, RNG, optimisers, environments
                                           /arrays.safetensors    arrays that state.json refers to
                                           /<group>.safetensors   one file per named tensor group
    <run>/checkpoints/last -> 000040     relative links, so that a run directory can be moved
                      best -> 000020

Only safetensors and JSON are written, never pickle. A checkpoint appears under its number complete and flushed to
disk, or not at all. Loading is strict: whatever is missing or unexpected is a CheckpointError that names it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinflow import UserError

FORMAT = 1
CHECKPOINTS, PRETRAINED, TRAINING = "checkpoints", "pretrained_model", "training_state"
LAST, BEST = "last", "best"
_STATE_FILE, _ARRAYS = "state.json", "arrays"
_TEMPORARY = ".tmp-"
# Keys that mark packed values in JSON; a plain dict must not use them.
_ARRAY, _TUPLE, _ITEMS = "__array__", "__tuple__", "__items__"

TensorGroups = dict[str, dict[str, Tensor]]


class CheckpointError(UserError, RuntimeError):
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
            raise CheckpointError(f"training state refers to the array {key!r}, which is not in {_ARRAYS}.safetensors")
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


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a module's whole state_dict: same keys, shapes and dtypes, or a CheckpointError and nothing is changed."""
    own = module.state_dict()
    check_keys(tensors, own, what)
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{what}: {name} is {tensor.dtype} {tuple(tensor.shape)} in the checkpoint and {own[name].dtype} "
                f"{tuple(own[name].shape)} in the model"
            )
    module.load_state_dict(dict(tensors), strict=True)


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
    own_shapes = getattr(optimizer, "state_shapes", None)  # an optimizer whose state is not shaped like its parameters
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in state["state"].get(index, {}).items():
            own_shape = own_shapes(parameter)[name] if own_shapes else tuple(parameter.shape)
            if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) != own_shape:
                saved_shape = tuple(value.shape)
                raise CheckpointError(f"{what}: {name} of parameter {index} is {saved_shape}, not {own_shape}")
    optimizer.load_state_dict(dict(state))


# ---------------------------------------------------------------- writing


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    write_policy: Callable[[Path], None],
    tensors: TensorGroups,
    state: Mapping[str, Any],
) -> Path:
    """Write ``<run_dir>/checkpoints/<step:06d>`` and point ``last`` at it.

    Everything is built in a temporary directory beside, flushed to disk and renamed; an exception or a power cut on
    the way leaves the previous checkpoint and links as they were. Saving a step again replaces it just as safely.

    Args:
        run_dir: the run's directory.
        step: iterations completed; names the directory.
        write_policy: writes the policy into the (existing, empty) directory it is given.
        tensors: named groups of named tensors, e.g. ``{"critic": critic.state_dict()}``.
        state: any tree that pack_tree accepts: optimizer state_dicts, rng_state(), counters, environment states.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: something in ``state`` or ``tensors`` cannot be stored.
    """
    root = Path(run_dir) / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_TEMPORARY}*"):  # of a process that was killed while saving
        if not _is_linked(root, stale):
            shutil.rmtree(stale)
    final, temporary = root / f"{step:06d}", root / f"{_TEMPORARY}{step:06d}"
    try:
        (temporary / PRETRAINED).mkdir(parents=True)
        write_policy(temporary / PRETRAINED)
        _write_training_state(temporary / TRAINING, step, tensors, state)
        _sync_tree(temporary)
        _publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _link(root, LAST, final.name)
    return final


def mark_best(run_dir: Path | str, step: int) -> None:
    """Point ``best`` at a checkpoint.

    Raises:
        CheckpointError: there is no checkpoint of that step.
    """
    root = Path(run_dir) / CHECKPOINTS
    name = f"{step:06d}"
    if not (root / name).is_dir():
        raise CheckpointError(f"cannot mark step {step} as best: {root / name} does not exist; save it first")
    _link(root, BEST, name)


def prune_checkpoints(run_dir: Path | str, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints; never what ``last`` or ``best`` point to.

    Returns:
        The removed directories.

    Raises:
        ValueError: keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    root = Path(run_dir) / CHECKPOINTS
    removed = []
    for checkpoint in list_checkpoints(run_dir)[:-keep]:
        if _is_linked(root, checkpoint):
            continue
        doomed = root / f"{_TEMPORARY}{checkpoint.name}"
        os.replace(checkpoint, doomed)  # first, so that a half-removed directory never looks like a checkpoint
        shutil.rmtree(doomed)
        removed.append(checkpoint)
    return removed


def _write_training_state(directory: Path, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> None:
    if _ARRAYS in tensors:
        raise CheckpointError(f"a tensor group must not be called {_ARRAYS!r}: the name is taken")
    arrays, packed = pack_tree(dict(state))
    groups = {**tensors, _ARRAYS: arrays}
    directory.mkdir()
    for name, group in groups.items():
        _save_tensors(directory / f"{name}.safetensors", group)
    content = {
        "format": FORMAT,
        "step": step,
        "groups": {name: sorted(group) for name, group in groups.items()},
        "state": packed,
    }
    (directory / _STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _save_tensors(path: Path, group: Mapping[str, Tensor]) -> None:
    # clone(): safetensors refuses tensors that share memory, and views (tied weights, slices) do.
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in group.items()}
    try:
        save_file(own, path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot write {path.name}: {error}") from error


def _sync_tree(directory: Path) -> None:
    """fsync every file and directory below: after the rename, a power cut must not leave empty files."""
    for path in [*directory.rglob("*"), directory]:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path) -> None:
    """Rename temporary to final; an existing final is replaced without a moment in which a link leads nowhere.

    While final is away, its links lead to a copy (hard links, so it costs no space). A copy that is there already
    stems from a process that was killed right here; links may still need it.
    """
    root = final.parent
    copy = root / f"{_TEMPORARY}replaced-{final.name}"
    links = [name for name in (LAST, BEST) if _target(root, name) in (final.name, copy.name)]
    if final.exists() and not copy.exists():
        shutil.copytree(final, copy, copy_function=os.link, symlinks=True)
    if final.exists():
        for name in links:
            _link(root, name, copy.name)
        shutil.rmtree(final)
    os.replace(temporary, final)
    for name in links:
        _link(root, name, final.name)
    if copy.exists():
        shutil.rmtree(copy)
    _sync(root)


def _link(root: Path, name: str, target: str) -> None:
    """Atomically point root/name at its sibling ``target``."""
    temporary = root / f"{name}.new"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, root / name)
    _sync(root)


def _target(root: Path, name: str) -> str | None:
    return os.readlink(root / name) if (root / name).is_symlink() else None


def _is_linked(root: Path, checkpoint: Path) -> bool:
    return checkpoint.name in (_target(root, LAST), _target(root, BEST))


# ---------------------------------------------------------------- reading


def list_checkpoints(run_dir: Path | str) -> list[Path]:
    """The run's checkpoint directories, oldest first."""
    root = Path(run_dir) / CHECKPOINTS
    numbered = [path for path in root.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name))


def resolve_checkpoint(path: Path | str, which: Literal["last", "best"] = "last") -> Path:
    """Directory of a checkpoint, links resolved.

    Args:
        path: a run directory, a checkpoint directory (or a link to one), or its pretrained_model directory.
        which: the link to follow in a run directory.

    Raises:
        CheckpointError: nothing there is a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.resolve().name == PRETRAINED and (path.resolve().parent / TRAINING).is_dir():
        return path.resolve().parent
    if (path / TRAINING).is_dir():
        return path.resolve()
    link = path / CHECKPOINTS / which
    if (link / TRAINING).is_dir():
        return link.resolve()
    present = ", ".join(checkpoint.name for checkpoint in list_checkpoints(path)) or "none"
    raise CheckpointError(
        f"no checkpoint in {path}: give a run directory with {CHECKPOINTS}/{which}, a checkpoint directory, or its "
        f"{PRETRAINED} directory (numbered checkpoints found: {present})"
    )


def checkpoint_step(checkpoint: Path | str) -> int:
    """The step that a checkpoint directory was saved at."""
    return int(_read_state(Path(checkpoint) / TRAINING)["step"])


def load_training_state(checkpoint: Path | str) -> tuple[TensorGroups, dict[str, Any]]:
    """Read back the ``(tensors, state)`` of save_checkpoint, on the CPU.

    Args:
        checkpoint: anything that resolve_checkpoint accepts.

    Raises:
        CheckpointError: a file is missing, unexpected or damaged, or its tensors are not those it was written with.
    """
    directory = resolve_checkpoint(checkpoint) / TRAINING
    content = _read_state(directory)
    files = {path.stem for path in directory.glob("*.safetensors")}
    check_keys(files, content["groups"], f"tensor files in {directory}")
    groups: TensorGroups = {}
    for name, keys in content["groups"].items():
        path = directory / f"{name}.safetensors"
        try:
            groups[name] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): take an earlier checkpoint") from error
        check_keys(groups[name], keys, str(path))
    arrays = groups.pop(_ARRAYS)
    return groups, unpack_tree(arrays, content["state"])


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / _STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): take an earlier checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}")
    check_keys(content, ("format", "step", "groups", "state"), str(path))
    return content
