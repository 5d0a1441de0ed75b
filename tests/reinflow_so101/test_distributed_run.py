"""A training on two ranks: the numbers, files and ends of one process. Real processes on gloo, two or three sets."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from reinflow import ConfigError, UserError
from reinflow.checkpoint import load_training_state
from reinflow.evaluate import evaluate_seeds
from reinflow.metrics import read_metrics
from reinflow.ranks import in_ranks
from reinflow.rollout import noise_free_actor
from reinflow_so101.opening import make_policy
from reinflow_so101.worlds import make_world
from tests.faults.trainer import FAST
from train_reinflow import parse_args, start

ROOT = Path(__file__).parents[2]
TRAINING = [
    *FAST, "--num-envs", "8", "--episodes-per-iteration", "8", "--minibatch-size", "12", "--save-interval", "8",
    "--eval-interval", "1", "--eval-episodes", "5",
]  # fmt: skip
LONG = [*FAST, "--episodes", "100000", "--report-episodes", "3"]
# Measured behind steps: a natural one's inverted covariances of 24 decisions make a hundredfold of rounding, and so do
# many of Adam's in a row.
AFTER_A_STEP = {"ppo/decision_kl", "ppo/weights_moved", "gradients/critic_norm"}

# What both ranks do, one training after the other; the last two are ended from outside.
RANKS = """
import os, shutil, sys
from pathlib import Path
from reinflow import run_command, watch
from reinflow.distributed import from_writer, rank, wait_for_all
from reinflow.ranks import in_ranks
from tests.reinflow_so101.test_distributed_run import LONG, TRAINING
from train_reinflow import start

watch.SILENT_S = 5.0  # instead of 15
folder = Path(sys.argv[1])

def resume(name, *more):
    start(["--resume", "--output-dir", str(folder / name), *more])

def work():
    (folder / f"pid{rank()}").write_text(str(os.getpid()))
    start([*TRAINING, "--episodes", "16", "--output-dir", str(folder / "two")])
    from_writer(lambda: bool(shutil.copytree(folder / "two", folder / "two_on_two", symlinks=True)))
    resume("two_on_two", "--episodes", "24")
    resume("one_on_two", "--episodes", "24")
    start([*LONG, "--output-dir", str(folder / "long")])
    wait_for_all()
    resume("long")

