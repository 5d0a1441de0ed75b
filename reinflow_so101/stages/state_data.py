"""Data sets of states, actions and rewards, for the state-based stages: a LeRobotDataset, written and read by columns.

Columns: `observation.environment_state` (S,), `action` (A,), `next.reward` (1,), `next.done` (1,) and `next.truncated`
(1,). `next.done` is the environment's own end (a fall, a lift) and `next.truncated` the time limit, never merged. A
time-limited episode has its mark in its last frame. An episode that ends by itself has it from its last control step
on: what follows in the same episode (reward 0, still marked) is what the demonstrator would have gone on to do, so that
the last chunk of actions is complete, though the environment never ran it.

`read_state_dataset("minari:mujoco/hopper/medium-v0")` reads a Minari data set where that library is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import UserError
from reinflow.progress import tracked
from reinflow_so101.policy_card import CARD_FILE
from reinflow_so101.stages.demonstrations import quiet_lerobot
from reinflow_vla.directory import ACTION, read_json

if TYPE_CHECKING:
    import pyarrow as pa

STATE, REWARD, DONE, TRUNCATED = "observation.environment_state", "next.reward", "next.done", "next.truncated"
MINARI = "minari:"
REPO_ID = "local/states"  # in the metadata; nothing is uploaded

Array = NDArray[np.float32]


class StateDataError(UserError, RuntimeError):
    """The data set cannot be read, or cannot be learned from; the message holds the remedy."""


@dataclass
class StateEpisodes:
    """Episodes of any length; S entries of a state, A of an action."""

    states: list[Array]  # (L, S) before each control step
    actions: list[Array]  # (L, A) what was told, in the environment's units
    rewards: list[Array] | None  # (L,) of each control step; None where the data set has none
    terminated: list[bool]  # ended by itself; False: by its time limit
    ends: list[int] = field(default_factory=list)
    """Control steps until the episode was over, at most L: actions from there on were never run. Empty: all were."""

    def __post_init__(self) -> None:
        self.ends = self.ends or [len(action) for action in self.actions]

    @property
    def num_frames(self) -> int:
        """Control steps of all episodes."""
        return sum(len(action) for action in self.actions)

    @property
    def state_dim(self) -> int:
        """S."""
        return int(self.states[0].shape[1])

    @property
    def action_dim(self) -> int:
        """A."""
        return int(self.actions[0].shape[1])

    def returns(self) -> list[float]:
        """Undiscounted return of each episode. Raises StateDataError without rewards."""
        if self.rewards is None:
            raise StateDataError(f"the data has no {REWARD}: record it with rewards")
        return [float(rewards[:end].sum()) for rewards, end in zip(self.rewards, self.ends, strict=True)]


# --- Writing ----------------------------------------------------------------------------------------------------------


def end_columns(length: int, end: int, terminated: bool) -> dict[str, NDArray[np.bool_]]:
    """`next.done` and `next.truncated`, (length,) each, of an episode that was over after `end` control steps."""
    step = np.arange(length)
    return {DONE: terminated & (step >= end - 1), TRUNCATED: (not terminated) & (step == length - 1)}


def reward_features() -> dict[str, dict[str, Any]]:
    """LeRobot's description of the columns beside state and action."""
    flag = {"dtype": "bool", "shape": (1,), "names": None}
    return {REWARD: {"dtype": "float32", "shape": (1,), "names": None}, DONE: flag, TRUNCATED: dict(flag)}


