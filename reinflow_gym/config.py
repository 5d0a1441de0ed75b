"""Which Gymnasium task is played. Free of gymnasium, so that a wrong setting is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from reinflow import ConfigError
from reinflow.settings import Range, check_ranges, config_from_json, config_to_json


@dataclass(frozen=True)
class GymConfig:
    """A Gymnasium environment. Raises ConfigError where a field cannot be; whether there is such an environment shows
    when it is made."""

    env_id: str
    """Gymnasium's name of it, such as Hopper-v5; "module:Name-v0" imports the module that registers it."""
    max_steps_per_episode: Annotated[int, Range(1, 100_000)] = 1_000
    """Time limit in control steps; it replaces the environment's own."""

    def __post_init__(self) -> None:
        if not self.env_id.strip():
            raise ConfigError("env_id is empty: name a Gymnasium environment such as Hopper-v5")
        check_ranges(self)

    def to_json(self) -> dict[str, Any]:
        """JSON-able dict of all fields."""
        return config_to_json(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "reinflow.json") -> Self:
        """Inverse of ``to_json``; raises ConfigError, naming ``where``, for fields that it does not know or lacks."""
        return config_from_json(data, cls, where)