run_command("training", lambda: in_ranks(work))
"""


def rows(directory: Path) -> list[dict[str, float]]:
    """Its metrics without times."""
    read = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in read]


def assert_same(mine: dict[str, float], theirs: dict[str, float], tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        allowed = 1e-3 if name in AFTER_A_STEP else tolerance
        assert value == pytest.approx(theirs[name], rel=allowed, abs=allowed), name


def wait_for(what: str, holds, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None and time.monotonic() < end, f"never came to {what}"
        time.sleep(0.05)


def iterations(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A training of three iterations in one process, and one of two beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    start([*TRAINING, "--episodes", "16", "--output-dir", str(folder / "one")])
    shutil.copytree(folder / "one", folder / "one_on_two", symlinks=True)
    start(["--resume", "--output-dir", str(folder / "one"), "--episodes", "24"])
    return folder


@pytest.fixture(scope="module")
def two(one) -> tuple[Path, str, float]:
    """What two ranks under torchrun did: the folder, what they said, and seconds from rank 1's death to the end."""
    script = one / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    said = one / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            [*command, str(one)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    try:
        wait_for("the long training", lambda: iterations(one / "long") >= 1, process)
        os.kill(int((one / "pid1").read_text()), signal.SIGTERM)
        wait_for("the end of the long training", lambda: "stopped at" in said.read_text(), process)
        (one / "stopped").write_text(str(iterations(one / "long")))
        shutil.copytree(one / "long" / "checkpoints", one / "stopped_checkpoints", symlinks=True)
        before = iterations(one / "long")
        wait_for("its next iterations", lambda: iterations(one / "long") > before, process)
        killed = time.monotonic()
        os.kill(int((one / "pid1").read_text()), signal.SIGKILL)
        assert process.wait(60) != 0
        return one, said.read_text(), time.monotonic() - killed
    finally:
        process.kill()


def test_first_iteration_is_that_of_one_process(two):
    folder, _, _ = two
    assert len(rows(folder / "two")) == 2
    first, alone = rows(folder / "two")[0], rows(folder / "one")[0]
    evaluated = {name for name in first if name.startswith("eval/")}  # of weights that an update has rounded
    assert evaluated
    assert_same(*({n: v for n, v in row.items() if n not in evaluated} for row in (first, alone)))
    assert first["eval/trained_share"] == alone["eval/trained_share"] == 0.0


def test_evaluation_before_training_has_the_rows_of_one_process(two):
    folder, _, _ = two
    config = parse_args(LONG)
    act = noise_free_actor(make_policy(config), config.chain())
    alone = evaluate_seeds(act, partial(make_world, config.world()), config.report_seed, 3, 4)
    mine = json.loads((folder / "long" / "eval_before.json").read_text())
    assert mine["per_episode"] == alone.to_lerobot_info("task")["per_episode"] and len(mine["per_episode"]) == 3


def test_one_rank_writes_and_speaks(two):
    folder, said, _ = two
    assert said.count(f"run directory: {folder / 'two'};") == 1 and said.count("finished 16 episodes") == 1
    assert "2 ranks, the first of them: policy on cpu, 1 torch threads; 4 environments" in said
    assert sorted(p.name for p in (folder / "two" / "checkpoints").iterdir())[:3] == ["000000", "000001", "000002"]
    state = load_training_state(folder / "two")[1]
    assert state["playing"].tolist() == [*range(16, 24)] and len(state["env"]["episodes"]) == 8


def test_a_run_of_one_process_goes_on_with_two_ranks(two):
    folder, _, _ = two
    assert len(rows(folder / "one_on_two")) == 3
    mine, alone = rows(folder / "one_on_two")[2], rows(folder / "one")[2]
    assert_same(*({n: v for n, v in row.items() if not n.startswith("eval/")} for row in (mine, alone)))


def test_a_run_of_two_ranks_goes_on_in_one_process(two):
    folder, _, _ = two
    shutil.copytree(folder / "two", folder / "two_on_one", symlinks=True)
    start(["--resume", "--output-dir", str(folder / "two_on_one"), "--episodes", "24"])
    alone, mine = rows(folder / "two_on_one")[2], rows(folder / "two_on_two")[2]
    assert_same(*({n: v for n, v in row.items() if not n.startswith("eval/")} for row in (mine, alone)))


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration(two):
    folder, said, _ = two
    assert "another rank was asked to stop: saving" in said
    done = int((folder / "stopped").read_text())
    assert f"stopped at {2 * done} episodes" in said
    assert (folder / "stopped_checkpoints" / "last").resolve().name == f"{done:06d}"


def test_a_rank_that_dies_ends_the_run_by_name(two):
    folder, said, seconds = two
    pid = (folder / "pid1").read_text()
    assert re.search(rf"training: rank 1 \(\S+, process {pid}\) died", said), said[-3000:]
    assert seconds < 30 and said.count("died, or has hung") == 1
    start(["--resume", "--output-dir", str(folder / "long"), "--episodes", "2"])  # its last checkpoint is whole


BARE = """
import sys
from reinflow import ConfigError, run_command
from reinflow.ranks import in_ranks

def work():
    from reinflow.distributed import rank, wait_for_all
    print("speaks:", rank())
    if rank() in map(int, sys.argv[1:]):
        raise ConfigError("field=1 is wrong: mend it")
    wait_for_all()

run_command("training", lambda: in_ranks(work))
"""


def bare(folder: Path, code: str, *arguments: str) -> list[subprocess.Popen]:
    """Two ranks without a launcher."""
    (folder / "bare.py").write_text(code)
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    own["MASTER_PORT"] = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "bare.py"), *arguments], cwd=ROOT, text=True,
            env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("wrong", [pytest.param("1", marks=pytest.mark.slow), "0 1"])
def test_an_error_of_one_rank_or_all_ends_all_and_is_said_once(tmp_path, wrong):
    ranks = bare(tmp_path, BARE, *wrong.split())
    outs, errors = zip(*[process.communicate(timeout=60) for process in ranks], strict=True)
    assert [p.returncode for p in ranks] == [1, 1]
    assert "".join(errors).count("training: field=1 is wrong: mend it") == 1 and "Traceback" not in "".join(errors)
    assert outs == ("speaks: 0\n", "")