def write_state_dataset(root: Path, episodes: StateEpisodes, fps: int, task: str, card: dict[str, Any]) -> None:
    """Write a LeRobotDataset v3, an episode at a time: LeRobot's check of every frame costs more than the data.

    Args:
        root: folder of the dataset; refused if it exists.
        episodes: with rewards or without.
        fps: control steps a second, a whole number.
        task: what the frames are told to do.
        card: reinflow.json, which says what environment it is from: {"env": {...}}; {} where nothing is known.

    Raises:
        StateDataError: the root exists, there is no episode, or it holds NaN or infinity.
    """
    if root.exists():
        raise StateDataError(f"{root} exists: choose another --output-dir or remove it first")
    if not episodes.actions or min(map(len, episodes.actions)) < 1:
        raise StateDataError(f"nothing to write to {root}: give one episode or more, each of one control step or more")
    _refuse_not_finite(str(root), episodes)
    quiet_lerobot()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, dict[str, Any]] = {
        STATE: {"dtype": "float32", "shape": (episodes.state_dim,), "names": None},
        ACTION: {"dtype": "float32", "shape": (episodes.action_dim,), "names": None},
    }
    rewarded = episodes.rewards is not None
    features |= reward_features() if rewarded else {}
    dataset = LeRobotDataset.create(REPO_ID, fps=fps, features=features, root=root, use_videos=False)
    try:
        pairs = list(zip(episodes.states, episodes.actions, strict=True))
        for number, (state, action) in enumerate(tracked(pairs, f"writing {root.name}, episodes")):
            columns: dict[str, NDArray[Any]] = {STATE: state.astype(np.float32), ACTION: action.astype(np.float32)}
            if episodes.rewards is not None:
                ends = end_columns(len(action), episodes.ends[number], episodes.terminated[number])
                columns |= {REWARD: episodes.rewards[number].astype(np.float32), **ends}
            _save(dataset, columns, number, fps, task)
    except BaseException:
        shutil.rmtree(root)  # nothing half-written stays
        raise
    dataset.finalize()
    if card:
        (root / "meta" / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _save(dataset: Any, columns: dict[str, NDArray[Any]], number: int, fps: int, task: str) -> None:
    """One episode, in the form of LeRobot's own buffer."""
    steps = np.arange(len(columns[ACTION]))
    rows = {name: column if column.ndim > 1 else column[:, None] for name, column in columns.items()}
    counters: dict[str, Any] = {"index": [], "task_index": [], "episode_index": number}
    frames = {"frame_index": steps, "timestamp": (steps / fps).astype(np.float32)}
    dataset.save_episode({"size": len(steps), "task": [task] * len(steps), **rows, **frames, **counters})


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_state_dataset(root: Path | str, rewards: bool = False) -> StateEpisodes:
    """Read the columns of a data set; images, if there are any, are not touched.

    Args:
        root: of a LeRobotDataset, or "minari:ID".
        rewards: refuse one without rewards and ends.

    Raises:
        StateDataError: it is not there, lacks a column that is needed, or holds NaN or infinity.
    """
    if str(root).startswith(MINARI):
        episodes = _read_minari(str(root).removeprefix(MINARI))
    else:
        episodes = _read_columns(Path(root), rewards)
    _refuse_not_finite(str(root), episodes)
    return episodes


def state_card(root: Path | str) -> dict[str, Any]:
    """reinflow.json of a data set: {"env": {...}}; {} where nothing says what it is from. Raises StateDataError."""
    if str(root).startswith(MINARI):
        spec = _minari_dataset(str(root).removeprefix(MINARI)).spec.env_spec
        return (
            {}
            if spec is None
            else {"env": {"env_id": spec.id, "max_steps_per_episode": spec.max_episode_steps or 1_000}}
        )
    path = Path(root) / "meta" / CARD_FILE
    return read_json(path) if path.is_file() else {}


def _read_columns(root: Path, rewards: bool) -> StateEpisodes:
    if not (root / "meta" / "info.json").is_file():
        raise StateDataError(
            f"{root} holds no LeRobotDataset (no meta/info.json): record one with reinflow-demos --environment-state "
            "or reinflow-collect"
        )
    features = read_json(root / "meta" / "info.json").get("features")
    if not isinstance(features, dict):
        raise StateDataError(f"{root}/meta/info.json has no features: record the data set again")
    for name in (STATE, ACTION):
        if name not in features:
            raise StateDataError(f"{root} has no {name}: record it with reinflow-demos --environment-state")
    lacking = [name for name in (REWARD, DONE) if name not in features]
    if rewards and lacking:
        raise StateDataError(f"{root} has no {' and no '.join(lacking)}: record it with reinflow-demos --rewards")
    names = [STATE, ACTION, "index", "episode_index", *([] if lacking else [REWARD, DONE])]
    table = _table(root, names + [TRUNCATED] * (TRUNCATED in features and not lacking))
    episode = table["episode_index"].to_numpy()
    cuts = np.flatnonzero(np.diff(episode)) + 1

    def split(values: NDArray[Any]) -> list[Any]:
        return np.split(values, cuts)

    states, actions = (split(_matrix(table, name)) for name in (STATE, ACTION))
    if lacking:
        return StateEpisodes(states, actions, None, [False] * len(states))
    done = split(_matrix(table, DONE)[:, 0] > 0)
    late = split(_matrix(table, TRUNCATED)[:, 0] > 0) if TRUNCATED in table.column_names else [d & False for d in done]
    terminated = [bool(d.any() and not t[d.argmax()]) for d, t in zip(done, late, strict=True)]
    ends = [int(d.argmax()) + 1 if d.any() else len(d) for d in done]
    return StateEpisodes(states, actions, split(_matrix(table, REWARD)[:, 0]), terminated, ends)


def _table(root: Path, names: Sequence[str]) -> pa.Table:
    """These columns of all frames, in the order of their index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((root / "data").rglob("*.parquet"))
    if not files:
        raise StateDataError(f"{root} holds no frames (data/*.parquet): was the recording finished? Record it again")
    try:
        return pa.concat_tables([pq.read_table(file, columns=list(names)) for file in files]).sort_by("index")
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StateDataError(f"{root} cannot be read ({reason}): was the recording finished? Record it again") from None


def _matrix(table: pa.Table, name: str) -> Array:
    """A column as (M, D); a column of single numbers as (M, 1)."""
    import pyarrow as pa

    column = table[name].combine_chunks()
    flat = column.flatten() if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column
    values = np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float32)
    return values.reshape(table.num_rows, -1)


def _minari_dataset(name: str) -> Any:
    try:
        import minari
    except ImportError as error:
        raise StateDataError(f'{MINARI}{name} needs Minari: .venv/bin/pip install "minari[hdf5]"') from error
    try:
        return minari.load_dataset(name)
    except FileNotFoundError as error:
        raise StateDataError(f"{MINARI}{name} is not on this machine: minari download {name}") from error


def _read_minari(name: str) -> StateEpisodes:
    """Flat observations of a Minari data set; its last observation of an episode, which no action follows, is left."""
    found = StateEpisodes([], [], rewards := [], [], [])
    for episode in _minari_dataset(name).iterate_episodes():
        observations = episode.observations
        if not isinstance(observations, np.ndarray) or observations.ndim != 2 or np.ndim(episode.actions) != 2:
            raise StateDataError(f"{MINARI}{name} has observations or actions that are no flat vectors: use another")
        found.states.append(observations[: len(episode.actions)].astype(np.float32))
        found.actions.append(np.asarray(episode.actions, dtype=np.float32))
        rewards.append(np.asarray(episode.rewards, dtype=np.float32))
        found.terminated.append(bool(episode.terminations[-1]))
        found.ends.append(len(episode.actions))
    if not found.actions:
        raise StateDataError(f"{MINARI}{name} holds no episode: use another")
    return found


def _refuse_not_finite(where: str, episodes: StateEpisodes) -> None:
    """Raise StateDataError, naming the first episode with NaN or infinity."""
    columns = {STATE: episodes.states, ACTION: episodes.actions, REWARD: episodes.rewards or []}
    for name, values in columns.items():
        for number, rows in enumerate(values):
            if not np.isfinite(rows).all():
                raise StateDataError(
                    f"{where}: {name} of episode {number} is NaN or infinite: delete that episode "
                    "(lerobot-edit-dataset) or record again"
                )


def decision_starts(episodes: StateEpisodes, every: int, jitter: int = 0) -> Sequence[tuple[int, int]]:
    """(episode, frame) of every decision that falls before an episode's end: each `every` control steps, and the frames
    up to `jitter` after them."""
    late = range(jitter + 1)
    return [
        (number, start + more)
        for number, end in enumerate(episodes.ends)
        for start in range(0, end, every)
        for more in late
        if start + more < end
    ]


def chunks_at(values: Sequence[Array], starts: Sequence[tuple[int, int]], length: int) -> Array:
    """(M, length, D) rows of the episodes from each start on; beyond the end of an episode its last row is repeated."""
    lengths = np.array([len(rows) for rows in values])
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    where = np.array(starts).reshape(-1, 2)
    index = np.minimum(where[:, 1:] + np.arange(length), lengths[where[:, 0], None] - 1) + offsets[where[:, 0], None]
    return np.concatenate(values)[index]
