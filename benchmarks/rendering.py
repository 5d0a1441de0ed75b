"""Rendering: milliseconds per image of the scene, off screen, by size, cameras, MSAA and shadows.

    python benchmarks/rendering.py [--quick] [--csv FILE] [--sizes 64 96 128 256]

Images of arm configurations along the scripted expert's plan. Variants of the same images:

* ours: `SceneRenderer.render(qpos)` as the environments call it: kinematics, scene update, drawing, reading, turning
  the rows over into fresh arrays;
* in threads: `ParallelRenderer`, as batched environments use it, a context per core;
* mjr: `mjr_render` + `mjr_readPixels` alone, on scenes that were updated beforehand, into one reused array;
* the same with 4 samples a pixel (MSAA), and with shadows, which the shipped scene switches off.

The second table splits the work for one camera into its calls. Software OpenGL draws with threads of its own: llvmpipe
takes LP_NUM_THREADS of them, here 1 unless it is set, as beside `ParallelRenderer`; all cores otherwise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import mujoco
import numpy as np
from _common import Row, interleaved, make_parser, median, report, speed_ratio, timed
from physics import expert_work, tiny_env

from so101_mujoco_utils import CAMERA_NAMES, Array
from so101_sim.renderer import ParallelRenderer, SceneRenderer
from so101_sim.scene import PickScene

MSAA_SAMPLES, SHADOW_SIZE = 4, 2048


def configurations(count: int) -> Array:
    """(count, nq) arm and block positions: `count / 3` expert episodes at the start of their three chunks."""
    config = tiny_env()
    work = expert_work(config, -(-count // 3), 3)
    nq = PickScene(config).model.nq
    return np.concatenate([state["rows"][:, :nq] for state in work.states])[:count]


class PlainRenderer:
    """mjr_* calls one by one; the image options are the caller's."""

    def __init__(self, size: int, cameras: Sequence[str], samples: int = 0, shadows: bool = False) -> None:
        self.model = PickScene(tiny_env()).model
        self.model.vis.quality.offsamples = samples
        self.model.vis.quality.shadowsize = SHADOW_SIZE if shadows else 0
        self.model.light_castshadow[:] = shadows
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
        self.data = mujoco.MjData(self.model)
        self._gl = mujoco.GLContext(size, size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._option, self._rect = mujoco.MjvOption(), mujoco.MjrRect(0, 0, size, size)
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        self._cameras = []
        for name in cameras:
            camera = mujoco.MjvCamera()
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(name).id
            self._cameras.append(camera)
        self._shadows = shadows

    def kinematics(self, qpos: Array) -> None:
        """Positions of geoms and cameras."""
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def new_scenes(self) -> list[mujoco.MjvScene]:
        """An empty scene per camera."""
        scenes = [mujoco.MjvScene(self.model, maxgeom=1000) for _ in self._cameras]
        for scene in scenes:
            for flag in ("REFLECTION", "SKYBOX", "FOG", "HAZE"):
                scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
            scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self._shadows
        return scenes

    def update(self, scenes: Sequence[mujoco.MjvScene]) -> None:
        """Fill the scenes with geoms."""
        everything = mujoco.mjtCatBit.mjCAT_ALL
        for camera, scene in zip(self._cameras, scenes, strict=True):
            mujoco.mjv_updateScene(self.model, self.data, self._option, None, camera, everything, scene)

    def draw(self, scenes: Sequence[mujoco.MjvScene]) -> tuple[float, float]:
        """Seconds in mjr_render and in mjr_readPixels; OpenGL may leave work of the first to the second."""
        self._gl.make_current()
        render = read = 0.0
        for scene in scenes:
            start = time.perf_counter()
            mujoco.mjr_render(self._rect, scene, self._context)
            middle = time.perf_counter()
            mujoco.mjr_readPixels(self._pixels, None, self._rect, self._context)
            render, read = render + middle - start, read + time.perf_counter() - middle
        return render, read

    def close(self) -> None:
        """Free the OpenGL context."""
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def plain(renderer: PlainRenderer, poses: Array) -> Callable[[], float]:
    """Seconds in mjr_render + mjr_readPixels for all poses."""
    prepared = []
    for qpos in poses:
        renderer.kinematics(qpos)
        prepared.append(renderer.new_scenes())
        renderer.update(prepared[-1])
    return lambda: sum(sum(renderer.draw(scenes)) for scenes in prepared)


def ours(renderer: SceneRenderer | ParallelRenderer, poses: Array) -> Callable[[], float]:
    """Seconds in render_all for all poses."""
    return lambda: timed(lambda: renderer.render_all(poses))


def measure(size: int, cameras: tuple[str, ...], poses: Array, repeats: int) -> Row:
    """One line of the first table."""
    model = PickScene(tiny_env()).model
    library: dict[str, SceneRenderer | ParallelRenderer] = {
        "ours": SceneRenderer(model, cameras, size),
        "in threads": ParallelRenderer(model, cameras, size, os.cpu_count() or 1),
    }
    plains = {
        "mjr": PlainRenderer(size, cameras),
        f"mjr, MSAA {MSAA_SAMPLES}": PlainRenderer(size, cameras, samples=MSAA_SAMPLES),
        "mjr, shadows": PlainRenderer(size, cameras, shadows=True),
    }
    try:
        variants = {name: ours(renderer, poses) for name, renderer in library.items()}
        variants |= {name: plain(renderer, poses) for name, renderer in plains.items()}
        times = interleaved(variants, repeats)
    finally:
        for renderer in (*library.values(), *plains.values()):
            renderer.close()
    images = len(poses) * len(cameras)
    row: Row = {"size": size, "cameras": len(cameras)}
    row |= {f"{name}, ms": 1e3 * median(times, name) / images for name in times}
    return row | {
        "ours / mjr": 1 / speed_ratio(times, "ours", "mjr"),
        "ours / in threads": speed_ratio(times, "in threads", "ours"),
    }


def split(size: int, poses: Array, repeats: int) -> Row:
    """One line of the second table: median milliseconds of every call for one image."""
    renderer = PlainRenderer(size, CAMERA_NAMES[:1])
    scenes, image = renderer.new_scenes(), np.empty((size, size, 3), dtype=np.uint8)
    samples = []
    try:
        for qpos in np.tile(poses, (repeats + 1, 1)):
            kinematics = timed(partial(renderer.kinematics, qpos))
            update = timed(lambda: renderer.update(scenes))
            copies = timed(lambda: np.ascontiguousarray(image[::-1]).copy())
            samples.append((kinematics, update, *renderer.draw(scenes), copies))
    finally:
        renderer.close()
    names = ("kinematics", "mjv_updateScene", "mjr_render", "mjr_readPixels", "turn over, copy")
    medians = 1e3 * np.median(samples[len(poses) :], axis=0)  # the first pass warms up
    return {"size": size} | {f"{name}, ms": float(value) for name, value in zip(names, medians, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    os.environ.setdefault("LP_NUM_THREADS", "1")
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="*", type=int, default=[64, 96, 128, 256])
    args = parser.parse_args(argv)
    counts: tuple[int, ...] = (1, 2, 3)
    if args.quick:
        args.sizes, args.repeats, counts = [64], 1, (2,)
    poses = configurations(3 if args.quick else 24)
    rows = [measure(s, CAMERA_NAMES[:count], poses, args.repeats) for s in args.sizes for count in counts]
    threads = f"LP_NUM_THREADS {os.environ['LP_NUM_THREADS']}, {len(poses)} poses"
    report(rows, args, f"ms per image, {threads}")
    report([split(s, poses, args.repeats) for s in args.sizes], args, f"one camera, {threads}", "split")


if __name__ == "__main__":
    main()
