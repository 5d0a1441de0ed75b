"""Images of the scene: one OpenGL context, or several in threads of their own."""

from __future__ import annotations

import atexit
import os
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from reinflow import UserError
from so101_mujoco_utils import Array

Images = dict[str, NDArray[np.uint8]]  # {camera: (size, size, 3)}


class RenderError(UserError, RuntimeError):
    """No off-screen OpenGL context could be made."""


_failures: dict[str, Exception] = {}
"""What this process could not start, by backend: where MuJoCo's context failed once, a second one ends the process
(SIGABRT)."""

SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader")


def _draws_in_software() -> bool:
    """Whether the current context draws on the CPU."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER) or b""
    return any(driver in name.decode(errors="replace").lower() for driver in SOFTWARE)


class SceneRenderer:
    """Off-screen images of the scene: one OpenGL context, square images of one size, a pure function of qpos.

    A context belongs to the thread that made it. Shadows, reflections, sky and fog are off: in software rendering they
    cost several times what the rest of the image does.

    Args:
        model: its off-screen buffer is set to `size`.
        cameras: names, in the order of the images.
        size: pixels, height and width.
        free: views from elsewhere, by names of their own among `cameras`.

    Raises:
        RenderError: OpenGL cannot start here; the message says what to install or set.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        cameras: tuple[str, ...],
        size: int,
        free: Mapping[str, mujoco.MjvCamera] | None = None,
    ) -> None:
        self.cameras, self.size = cameras, size
        self._views = {name: (free or {}).get(name) or _fixed_camera(model, name) for name in cameras}
        self._model, self._data = model, mujoco.MjData(model)
        model.vis.global_.offwidth = model.vis.global_.offheight = size  # a larger buffer is cleared for nothing
        backend = gl_backend()
        if backend not in _failures:
            try:
                self._gl = _gl_context_class(backend)(size, size)
                self._gl.make_current()
                self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
                mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
            except Exception as error:  # GL backends raise anything: ImportError, AttributeError, EGLError, FatalError
                _failures[backend] = error.with_traceback(None)
        if backend in _failures:
            raise RenderError(
                f"cannot render off screen with MUJOCO_GL={backend!r}: {_failures[backend]}. On Linux install EGL "
                "(apt-get install libegl1 libgl1-mesa-dri) and set MUJOCO_GL=egl, or install libosmesa6 and set "
                "MUJOCO_GL=osmesa; or do without images: render_images=False with environment_state=True"
            ) from _failures[backend]
        self.in_software = _draws_in_software()
        self._free = weakref.finalize(self, _free_contexts, self._gl, self._context)
        self._free.atexit = False  # its own exit hook may run after EGL's; ours, registered later, runs before
        atexit.register(self._free)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "FOG", "HAZE"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self._option, self._rect = mujoco.MjvOption(), mujoco.MjrRect(0, 0, size, size)

    def close(self) -> None:
        """Frees the OpenGL context; nothing happens the second time."""
        self._free()
        atexit.unregister(self._free)  # every evaluation has a renderer of its own

    def render_all(self, qpos: Array) -> list[Images]:
        """Images of every configuration qpos (M, nq)."""
        return [self.render(row) for row in qpos]

    def render(self, qpos: Array) -> Images:
        """Images {camera: (size, size, 3) uint8} of the configuration qpos (nq,), in fresh arrays."""
        if not self._free.alive:
            raise RenderError("this renderer is closed")
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)  # camlight reads the subtree centres of tracking cameras
        mujoco.mj_camlight(self._model, self._data)
        self._gl.make_current()
        return {name: self._render_camera(camera) for name, camera in self._views.items()}

    def _render_camera(self, camera: mujoco.MjvCamera) -> NDArray[np.uint8]:
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self._data, self._option, None, camera, everything, self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._context)
        pixels = np.empty((self.size, self.size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rect, self._context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL's rows go upwards


def _fixed_camera(model: mujoco.MjModel, name: str) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
    return camera


def gl_backend() -> str:
    """What MUJOCO_GL says; without it EGL on Linux, elsewhere mujoco's own choice ("")."""
    return os.environ.get("MUJOCO_GL", "").lower() or ("egl" if sys.platform == "linux" else "")


def _gl_context_class(backend: str) -> Any:
    # Chosen when it is needed: mujoco's own choice is made when mujoco is first imported, by whatever module that is.
    if backend == "egl":
        from mujoco.egl import GLContext
    elif backend == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco.gl_context import GLContext
    return GLContext


def _free_contexts(gl: Any, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()


class ParallelRenderer:
    """A `SceneRenderer` in each of `num_threads` threads; every one draws its share of the configurations.

    Two contexts on two cores draw 1.2 (64 pixels) to 1.8 times (256 pixels) what one does.

    Raises:
        RenderError: as `SceneRenderer`.
    """

    def __init__(self, model: mujoco.MjModel, cameras: tuple[str, ...], size: int, num_threads: int) -> None:
        # All contexts share the threads with which software OpenGL (llvmpipe) fills pixels, by default one per core.
        # Half of that leaves cores for what the contexts do themselves. Read when OpenGL starts.
        os.environ.setdefault("LP_NUM_THREADS", str(max(1, num_threads // 2)))
        self._threads: list[_RenderThread] = []
        self._stop = weakref.finalize(self, _stop_all, self._threads)
        self._stop.atexit = False
        try:
            for _ in range(num_threads):
                self._threads.append(_RenderThread(model, cameras, size))
        except BaseException:
            self._stop()
            raise
        atexit.register(self._stop)  # runs before the hooks of the renderers, which would free from the wrong thread

    def close(self) -> None:
        """Frees the contexts; nothing happens the second time."""
        self._stop()
        atexit.unregister(self._stop)

    def render_all(self, qpos: Array) -> list[Images]:
        """Images of every configuration qpos (M, nq)."""
        if not self._stop.alive:
            raise RenderError("this renderer is closed")
        shares = np.array_split(qpos, len(self._threads))
        drawn = [thread.draw(share) for thread, share in zip(self._threads, shares, strict=True)]
        return [images for future in drawn for images in future.result()]


class _RenderThread(Thread):
    """A thread with a renderer that it makes, uses and closes. A daemon, unlike the threads of concurrent.futures:
    those are gone when exit hooks run, and nobody else can free the context."""

    def __init__(self, model: mujoco.MjModel, cameras: tuple[str, ...], size: int) -> None:
        super().__init__(daemon=True, name="renderer")
        self._make = partial(SceneRenderer, model, cameras, size)
        self._jobs: SimpleQueue[tuple[Future[list[Images]], Array] | None] = SimpleQueue()
        self._ready: Future[None] = Future()
        self.start()
        self._ready.result()

    def draw(self, qpos: Array) -> Future[list[Images]]:
        future: Future[list[Images]] = Future()
        self._jobs.put((future, qpos))
        return future

    def stop(self) -> None:
        self._jobs.put(None)
        if current_thread() is not self:  # the garbage collector may come by here
            self.join()

    def run(self) -> None:
        try:
            renderer = self._make()
        except BaseException as error:  # raised again by the constructor
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            future, qpos = job
            try:
                future.set_result(renderer.render_all(qpos))
            except Exception as error:  # raised again where the images are wanted
                future.set_exception(error)
            del job, future  # the images are somebody else's now
        renderer.close()


def _stop_all(threads: list[_RenderThread]) -> None:
    for thread in threads:
        thread.stop()
