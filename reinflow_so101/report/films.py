"""Films of the same seeds before and after training, side by side, as the page embeds them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinflow import UserError
from reinflow.checkpoint import stored_value
from reinflow.checksums import sha256
from reinflow_so101.command_line import PATH_FIELDS, pick_device
from reinflow_so101.door import DoorSettings
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.report.episodes import choose, pairs_of
from reinflow_so101.report.files import RunFiles
from reinflow_vla.directory import weights_file
from so101_sim.config import EnvConfig

if TYPE_CHECKING:
    from so101_sim.film import Film

    from reinflow.evaluate import Act


@dataclass(frozen=True)
class ShownFilm:
    """One film of the page."""

    seed: int
    kind: str  # what became of the seed
    before: str  # how it ended
    after: str
    mp4: str  # base64
    run: str  # its name

    @property
    def size(self) -> int:
        """Characters in the page."""
        return len(self.mp4)


@dataclass(frozen=True)
class Films:
    """What could be filmed of a run, and what not, in words."""

    shown: Sequence[ShownFilm] = ()
    remark: str = ""


def played_env(config: Mapping[str, Any]) -> EnvConfig:
    """The arm's environment of a run's config.json, as its policy sees it."""
    blind = config.get("model_type") == "flow_mlp"
    names = {f.name for f in fields(EnvConfig)} & config.keys()
    values: dict[str, Any] = {name: tuple(v) if isinstance(v := config[name], list) else v for name in names}
    return EnvConfig(**values | {"joint_frame": "lerobot", "render_images": not blind, "environment_state": blind})


def named_start(run: RunFiles) -> str:
    """The policy that the run started from, as every command takes it: a directory or a hub id."""
    kind = str(run.config.get("model_type", "smolvla"))
    given = str(run.config.get(PATH_FIELDS[kind], "START"))
    return str(FAMILIES[kind].embedded_directory(given) or given)


def starting_policy(run: RunFiles) -> Path:
    """The directory of the policy that the run started from; raises UserError where it is gone or was changed."""
    kind, given = str(run.config["model_type"]), named_start(run)
    try:
        directory = FAMILIES[kind].directory(given)
        found = sha256(weights_file(directory))
    except OSError as error:
        raise UserError(f"the starting policy {given} is gone ({error})") from error
    policy = run.final_policy
    stored = str(stored_value(policy.parent, "start_weights") or "") if policy else ""
    if stored and found != stored:
        raise UserError(f"the starting policy {given} was changed since the run started from it")
    return directory


def actor(run: RunFiles, directory: Path, env: EnvConfig, own_door: bool, device: str) -> Act:
    """How the run's policy in ``directory`` acts without noise.

    Args:
        run: whose settings say how.
        directory: of the policy.
        env: that it acts in.
        own_door: take the run's cameras' names and statistics, which a checkpoint's own policy does not need.
        device: where it runs.
    """
    from reinflow.flow import ChainSpec
    from reinflow.rollout import noise_free_actor

    config = run.config
    door = DoorSettings(**{f.name: config[f.name] for f in fields(DoorSettings) if own_door and f.name in config})
    acting = ActingSettings(
        device, int(config["num_denoising_steps"]), int(config["n_action_steps"]),
        str(config.get("pi0_tokenizer_path", "")), door, env.cameras, env.joint_frame,
    )  # fmt: skip
    policy = FAMILIES[str(config["model_type"])].load(directory, acting)
    return noise_free_actor(policy, ChainSpec(policy.num_denoising_steps))


def seeds_to_film(run: RunFiles, most: int) -> dict[int, str]:
    """Seed -> what became of it, failures first; the first reporting seeds where there are no two evaluations."""
    if run.before and run.after and (pairs := pairs_of(run.before, run.after)):
        return {pair.after.seed: pair.kind for pair in choose(pairs, most)}
    first = int(run.config.get("report_seed", 10_000))
    return {first + number: "" for number in range(most)}


def make_films(run: RunFiles, most: int) -> Films:
    """Films of at most so many seeds; without any, the remark says why."""
    if run.is_gym:
        return Films(remark="a Gymnasium run has no films: only the arm's scene is filmed.")
    if run.final_policy is None:
        return Films(remark="no films: the run has no checkpoint yet.")
    try:
        return _play(run, most)
    except (UserError, OSError, ValueError, RuntimeError) as error:  # no OpenGL, no memory, a policy that is gone
        return Films(remark=f"no films: {' '.join(str(error).split())}")


def _play(run: RunFiles, most: int) -> Films:
    from reinflow_so101.films import film_episodes, mp4_bytes, side_by_side

    chosen = seeds_to_film(run, most)
    seeds, env = list(chosen), played_env(run.config)
    device = pick_device("auto")
    remark, befores = "", []
    try:
        befores = film_episodes(actor(run, starting_policy(run), env, True, device), env, seeds, "before")
    except UserError as error:
        remark = f"after training only: {error}."
    assert run.final_policy
    afters = film_episodes(actor(run, run.final_policy, env, False, device), env, seeds, "after")
    shown = []
    for index, (seed, after) in enumerate(zip(seeds, afters, strict=True)):
        before = befores[index] if befores else None
        film = side_by_side(before, after) if before else after
        ends = [f.outcome or ("success" if f.success else "failure") if f else "" for f in (before, after)]
        encoded = base64.b64encode(mp4_bytes(film)).decode()
        shown.append(ShownFilm(seed, chosen[seed] or _kind(before, after), ends[0], ends[1], encoded, run.name))
    return Films(shown, remark)


def _kind(before: Film | None, after: Film) -> str:
    if before is None:
        return "succeeds" if after.success else "fails"
    words = {(False, False): "still failing", (True, False): "lost", (False, True): "won", (True, True): "kept"}
    return words[before.success, after.success]


def within(films: Sequence[ShownFilm], room: int) -> tuple[list[ShownFilm], str]:
    """The films that fit into so many characters, in their order, and a remark on those that do not."""
    kept, used = [], 0
    for film in films:
        if used + film.size <= room:
            kept.append(film)
            used += film.size
    left = len(films) - len(kept)
    if not left:
        return kept, ""
    seeds = ", ".join(str(film.seed) for film in films if film not in kept)
    return kept, f"{left} films did not fit into this file of at most 10 MB and were left out: seeds {seeds}."
