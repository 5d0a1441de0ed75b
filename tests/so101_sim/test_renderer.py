"""Images are a function of the configuration alone, whoever draws them, and contexts go without a sound."""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import mujoco
import numpy as np
import pytest

from so101_sim.config import EnvConfig
from so101_sim.renderer import Images, ParallelRenderer, RenderError, SceneRenderer
from so101_sim.scene import PickScene

CAMERAS, SIZE = ("camera_up", "wrist_camera"), 32


@pytest.fixture(scope="module")
def scene() -> PickScene:
    return PickScene(EnvConfig(cameras=CAMERAS, image_size=SIZE, randomize_block=True))


@pytest.fixture(scope="module")
def poses(scene: PickScene) -> np.ndarray:
    """(5, nq) starts of episodes."""
    data = mujoco.MjData(scene.model)
    rows = []
    for seed in range(5):
        scene.reset(data, np.random.default_rng(seed))
        rows.append(data.qpos.copy())
    return np.array(rows)


@pytest.fixture(scope="module")
def expected(scene: PickScene, poses: np.ndarray) -> Iterator[list[Images]]:
    renderer = SceneRenderer(scene.model, CAMERAS, SIZE)
    yield renderer.render_all(poses)
    renderer.close()


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_draw_what_one_context_draws(
    scene: PickScene, poses: np.ndarray, expected: list[Images], num_threads: int
) -> None:
    renderer = ParallelRenderer(scene.model, CAMERAS, SIZE, num_threads)
    drawn = renderer.render_all(poses)
    assert len(drawn) == len(expected)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for camera in CAMERAS:
            np.testing.assert_array_equal(ours[camera], theirs[camera])
    assert renderer.render_all(poses[:0]) == []
    renderer.close()


def test_a_failed_job_is_raised_where_its_images_are_wanted(scene: PickScene, poses: np.ndarray) -> None:
    renderer = ParallelRenderer(scene.model, CAMERAS, SIZE, 2)
    with pytest.raises(ValueError, match="shape"):
        renderer.render_all(np.zeros((2, 3)))
    assert len(renderer.render_all(poses)) == len(poses)
    renderer.close()


def test_threads_that_started_end_when_a_later_one_cannot(scene: PickScene, monkeypatch: pytest.MonkeyPatch) -> None:
    made, before = [], threading.active_count()

    def scarce(*args: Any) -> SceneRenderer:
        if made:
            raise RenderError("no second context")
        made.append(SceneRenderer(*args))
        return made[0]

    monkeypatch.setattr("so101_sim.renderer.SceneRenderer", scarce)
    with pytest.raises(RenderError, match="second"):
        ParallelRenderer(scene.model, CAMERAS, SIZE, 2)
    assert threading.active_count() == before
    with pytest.raises(RenderError, match="closed"):
        made[0].render(np.zeros(scene.model.nq))


def test_a_closed_renderer_says_so(scene: PickScene, poses: np.ndarray) -> None:
    renderer = ParallelRenderer(scene.model, CAMERAS, SIZE, 2)
    renderer.close()
    renderer.close()
    with pytest.raises(RenderError, match="closed"):
        renderer.render_all(poses)


def test_threads_end_with_a_renderer_that_nobody_holds(scene: PickScene) -> None:
    before = threading.active_count()
    renderer = ParallelRenderer(scene.model, CAMERAS, SIZE, 2)
    assert threading.active_count() == before + 2
    del renderer
    gc.collect()
    assert threading.active_count() == before


MAKE = "from so101_sim.config import EnvConfig; from so101_sim.vector.make import make_vector_env"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("backend", ["sequential", "batched"])
def test_a_program_that_closes_nothing_ends_without_a_sound(backend: str) -> None:
    done = run(
        f"{MAKE}\nenv = make_vector_env(EnvConfig(image_size=32), 2, {backend!r}, num_threads=2)\nenv.reset([0, 1])"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "work",
    [
        "from so101_gym_env import SO101PickEnv; SO101PickEnv().reset(seed=0)",
        f"{MAKE}; make_vector_env(EnvConfig(), 2, 'sequential')",
        f"{MAKE}; make_vector_env(EnvConfig(), 2, 'batched')",
    ],
    ids=["single", "sequential", "batched"],
)
def test_a_renderer_that_cannot_start_says_what_to_do(work: str) -> None:
    done = run(f"import os; os.environ['MUJOCO_GL'] = 'osmesa'; os.environ['PYOPENGL_PLATFORM'] = 'egl'\n{work}")
    assert done.returncode != 0
    assert "RenderError: cannot render off screen with MUJOCO_GL='osmesa'" in done.stderr
    assert "apt-get install" in done.stderr


def test_what_could_not_start_is_not_tried_again() -> None:
    """A second context of MuJoCo's after one that failed ends the process."""
    code = """
        import os
        os.environ.pop("DISPLAY", None)
        os.environ["MUJOCO_GL"] = "glfw"
        from so101_sim.config import EnvConfig
        from so101_sim.renderer import RenderError
        from so101_sim.scene import PickScene
        scene, said = PickScene(EnvConfig()), set()
        for _ in range(3):
            try:
                scene.make_renderer()
            except RenderError as error:
                said.add(str(error))
        print(said)
    """
    done = run(dedent(code))
    assert done.returncode == 0 and done.stdout.count("MUJOCO_GL='glfw'") == 1
