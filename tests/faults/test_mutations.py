"""Damaged files, at random: what we wrote is read as it was or refused; what others wrote never half works.

FAULTS_MUTATIONS sets the number of damages in the slow form (2,000 of ours, half as many of others').
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import string
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reinflow import UserError
from reinflow.checkpoint import LAST, PRETRAINED, checkpoint_step, load_training_state, resolve_checkpoint
from reinflow.checkpoint import save_checkpoint as save
from reinflow.metrics import METRICS_FILE, read_metrics, truncate_metrics
from reinflow_so101.command_line import saved_config
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.policy_card import policy_card, stored_env
from reinflow_vla.smolvla_directory import load_smolvla
from so101_mujoco_utils import model_dir
from so101_sim.config import EnvConfig
from tests.foreign import clone
from tests.reinflow.test_checkpoint import assert_same
from train_reinflow import TrainingConfig

MUTATIONS = int(os.environ.get("FAULTS_MUTATIONS", "2000"))
HANG_S, MEMORY = 20, 2 << 30  # of address space beyond what the process has
Content = Callable[[Path], Any]  # loads a directory

# --- Damages ----------------------------------------------------------------------------------------------------------


def bit_flip(data: bytearray, rng: random.Random) -> str:
    place, bit = _place(data, rng), rng.randrange(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped"


def byte_change(data: bytearray, rng: random.Random) -> str:
    place, value = _place(data, rng), rng.randrange(256)
    data[place] = value
    return f"byte {place} = {value}"


def truncation(data: bytearray, rng: random.Random) -> str:
    size = rng.choice([0, 1, 7, 8, 9, _place(data, rng), _place(data, rng), len(data) - 1])
    del data[size:]
    return f"cut to {len(data)} bytes"


def zeroed_block(data: bytearray, rng: random.Random) -> str:
    start, size = _place(data, rng), rng.choice([8, 512, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))
    return f"{size} bytes from {start} zeroed"


def appended(data: bytearray, rng: random.Random) -> str:
    more = rng.choice([b"\0", b"\n", b"x", b"\0" * 4096, rng.randbytes(100)])
    data += more
    return f"{len(more)} bytes appended, the first {more[0]}"


def _place(data: bytearray, rng: random.Random) -> int:
    """Half of them in the first 4 KB, where headers are."""
    return rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))


RAW = (bit_flip, byte_change, truncation, zeroed_block, appended)
STRANGE = (
    0, -1, 1, 2**31, 10**30, 1e308, -0.5, math.nan, math.inf, None, True, "", "x" * 20_000, "../../etc/passwd", [], {},
    "é\0", [[]], {"a": {"b": None}}, "lerobot/smolvla_base", "flow_mlp", "smolvla",
)  # fmt: skip


def json_change(content: Any, rng: random.Random) -> str:
    """Change, remove or add at a random place of a JSON tree, in place."""
    node, path, places = content, "$", list(_containers(content))
    node, path = rng.choice(places)
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    what = rng.choice(["remove", "strange", "strange", "number", "string", "add"])
    old, where = node[key], f"{path}.{key}"
    if what == "remove":
        del node[key]
        return f"{where} removed"
    if what == "add" and isinstance(node, dict):
        name = "".join(rng.choices(string.ascii_lowercase, k=6))
        node[name] = rng.choice(STRANGE)
        return f"{path}.{name} = {node[name]!r:.60} added"
    if what == "number" and type(old) in (int, float):
        node[key] = rng.choice([old + 1, old * 2, -old, old * 1_000_003, float(old), old / 3, str(old)])
    elif what == "string" and isinstance(old, str):
        node[key] = rng.choice([old[:-1], old + "x", old.swapcase(), old[::-1]])
    else:
        node[key] = rng.choice(STRANGE)
    return f"{where}: {old!r:.60} -> {node[key]!r:.60}"


def _containers(node: Any, path: str = "$") -> Iterator[tuple[Any, str]]:
    """Dicts and lists that are not empty, with their paths."""
    if isinstance(node, dict | list) and node:
        yield node, path
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _containers(value, f"{path}.{key}")


def damage(directory: Path, files: list[Path], rng: random.Random) -> tuple[str, dict[Path, bytes]]:
    """Do one thing to one of the files; what it was, and the former content of what changed."""
    file = rng.choice(files)
    before, name = file.read_bytes(), str(file.relative_to(directory))
    if rng.random() < 0.08:
        file.unlink()
        return f"{name}: deleted", {file: before}
    others = [other for other in files if other.suffix == file.suffix and other != file]
    if others and rng.random() < 0.08:
        other = rng.choice(others)
        former = {file: before, other: other.read_bytes()}
        file.write_bytes(former[other])
        other.write_bytes(before)
        return f"{name}: swapped with {other.relative_to(directory)}", former
    if file.suffix == ".json" and rng.random() < 0.7:
        content = json.loads(before)
        what = json_change(content, rng)
        file.write_text(json.dumps(content, indent=2))
    else:
        data = bytearray(before)
        what = rng.choice(RAW)(data, rng)
        file.write_bytes(data)
    return f"{name}: {what}", {file: before}


# --- Trials -----------------------------------------------------------------------------------------------------------


class HangError(BaseException):
    """Raised out of a load that takes too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """A load that hangs is broken off; one that asks for gigabytes of memory fails."""

    def over(number: int, frame: object) -> None:
        raise HangError(f"more than {HANG_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, over)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Trials:
    """Damages of one directory and what came of them."""

    directory: Path
    files: list[Path]
    load: Content
    same: Callable[[Any, Any], None]  # raises AssertionError
    seed: str

    def run(self, number: int) -> tuple[Counter[str], list[str]]:
        """Try ``number`` damages: how many were refused or as before, and a line for everything else."""
        original = copy.deepcopy(self.load(self.directory))  # what is mapped into memory changes with its file
        counts, wrong = Counter(), []
        for trial in range(number):
            what, former = damage(self.directory, self.files, random.Random(f"{self.seed}-{trial}"))
            try:
                outcome = self._outcome(original)
            finally:
                for file, content in former.items():
                    file.write_bytes(content)
            counts[outcome.split(":")[0]] += 1
            if outcome not in ("refused", "same"):
                wrong.append(f"[{self.seed}-{trial}] {what}: {outcome}")
        self.same(original, self.load(self.directory))  # nothing that was loaded has stayed behind
        return counts, wrong

    def _outcome(self, original: Any) -> str:
        try:
            with bounded():
                loaded = self.load(self.directory)
        except UserError:
            return "refused"
        except HangError as error:
            return f"HANG: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        try:
            self.same(original, loaded)
        except AssertionError as error:
            return f"other content: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        return "same"


def conclude(name: str, trials: int, counts: Counter[str], wrong: list[str], tell: Callable[[str], None]) -> None:
    """Say how many came out how, and fail with every damage that was neither refused nor without effect."""
    kinds = ", ".join(f"{kind} {n}" for kind, n in counts.most_common() if kind not in ("refused", "same"))
    tell(
        f"faults: damages of {name} trials={trials} refused={counts['refused']} same={counts['same']} "
        f"wrong={len(wrong)}" + (f" ({kinds})" if kinds else "")
    )
    by_file = Counter(line.split("] ")[1].split(":")[0] for line in wrong)
    assert not wrong, f"{len(wrong)} of {trials} damages, by file {dict(by_file)}\n" + "\n".join(wrong)


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line where a person sees it, in the slow form."""

    def say(line: str) -> None:
        if request.node.get_closest_marker("slow"):
            with capsys.disabled():
                print(f"\n{line}")

    return say


# --- What we wrote ----------------------------------------------------------------------------------------------------


def weights(policy: Any) -> dict[str, Tensor]:
    """Of a policy; heads that are not stored are from seed 0 (``load``)."""
    return dict(policy.state_dict())


def load(family: str, directory: Path) -> Any:
    """To act, with heads that are not stored drawn from seed 0."""
    torch.manual_seed(0)
    return FAMILIES[family].load(FAMILIES[family].locate(str(directory)), ActingSettings())


def load_run(directory: Path) -> dict[str, Any]:
    """All that a run is resumed and its policy is evaluated from."""
    checkpoint = resolve_checkpoint(directory)
    tensors, state = load_training_state(checkpoint)
    policy_dir = checkpoint / PRETRAINED
    policy = load("flow_mlp", policy_dir)
    return {
        "config.json": vars(saved_config(directory, TrainingConfig)),
        "training_state": (checkpoint_step(checkpoint), tensors, state),
        "policy": (weights(policy), policy.num_denoising_steps, policy.chunk_size),
        "reinflow.json": vars(stored_env(policy_dir)),
    }


def same_run(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Equal in every part, which is named."""
    for name, value in left.items():
        try:
            assert_same(value, right[name])
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.fixture(scope="session")
def own_run(undisturbed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of FAST with one checkpoint."""
    directory = tmp_path_factory.mktemp("own") / "run"
    shutil.copytree(undisturbed("--episodes", "2", "--keep-checkpoints", "1"), directory, symlinks=True)
    return directory


def files_of_run(directory: Path) -> list[Path]:
    """Of its last checkpoint, and its settings."""
    last = directory / "checkpoints" / LAST
    return sorted(path for path in (*last.resolve().rglob("*"), *directory.glob("config.json*")) if path.is_file())


def own_damages(own_run: Path, number: int, seed: str) -> tuple[Counter[str], list[str]]:
    return Trials(own_run, files_of_run(own_run), load_run, same_run, seed).run(number)


def test_some_damages_of_a_run(own_run: Path, tell: Callable[[str], None]) -> None:
    conclude("a run", 60, *own_damages(own_run, 60, "own"), tell)


@pytest.mark.slow
def test_damages_of_a_run(own_run: Path, tell: Callable[[str], None]) -> None:
    conclude("a run", MUTATIONS, *own_damages(own_run, MUTATIONS, "own slow"), tell)


def load_vla_checkpoint(directory: Path) -> dict[str, Any]:
    """A SmolVLA's checkpoint: what learns, and the policy as it is exported."""
    checkpoint = resolve_checkpoint(directory)
    tensors, state = load_training_state(checkpoint)
    return {
        "training_state": (tensors, state),
        "policy": _smolvla_content(checkpoint / PRETRAINED),
        "reinflow.json": vars(stored_env(checkpoint / PRETRAINED)),
    }


def _smolvla_content(directory: Path) -> tuple[Any, ...]:
    policy, before, after = load_smolvla(directory)
    steps = [step for pipeline in (before, after) for step in pipeline.steps]
    statistics = [dict(step.state_dict()) for step in steps]
    settings = [step.get_config() for step in steps]
    config = {k: str(v) for k, v in vars(policy.config).items()}
    return weights(policy), statistics, json.dumps(settings, default=str), config, _tokens(steps)


def _tokens(steps: list[Any]) -> list[int]:
    (tokenizer,) = (step.input_tokenizer for step in steps if hasattr(step, "input_tokenizer"))
    return tokenizer("pick up the block\n")["input_ids"]


@pytest.mark.slow
def test_damages_of_a_vla_checkpoint(tmp_path: Path, tell: Callable[[str], None]) -> None:
    policy = load("smolvla", model_dir() / "tiny_smolvla")

    def write(directory: Path) -> None:
        policy.save_pretrained(directory)
        for name, content in policy_card(EnvConfig()).items():
            (directory / name).write_text(content)

    save(tmp_path, 1, write, {"policy": policy.trainable_state()}, {"iteration": 1, "array": torch.arange(5)})
    files = files_of_run(tmp_path)
    number = MUTATIONS // 4
    trials = Trials(tmp_path, files, load_vla_checkpoint, same_run, "own vla")
    conclude("a SmolVLA's checkpoint", number, *trials.run(number), tell)


def load_lines(directory: Path) -> list[dict]:
    """As a run that is resumed reads its own lines, if there are any."""
    if not (directory / METRICS_FILE).exists():
        return []
    truncate_metrics(directory / METRICS_FILE, 20)
    return read_metrics(directory / METRICS_FILE)


def test_damaged_lines_are_no_traceback(tmp_path: Path, tell: Callable[[str], None]) -> None:
    lines = [json.dumps({"progress/iteration": float(i), "loss/value": 0.5 * i}) for i in range(1, 21)]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    trials = Trials(tmp_path, [tmp_path / METRICS_FILE], load_lines, lambda *_: None, "lines")
    conclude("metrics.jsonl", 100, *trials.run(100), tell)


# --- What others wrote ------------------------------------------------------------------------------------------------


def load_foreign(family: str) -> Content:
    """Weights of a policy directory that was written elsewhere."""
    if family == "smolvla":
        return lambda directory: weights(load_smolvla(directory)[0])
    return lambda directory: weights(load(family, directory))


def same_form(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, shapes and dtypes; every number finite."""
    assert left.keys() == right.keys(), f"names {sorted(left.keys() ^ right.keys())[:4]}"
    for name, tensor in right.items():
        old, new = (left[name].shape, left[name].dtype), (tensor.shape, tensor.dtype)
        assert old == new, f"{name} is {new}, not {old}"
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), f"{name} is not finite"


def foreign_damages(family: str, tmp_path: Path, number: int, seed: str) -> tuple[Counter[str], list[str]]:
    directory = clone(tmp_path / "policy", FAMILIES[family].folder)
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".md")
    return Trials(directory, files, load_foreign(family), same_form, f"{seed} {family}").run(number)


@pytest.mark.parametrize(("family", "number"), [("smolvla", 30), ("flow_mlp", 30)])
def test_some_damages_of_a_foreign_policy(
    tmp_path: Path, family: str, number: int, tell: Callable[[str], None]
) -> None:
    conclude(f"a foreign {family}", number, *foreign_damages(family, tmp_path, number, "some"), tell)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "share"), [("smolvla", 2), ("pi0", 8), ("flow_mlp", 8)])
def test_damages_of_a_foreign_policy(tmp_path: Path, family: str, share: int, tell: Callable[[str], None]) -> None:
    number = MUTATIONS // share
    conclude(f"a foreign {family}", number, *foreign_damages(family, tmp_path, number, "foreign"), tell)
