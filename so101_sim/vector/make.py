"""Choose a vector form."""

from __future__ import annotations

from typing import Literal, get_args

from so101_sim.config import EnvConfig
from so101_sim.vector.base import SO101VectorEnv
from so101_sim.vector.batched import BatchedVectorEnv
from so101_sim.vector.sequential import SequentialVectorEnv
from so101_sim.vector.subproc import SubprocVectorEnv

Backend = Literal["auto", "sequential", "subproc", "batched", "warp"]


def make_vector_env(
    config: EnvConfig,
    num_envs: int,
    backend: Backend = "auto",
    num_threads: int | None = None,
    viewer: bool = False,
    device: str = "cpu",
) -> SO101VectorEnv:
    """N environments of one configuration.

    Args:
        backend: "sequential", "subproc", "batched", "warp", or "auto": sequential for one environment, batched for
            more.
        viewer: show the first environment of the sequential form in MuJoCo's window.
        num_threads: threads of the batched form, worker processes of the subproc form; None is one per core.
        device: torch's name of where the warp form simulates and draws: a CUDA device, else the CPU.

    Raises:
        ValueError: unknown backend, num_envs below 1, a viewer of another form.
        RenderError: images or a viewer are asked for and cannot be had.
        ConfigError: the warp form is not installed, or cannot simulate the scene.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "auto":
        backend = "sequential" if num_envs == 1 else "batched"
    if viewer and backend != "sequential":
        raise ValueError(f"a viewer shows the sequential form, not backend={backend!r} of {num_envs} environments")
    if backend == "sequential":
        sequential = SequentialVectorEnv(config, num_envs)
        if viewer:
            sequential.open_viewer()
        return sequential
    if backend == "batched":
        return BatchedVectorEnv(config, num_envs, num_threads)
    if backend == "warp":
        from so101_sim.vector.warp import WarpVectorEnv

        return WarpVectorEnv(config, num_envs, device if device.startswith("cuda") else "cpu")
    return SubprocVectorEnv(config, num_envs, num_threads)