def of_ranks(monkeypatch, number: int, other=lambda value: value) -> None:
    """This process takes itself for the first of several; ``other`` makes theirs of a value that it gathers."""
    from reinflow import distributed

    monkeypatch.setattr(distributed, "size", lambda: number)
    monkeypatch.setattr(distributed, "gather", lambda value: [value] + [other(value)] * (number - 1))


def test_a_world_size_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 .* but RANK is not set: start with torchrun"):
        in_ranks(lambda: None)


def test_environments_that_cannot_be_shared_are_refused(monkeypatch):
    of_ranks(monkeypatch, 3)
    with pytest.raises(ConfigError, match="num_parallel_envs=2 cannot be shared by 3 ranks"):
        start([*FAST, "--check"])


def test_ranks_with_other_settings_are_refused(monkeypatch):
    of_ranks(monkeypatch, 2, lambda settings: settings | {"seed": 4})
    with pytest.raises(ConfigError, match=r"^seed=1 on rank 0, 4 on rank 1: start all ranks with the same flags$"):
        start([*FAST, "--seed", "1", "--check"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("cuda", "GPU-1"), "device=auto: ranks share a GPU: start a rank for each GPU"),
        (("cpu", ""), "device=auto is cuda on rank 0, cpu on rank 1: name one that all ranks have"),
    ],
)
def test_ranks_on_one_gpu_or_on_several_kinds_of_device_are_refused(monkeypatch, other, message):
    import torch

    from reinflow_so101 import opening

    of_ranks(monkeypatch, 2, lambda value: other if isinstance(value, tuple) else value)
    monkeypatch.setattr(opening, "pick_device", lambda *_, **__: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-1"))
    with pytest.raises(ConfigError, match=message):
        start([*FAST, "--device", "auto", "--check"])


@pytest.mark.parametrize("wanted", ["0", "64"])
def test_ranks_of_one_machine_take_no_more_threads_than_their_share_of_its_cores(monkeypatch, wanted):
    import torch

    from reinflow.env import usable_cores

    whole = usable_cores()
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    start([*FAST, "--num-threads", wanted, "--check"])
    assert torch.get_num_threads() == max(1, whole // 2)


def test_a_wrong_flag_is_left_to_the_rank_that_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="Unrecognized options: --nun-envs"):
        parse_args(["--nun-envs", "8"])
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_without_a_launcher_notice_a_death_within_30_s(tmp_path, victim):
    code = "import sys; from train_reinflow import main; main()"
    arguments = [*FAST, "--episodes", "100000", "--output-dir", str(tmp_path / "run")]
    ranks = bare(tmp_path, code, *arguments)
    wait_for("iterations", lambda: iterations(tmp_path / "run") > 1, ranks[0])
    ranks[victim].kill()
    start_of_it = time.monotonic()
    _, error = ranks[1 - victim].communicate(timeout=60)
    assert time.monotonic() - start_of_it < 30
    assert re.search(rf"train_reinflow: rank {victim} .*died", error), error
    start(["--resume", "--output-dir", str(tmp_path / "run"), "--episodes", "2"])


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_within_30_s(tmp_path):
    code = "import sys; from train_reinflow import main; main()"
    ranks = bare(tmp_path, code, *FAST, "--episodes", "100000", "--output-dir", str(tmp_path / "run"))
    try:
        wait_for("iterations", lambda: iterations(tmp_path / "run") > 1, ranks[0])
        ranks[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _, error = ranks[0].communicate(timeout=60)
        assert time.monotonic() - stopped < 30 and "rank 1" in error and "has hung" in error
    finally:
        ranks[1].kill()


@pytest.mark.slow
def test_a_small_vision_policy_on_two_ranks(tmp_path):
    """The embedded SmolVLA: the first iteration's figures are those of one process, with whole tiles of rows a rank."""
    small = [
        "--preset", "tiny", "--no-wandb", "--num-envs", "8", "--episodes-per-iteration", "8", "--minibatch-size", "4",
        "--gradient-accumulation-steps", "1", "--critic-warmup-iters", "0", "--eval-interval", "0",
        "--report-episodes", "0", "--num-threads", "1", "--episodes", "8", "--device", "cpu",
    ]  # fmt: skip
    start([*small, "--output-dir", str(tmp_path / "one")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "train_reinflow.py", *small, "--output-dir", str(tmp_path / "two")], cwd=ROOT, check=True)
    assert_same(rows(tmp_path / "two")[0], rows(tmp_path / "one")[0], 1e-4)
