"""One flat config, many rooms: ranges that stand in a field's annotation, settings classes cut out of it, its JSON.

    policy_lr: Annotated[float, POSITIVE] = 3e-6

Free of torch, so that a wrong flag is refused at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from reinflow import ConfigError, UserError
from reinflow.checksums import check_with_sum

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG_FILE = "config.json"  # of a run


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have, between two bounds. NaN and infinity lie in none."""

    low: float
    high: float
    low_included: bool = True
    or_zero: bool = False  # which leaves it to something else

    def holds(self, value: float) -> bool:
        """Whether ``value`` is one of them."""
        above = value >= self.low if self.low_included else value > self.low
        return (above and value <= self.high) or (self.or_zero and value == 0)

    def __str__(self) -> str:
        if not self.low_included and self.low == 0:
            return f"be positive and at most {self.high:,.12g}"
        if self.or_zero:
            return f"be 0, or at least {self.low:,.12g} and at most {self.high:,.12g}"
        low = "not be negative and be" if self.low == 0 else f"be at least {self.low:,.12g} and"
        return f"{low} at most {self.high:,.12g}"


LARGE = 1e9  # no setting of this project is larger; what is, is a slip of the keyboard
POSITIVE = Range(0, LARGE, low_included=False)
NOT_NEGATIVE = Range(0, LARGE)
FRACTION = Range(0, 1)
SEED = Range(0, 2**32 - 1)
RATE = Range(0, 10, low_included=False)  # of learning


@cache
def _ranges(kind: type) -> dict[str, Range]:
    hints = get_type_hints(kind, include_extras=True)
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: note for name, all_ in notes.items() for note in all_ if isinstance(note, Range)}


def out_of_range(config: DataclassInstance) -> Iterator[str]:
    """A line for every field of ``config`` that lies outside the Range in its annotation."""
    for name, allowed in _ranges(type(config)).items():
        value = getattr(config, name)
        if not allowed.holds(value):
            yield f"{name} must {allowed}, got {value}"


def check_ranges(config: DataclassInstance, error: type[UserError] = ConfigError) -> None:
    """Raise one error that lists every field of ``config`` outside its Range."""
    if problems := list(out_of_range(config)):
        raise error("; ".join(problems))


def cut[S](config: DataclassInstance, settings: type[S], **given: Any) -> S:
    """An instance of the dataclass ``settings``: its fields by name from ``config``, or as ``given``."""
    names = {f.name for f in dataclasses.fields(config)}
    wanted = {f.name for f in dataclasses.fields(settings)} & names - given.keys()  # type: ignore[arg-type]
    return settings(**{name: getattr(config, name) for name in wanted}, **given)


def config_to_json(config: DataclassInstance) -> dict[str, Any]:
    """JSON-able dict of all fields."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json[S](data: Mapping[str, Any], config_type: type[S], where: str = CONFIG_FILE) -> S:
    """Inverse of ``config_to_json``.

    Raises:
        ConfigError: fields are missing or unknown, or a value is of another type than its field.
    """
    names, hints = {f.name for f in dataclasses.fields(config_type)}, get_type_hints(config_type)  # type: ignore[arg-type]
    if data.keys() != names:
        raise ConfigError(
            f"{where} was written by another version: missing {sorted(names - data.keys())}, "
            f"unknown {sorted(data.keys() - names)}"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, value in values.items():
        if not is_of(value, hints[name]):
            raise ConfigError(f"{where}: {name} is {value!r}, which is no {type_name(hints[name])}: mend or remove it")
    return config_type(**values)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value (lists as tuples) is what an annotation says."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in arguments
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(is_of(v, k) for v, k in zip(value, kinds, strict=True))
    if kind in (Union, UnionType):
        return any(is_of(value, option) for option in arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings in a run's config.json, as they were written.

    Raises:
        ConfigError: there is none, or it holds no settings.
        DamagedFileError: it was changed since.
    """
    path = run_dir / CONFIG_FILE
    try:
        check_with_sum(path, f"put it back, or give changes as flags. To keep it so remove .{path.name}.checksums.json")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"{path} cannot be read ({error}): put it back, or start a new run") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: put it back, or start a new run")
    return content


def holds_run(run_dir: Path) -> bool:
    """Whether there is something to resume: a directory is a run if and only if it holds a complete checkpoint."""
    return any((run_dir / "checkpoints").glob("[0-9]*/training_state/state.json"))


def refuse_existing_run(run_dir: Path) -> None:
    """Raise ConfigError if a run is there; what never came to a checkpoint may be started again."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"output_dir={run_dir} is a file: choose a directory")
    if holds_run(run_dir):
        raise ConfigError(f"output_dir={run_dir} holds a run already: add --resume, or choose another directory")


def check_same_settings(given: Mapping[str, Any], stored: Mapping[str, Any], changeable: Collection[str]) -> None:
    """Raise ConfigError that lists the settings that differ from a run's own, those beside ``changeable``."""
    names = (stored.keys() & given.keys()) - set(changeable)  # an older version may lack some
    changed = [name for name in sorted(names) if given.get(name) != stored.get(name)]
    if changed and stored:
        raise ConfigError(
            "a resumed run keeps its settings; these differ from config.json: "
            + ", ".join(f"{name} ({stored.get(name)} -> {given.get(name)})" for name in changed)
            + ". Leave them out, or start a new run from the checkpoint's pretrained_model"
        )
