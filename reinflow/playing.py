"""The episodes that all ranks' environments play: begun, kept in a checkpoint as those of one process, gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from reinflow.distributed import gather, rank, size
from reinflow.env import ChunkVectorEnv, join_states, part_of_state
from reinflow.policy import FlowPolicy
from reinflow.rollout import RolloutInfo, RolloutState
from reinflow.seeds import TrainingSeeds


def own_rows(env: ChunkVectorEnv) -> tuple[range, int]:
    """Which of all ranks' environments those of ``env`` are, and how many there are in all."""
    counts = gather(env.num_envs)
    first = sum(counts[: rank()])
    return range(first, first + env.num_envs), sum(counts)


def begin(policy: FlowPolicy, env: ChunkVectorEnv, seeds: TrainingSeeds, done: int = 0) -> RolloutState:
    """At the beginning of this rank's share of the training's episodes, those after the first ``done``."""
    rows, stride = own_rows(env)
    return RolloutState.start(policy, env, seeds, done, rows.start, stride)


def stored_state(current: RolloutState, env: ChunkVectorEnv) -> dict[str, Any]:
    """For a checkpoint: where all ranks' environments stand, in the order of one process."""
    parts = gather((current.episodes, current.decisions, current.broken, env.get_state()))
    episodes, decisions, broken, states = zip(*parts, strict=True)
    return {
        "playing": np.concatenate(episodes),
        "decisions": np.concatenate(decisions),
        "broken": np.concatenate(broken),
        "env": join_states(states) if size() > 1 else states[0],
    }


def go_on(policy: FlowPolicy, env: ChunkVectorEnv, seeds: TrainingSeeds, state: Mapping[str, Any]) -> RolloutState:
    """Where this rank's environments stand by a checkpoint's ``state``, however many ranks wrote it."""
    if "playing" not in state:
        print("the checkpoint is of an older version: its weights and counters go on, with episodes that begin anew")
        return begin(policy, env, seeds, state["episodes"])
    rows, stride = own_rows(env)
    mine = slice(rows.start, rows.stop)
    observation = env.set_state(part_of_state(state["env"], rows) if size() > 1 else state["env"])
    current = RolloutState.at(policy, observation, state["playing"][mine], state["decisions"][mine], stride)
    current.broken |= state.get("broken", np.zeros(stride, dtype=bool))[mine]
    return current


def of_all_ranks(info: RolloutInfo, env: ChunkVectorEnv) -> RolloutInfo:
    """What all ranks' rollouts found, environments by their numbers among all; times are those of the slowest."""
    first = own_rows(env)[0].start
    own = [replace(episode, env=first + episode.env) for episode in info.episodes] if first else info.episodes
    parts = gather((own, info.seconds_env, info.seconds_policy))
    episodes, seconds_env, seconds_policy = zip(*parts, strict=True)
    return replace(
        info,
        episodes=[episode for part in episodes for episode in part],
        seconds_env=max(seconds_env),
        seconds_policy=max(seconds_policy),
    )
