"""Films: what is in the pictures, and that filming changes nothing."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reinflow import ConfigError
from reinflow.env import Observation
from reinflow.evaluate import evaluate
from reinflow_so101.commands.film import FilmConfig, make_film
from reinflow_so101.films import film_episodes, mp4_bytes
from so101_sim.expert import ScriptedExpert
from so101_sim.film import BAND_HEIGHT, GREEN, RED, SIZE, Film, FilmingEnv, column, side_by_side, stack
from so101_sim.tasks.registry import task_env
from so101_sim.vector.make import make_vector_env

CONFIG = task_env("lift", image_size=24, max_steps_per_episode=21)
BLIND = replace(CONFIG, render_images=False)
SEEDS = [10_003, 10_001, 10_002]


def act(observation: Observation, seeds: Sequence[int], decision: int) -> np.ndarray:
    """The arm rises, in chunks of 7 control steps."""
    steps = np.linspace(0.0, 20.0, 7)[None, :, None] * np.array([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    return observation["agent_pos"][:, None] + steps


@pytest.fixture(scope="module")
def films() -> list[Film]:
    return film_episodes(act, CONFIG, SEEDS, "before")


def red(frame: np.ndarray) -> np.ndarray:
    """Where the picture of the scene shows the block."""
    scene = frame[BAND_HEIGHT + 5 :, :SIZE].astype(int)
    return (scene[..., 0] > 110) & (scene[..., 1] < 60) & (scene[..., 2] < 60)


def has(frame: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((frame[: BAND_HEIGHT + 5, :SIZE] == colour).all(axis=-1).sum() > 50)


def test_a_film_is_of_its_seed_and_ends_with_its_outcome(films: list[Film]) -> None:
    with make_vector_env(CONFIG, 1) as env:
        played = evaluate(act, env, SEEDS).episodes
    for film, row in zip(films, played, strict=True):
        assert (film.seed, film.success, film.outcome, film.return_) == (
            row.seed, row.success, row.outcome, pytest.approx(row.return_),
        )  # fmt: skip
        assert film.fps == 25
        # The start, every 2 control steps in chunks of 7, and a second of the end.
        assert len(film.frames) == 1 + 3 * 4 + 25
        assert {frame.shape for frame in film.frames} == {(SIZE, SIZE + SIZE // 2, 3)}
        assert not has(film.frames[0], RED) and has(film.frames[-1], RED) and not has(film.frames[-1], GREEN)
        assert (film.frames[12] != film.frames[0]).any() and (film.frames[13] == film.frames[12]).all()


def test_the_block_is_clearly_seen_wherever_a_task_puts_it() -> None:
    with FilmingEnv(make_vector_env(task_env("lift_wide", render_images=False), 12)) as env:
        observation = env.reset(range(10_000, 10_012))
        for _ in range(3):  # up and out of the way
            observation = env.step_chunk(act(observation, (), 0)).observation
        for take in env._takes.values():
            rows, columns = np.nonzero(red(take.frames[-1]))
            assert np.ptp(columns) > 20 or np.ptp(rows) > 20, take.seed


def test_what_the_policy_sees_is_enlarged_by_whole_pixels(films: list[Film]) -> None:
    with make_vector_env(CONFIG, 1) as env:
        seen = env.reset([SEEDS[0]])["pixels"]
    for place, image in enumerate(seen.values()):
        shown = films[0].frames[0][place * 240 : place * 240 + 240, SIZE:]
        # Its name covers three rows of the image.
        np.testing.assert_array_equal(shown[35::10, 5::10], image[0][3:])


def test_three_cameras_and_large_images_fit() -> None:
    shades = {name: np.full((256, 256, 3), shade, np.uint8) for name, shade in (("a", 40), ("b", 90), ("c", 200))}
    picture = column(shades, 480)
    assert picture.shape == (480, 160, 3)
    assert [int(picture[y, 150, 0]) for y in (80, 240, 400)] == [40, 90, 200]


def test_a_policy_that_sees_nothing_has_the_scene_alone() -> None:
    (film,) = film_episodes(act, BLIND, SEEDS[:1])
    assert film.frames[0].shape == (SIZE, SIZE, 3) and red(film.frames[0]).sum() > 300


def test_a_success_is_green() -> None:
    config = task_env("lift", render_images=False)
    with FilmingEnv(make_vector_env(config, 1), "after") as env:
        env.reset([10_000])
        scene = env.env.scene  # type: ignore[attr-defined]
        start = scene.layout.scene_state(env.get_state()["rows"][0])
        yaw = 2.0 * np.arctan2(start.block_quat[3], start.block_quat[0])
        plan = ScriptedExpert(scene.model).plan(start.joint_pos_rad, start.block_pos, yaw)
        env.step_chunk(scene.frame.from_rad(plan)[None])
        (film,) = env.films()
    assert film.success and film.outcome == "success"
    assert has(film.frames[-1], GREEN) and not has(film.frames[-1], RED)


def test_nothing_stays_open_and_episodes_are_as_without(films: list[Film]) -> None:
    with FilmingEnv(make_vector_env(BLIND, 2)) as env, make_vector_env(BLIND, 2) as plain:
        filmed, free = env._renderer._free, evaluate(act, plain, SEEDS[:2], frame_interval=2)
        assert evaluate(act, env, SEEDS[:2], frame_interval=2).episodes == free.episodes
        assert (env.outcomes, env.facts, env.start_facts, env.extras) == (
            plain.outcomes, plain.facts, plain.start_facts, plain.extras,
        )  # fmt: skip
        assert [film.seed for film in env.films()] == SEEDS[:2] and env.films() == []
        assert filmed.alive
        with pytest.raises(ValueError, match="one after the other"):
            env.step_chunk(np.zeros((2, 7, 6)), [1, 2])
    assert not filmed.alive


def test_films_are_joined(films: list[Film]) -> None:
    short = replace(films[1], frames=films[1].frames[:5], success=True, outcome="success", return_=8.0)
    pair = side_by_side(films[0], short)
    assert (pair.success, pair.outcome, pair.return_) == (True, "success", 8.0)
    assert len(pair.frames) == len(films[0].frames) and pair.frames[0].shape == (SIZE, 3 * SIZE, 3)
    np.testing.assert_array_equal(pair.frames[-1][:, 3 * SIZE // 2 :], short.frames[-1])
    narrow = replace(films[2], frames=[frame[:, :SIZE] for frame in films[2].frames])
    pile = stack([pair, narrow])
    assert pile.frames[0].shape == (2 * SIZE, 3 * SIZE, 3)
    assert pile.outcome == f"success, {narrow.outcome}" and not pile.success
    np.testing.assert_array_equal(pile.frames[3][SIZE:, :SIZE], narrow.frames[3])
    with pytest.raises(ValueError, match="no film"):
        stack([])


def test_an_mp4_plays_everywhere(films: list[Film]) -> None:
    data = mp4_bytes(films[0])
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, int(stream.average_rate)) == (720, 480, 25)
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(shown) == len(films[0].frames)
    assert np.abs(shown[0].astype(int) - films[0].frames[0]).mean() < 4.0
    assert len(data) < 100_000


def test_policies_side_by_side_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_film(FilmConfig(("flow_mlp",), str(tmp_path / "film.gif"), (10_002,), ("start",), width=240))
    with Image.open(path) as picture:
        # Every second frame of 76 and the second after them, of which those alike are one.
        assert picture.size == (240, 240) and 30 < picture.n_frames <= 51
    assert capsys.readouterr().out.startswith("start: seed 10002 ")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (FilmConfig((), "f.gif"), "policies, seeds"),
        (FilmConfig(("tiny",), "f.avi"), r"f.avi is no film: end it in .mp4 or .gif"),
        (FilmConfig(("tiny",), "f.mp4", titles=("a", "b")), "2 of 1: one each"),
        (FilmConfig(("tiny",), "f.mp4", seeds=(-1,)), "at least 0"),
        (FilmConfig(("nosuch",), "f.mp4"), "nosuch is no run"),
        (FilmConfig(("tiny",), "f.mp4", seeds=tuple(range(35))), r"seeds: 35 .* at most 34, or write a .gif"),
        (FilmConfig(("tiny",) * 23, "f.mp4"), "policies: 23 .* at most 22"),
        (FilmConfig(("nosuch",), "f.gif", seeds=tuple(range(35))), "nosuch is no run"),
    ],
)
def test_a_film_that_cannot_be_is_refused_at_once(config: FilmConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_film(config)
