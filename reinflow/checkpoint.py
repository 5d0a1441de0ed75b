"""Full training state on disk: atomic, strict, and readable without running anyone's code.

    <run>/checkpoints/000040/pretrained_model/           written by the policy: a stock policy directory
                            /training_state/state.json   counters, schedules, RNG, optimisers, environments
                                           /arrays.safetensors    arrays that state.json refers to
                                           /<group>.safetensors   one file per named tensor group
                            /*/checksums.json            of what lies beside it, compared at every loading
    <run>/checkpoints/last -> 000040     relative links, so that a run directory can be moved
                      best -> 000020

Only safetensors and JSON are written, never pickle. A checkpoint appears under its number complete and flushed to
disk, or not at all. Loading is strict: whatever is missing or unexpected is a CheckpointError that names it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reinflow.checksums import DamagedFileError, check_sums, write_sums
from reinflow.training_state import (
    ARRAYS,
    CheckpointError,
    check_keys,
    pack_tree,
    refuse_not_finite,
    unpack_tree,
)

FORMAT = 2  # 1 kept generators where 2 keeps which episodes are being played; both are read
CHECKPOINTS, PRETRAINED, TRAINING = "checkpoints", "pretrained_model", "training_state"
LAST, BEST = "last", "best"
_STATE_FILE = "state.json"
_TEMPORARY = ".tmp-"

TensorGroups = dict[str, dict[str, Tensor]]


# ---------------------------------------------------------------- writing


def save_checkpoint(
    run_dir: Path | str,
    step: int,
    write_policy: Callable[[Path], None],
    tensors: TensorGroups,
    state: Mapping[str, Any],
    make_root: bool = True,
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

        make_root: make ``checkpoints/`` first; without it a run's directory that vanished does not come back empty.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: something in ``state`` or ``tensors`` cannot be stored, or the disk is full.
    """
    root = Path(run_dir) / CHECKPOINTS
    if make_root:
        root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_TEMPORARY}*"):  # of a process that was killed while saving
        if not _is_linked(root, stale):
            shutil.rmtree(stale)
    final, temporary = root / f"{step:06d}", root / f"{_TEMPORARY}{step:06d}"
    place = root.stat().st_ino
    try:
        temporary.mkdir()
        (temporary / PRETRAINED).mkdir()
        write_policy(temporary / PRETRAINED)
        write_sums(temporary / PRETRAINED)
        _write_training_state(temporary / TRAINING, step, tensors, state)
        write_sums(temporary / TRAINING)
        _sync_tree(temporary)
        if root.stat().st_ino != place:  # moved away while it was written to, and made again by a writer
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root))
        _publish(temporary, final)
    except SafetensorError as error:  # its own type for a full disk
        raise CheckpointError(
            f"{final} could not be written ({error}): make room; --resume goes on from before"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for remains in (root, root.parent) if not final.exists() else ():
            with contextlib.suppress(OSError):
                remains.rmdir()  # if nothing is in it
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


def point_last_at(run_dir: Path | str, step: int) -> None:
    """Point ``last`` at the checkpoint of ``step``, and drop ``best`` if it came later."""
    root = Path(run_dir) / CHECKPOINTS
    best = _target(root, BEST)
    if best is not None and int(best) > step:
        (root / BEST).unlink()
    _link(root, LAST, f"{step:06d}")


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
    if ARRAYS in tensors:
        raise CheckpointError(f"a tensor group must not be called {ARRAYS!r}: the name is taken")
    arrays, packed = pack_tree(dict(state))
    groups = {**tensors, ARRAYS: arrays}
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
        which: in a run directory, its newest checkpoint or the one that is linked as the best.

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
    if which == LAST and (published := list_checkpoints(path)):
        return published[-1].resolve()  # a process may have been killed before it could link it
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
    try:
        loaded = _load_training_state(directory)
    except CheckpointError:
        raise
    except Exception:
        _refuse_damage(directory)  # which explains it, if there is any
        raise
    _refuse_damage(directory)
    return loaded


def _refuse_damage(directory: Path) -> None:
    try:
        check_sums(directory, "take an earlier checkpoint")
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error


def _load_training_state(directory: Path) -> tuple[TensorGroups, dict[str, Any]]:
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
    arrays = groups.pop(ARRAYS)
    for name, group in groups.items():
        refuse_not_finite(group.items(), f"{name}.safetensors in {directory}")
    return groups, unpack_tree(arrays, content["state"])


def stored_value(checkpoint: Path | str, name: str) -> Any:
    """A plain value of the state, without its arrays; None if it holds none of that name."""
    return _read_state(resolve_checkpoint(checkpoint) / TRAINING)["state"].get(name)


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / _STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): take an earlier checkpoint") from error
    if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
        found = content.get("format") if isinstance(content, dict) else None
        raise CheckpointError(
            f"{path} has format {found}, this version reads {FORMAT}: start a new run from the {PRETRAINED} beside it"
        )
    check_keys(content, ("format", "step", "groups", "state"), str(path))
    kinds = {"step": int, "groups": dict, "state": dict}
    if wrong := [name for name, kind in kinds.items() if type(content[name]) is not kind]:
        raise CheckpointError(f"{path} is damaged in {', '.join(wrong)}: take an earlier checkpoint")
    return content
