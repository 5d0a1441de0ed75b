"""Data sets of states: written and read back as they were, readable by LeRobot, refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from reinflow_so101.stages.state_data import (
    StateDataError,
    StateEpisodes,
    chunks_at,
    decision_starts,
    read_state_dataset,
    state_card,
    write_state_dataset,
)
from reinflow_so101.stages.state_game import game_of

CARD = {"env": {"env_id": "Hopper-v5", "max_steps_per_episode": 500}}


def episodes(*lengths: int, rewards: bool = True) -> StateEpisodes:
    rng = np.random.default_rng(0)

    def rows(size: int) -> list[np.ndarray]:
        return [rng.normal(size=(length, size)).astype(np.float32) for length in lengths]

    paid = [column[:, 0] for column in rows(1)] if rewards else None
    return StateEpisodes(rows(3), rows(2), paid, [number % 2 == 0 for number in range(len(lengths))])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StateEpisodes]:
    root, data = tmp_path_factory.mktemp("states") / "data", episodes(5, 1, 7)
    data.ends = [4, 1, 7]  # the first was over one step before its last action
    write_state_dataset(root, data, 125, "hop", CARD)
    return root, data


def test_what_was_written_is_read(written: tuple[Path, StateEpisodes]) -> None:
    root, data = written
    found = read_state_dataset(root, rewards=True)
    assert found.rewards is not None and data.rewards is not None
    for one, other in ((found.states, data.states), (found.actions, data.actions), (found.rewards, data.rewards)):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert (found.terminated, found.ends) == ([True, False, True], [4, 1, 7])
    assert (found.num_frames, found.state_dim, found.action_dim) == (13, 3, 2)
    assert found.returns()[0] == pytest.approx(float(data.rewards[0][:4].sum()))
    assert state_card(root) == CARD and "Hopper-v5, up to 500" in str(game_of(root))


def test_lerobot_reads_it(written: tuple[Path, StateEpisodes]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/states", root=written[0])
    assert (dataset.num_episodes, len(dataset), dataset.fps) == (3, 13, 125)
    done = [bool(dataset[i]["next.done"]) for i in range(13)]
    late = [bool(dataset[i]["next.truncated"]) for i in range(13)]
    assert [i for i, mark in enumerate(done) if mark] == [3, 4, 12] and [i for i, m in enumerate(late) if m] == [5]
    assert dataset[0]["task"] == "hop" and dataset.meta.stats["observation.environment_state"]["mean"].shape == (3,)


def test_a_plain_done_at_every_episodes_end_is_an_end(written: tuple[Path, StateEpisodes], tmp_path: Path) -> None:
    """Other people's data sets mark the last frame and have no next.truncated."""
    import pyarrow.parquet as pq

    (tmp_path / "meta").mkdir()
    (tmp_path / "data").mkdir()
    info = json.loads((written[0] / "meta/info.json").read_text())
    del info["features"]["next.truncated"]
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    table = pq.read_table(next(written[0].rglob("data/**/*.parquet"))).drop_columns(["next.truncated"])
    half = table.num_rows // 2
    pq.write_table(table.slice(half), tmp_path / "data/file-000.parquet")  # files in another order than frames
    pq.write_table(table.slice(0, half), tmp_path / "data/file-001.parquet")
    found = read_state_dataset(tmp_path, rewards=True)
    assert found.terminated == [True, False, True] and [len(a) for a in found.actions] == [5, 1, 7]
    assert np.array_equal(found.states[2], written[1].states[2])
    assert game_of(tmp_path).world is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateDataError, match="holds no LeRobotDataset"):
        read_state_dataset(tmp_path)
    write_state_dataset(tmp_path / "d", episodes(3, rewards=False), 50, "t", {})
    assert read_state_dataset(tmp_path / "d").rewards is None
    with pytest.raises(StateDataError, match=r"no next\.reward and no next\.done.*--rewards"):
        read_state_dataset(tmp_path / "d", rewards=True)
    info = tmp_path / "d/meta/info.json"
    info.write_text(info.read_text().replace("observation.environment_state", "observation.state"))
    with pytest.raises(StateDataError, match=r"observation\.environment_state.*--environment-state"):
        read_state_dataset(tmp_path / "d")


def test_nothing_bad_is_written_and_nothing_overwritten(tmp_path: Path) -> None:
    data = episodes(3, 4)
    data.states[1][2, 0] = np.nan
    with pytest.raises(StateDataError, match=r"observation\.environment_state of episode 1 is NaN"):
        write_state_dataset(tmp_path / "d", data, 50, "t", {})
    assert not (tmp_path / "d").exists()
    with pytest.raises(StateDataError, match="exists"):
        write_state_dataset(tmp_path, episodes(3), 50, "t", {})
    with pytest.raises(StateDataError, match="nothing to write"):
        write_state_dataset(tmp_path / "d", StateEpisodes([], [], None, []), 50, "t", {})


def test_minari_is_read_or_its_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if "minari" not in sys.modules:
        monkeypatch.setitem(sys.modules, "minari", None)
        with pytest.raises(StateDataError, match=r"pip install .*minari"):
            read_state_dataset("minari:mujoco/hopper/medium-v0")
    rows = np.arange(8, dtype=np.float64).reshape(4, 2)
    episode = SimpleNamespace(
        observations=rows, actions=rows[:3, :1], rewards=np.ones(3), terminations=np.array([0, 0, 1])
    )
    spec = SimpleNamespace(env_spec=SimpleNamespace(id="Hopper-v5", max_episode_steps=None))
    library = ModuleType("minari")  # its interface: the library is not a dependency
    library.load_dataset = lambda _: SimpleNamespace(iterate_episodes=lambda: [episode], spec=spec)
    monkeypatch.setitem(sys.modules, "minari", library)
    found = read_state_dataset("minari:x", rewards=True)
    assert [len(s) for s in found.states] == [3] and found.terminated == [True] and found.returns() == [3.0]
    assert "Hopper-v5" in str(game_of("minari:x"))


def test_decisions_and_their_chunks() -> None:
    data = episodes(7, 3)
    data.ends = [5, 3]
    starts = decision_starts(data, every=4, jitter=1)
    assert starts == [(0, 0), (0, 1), (0, 4), (1, 0), (1, 1)]  # frame 5 of the first was never reached
    chunks = chunks_at(data.actions, starts, 4)
    assert np.array_equal(chunks[2], data.actions[0][[4, 5, 6, 6]])  # the rest of the plan, then its end held
    assert np.array_equal(chunks[4], data.actions[1][[1, 2, 2, 2]])
