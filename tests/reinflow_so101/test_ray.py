"""Rollout workers on a real Ray cluster of this machine: the numbers of one process, whatever becomes of a worker."""

import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reinflow import ConfigError, rollout_workers
from reinflow.checksums import sha256
from reinflow.rollout import RolloutState
from reinflow.rollout_part import pack, unpack
from reinflow.rollout_workers import RolloutWorkerError, RolloutWorkers, connect, parts_of
from reinflow_so101.opening import make_run
from reinflow_so101.policies import FAMILIES
from reinflow_so101.workers import Copy, for_workers
from train_reinflow import PRESETS, rollout

ROOT = Path(__file__).parents[2]
SMALL = dict(
    num_parallel_envs=8, episodes_per_iteration=8, minibatch_size=2, gradient_accumulation_steps=1, num_threads=1,
    device="cpu", wandb_enabled=False,
)  # fmt: skip
ON_RAY = dict(rollout_backend="ray", num_rollout_workers=2)


def opened(preset: str, **changes):
    config, run = make_run(dataclasses.replace(PRESETS[preset], **SMALL, **changes), Path("unused"))
    run.current = RolloutState.start(run.policy, run.env, run.seeds)
    return SimpleNamespace(config=config, run=run, play=lambda: rollout(run, config))


def assert_same(one, other, atol: float = 0.0) -> None:
    """Two buffers."""
    for entry in dataclasses.fields(one):
        a, b = getattr(one, entry.name), getattr(other, entry.name)
        assert (a is None) == (b is None), entry.name
        pairs = {entry.name: (a, b)} if a is not None else {}
        if entry.name == "context":
            assert a.keys() == b.keys()
            pairs = {name: (a[name], b[name]) for name in a}
        for name, (left, right) in pairs.items():
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def same_metrics(one, other) -> None:
    names = {name for name in one if not name.startswith(("time/", "ray/"))}
    assert names == {name for name in other if not name.startswith(("time/", "ray/"))}
    assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-5)


@pytest.fixture(scope="module")
def played():
    """The same rollouts in one process and by two workers, of which one is killed while it plays the second.

    Only one tensor changes between the first and the second.
    """
    local, remote = opened("flow_mlp"), opened("flow_mlp", **ON_RAY)
    said: list[str] = []
    workers = remote.run.env
    workers.say = said.append
    kept = SimpleNamespace(local=local, remote=remote, workers=workers, said=said, buffers=[], metrics=[], counted=[])

    def both() -> None:
        kept.buffers.append((local.play(), remote.play()))
        kept.metrics.append((dict(local.run.metrics), dict(remote.run.metrics)))
        kept.counted.append([(run.episodes, run.timesteps, run._played) for run in (local.run, remote.run)])

    with pytest.MonkeyPatch.context() as patch:
        both()
        for run in (local.run, remote.run):
            with torch.no_grad():
                run.policy.head.weight.mul_(1.01)
        victim, broadcast, ask = workers.workers[1].opened.pid, workers._broadcast, workers._ask

        def stop_after(*args, **kwargs):
            sent = broadcast(*args, **kwargs)
            os.kill(victim, signal.SIGSTOP)  # so that it is in the middle of its part when it dies
            return sent

        def kill_after_the_first(question, hear=lambda _: None, replacing=True):
            def hear_and_kill(answer) -> None:
                if answer is not None and workers.workers[1].opened.pid == victim:
                    os.kill(victim, signal.SIGKILL)
                hear(answer)

            return ask(question, hear_and_kill, replacing)

        patch.setattr(workers, "_broadcast", stop_after)
        patch.setattr(workers, "_ask", kill_after_the_first)
        both()
    try:
        yield kept
    finally:
        workers.close()
        local.run.env.close()


def test_workers_play_what_one_process_plays(played):
    """To the bit, as both parts are whole tiles."""
    assert_same(*played.buffers[0])
    same_metrics(*played.metrics[0])
    assert played.counted[0][0] == played.counted[0][1]


def test_a_killed_worker_costs_no_number(played):
    assert_same(*played.buffers[1])
    same_metrics(*played.metrics[1])
    assert played.counted[1][0] == played.counted[1][1]
    assert [row["ray/workers_lost"] for _, row in played.metrics] == [0, 1]
    (message,) = [line for line in played.said if "was lost" in line]
    assert message.startswith("rollout worker 1 (environments 4-7, process ")


def test_only_what_changed_travels(played):
    policy = played.remote.run.policy
    everything = sum(tensor.nbytes for tensor in policy.trainable_state().values())
    sent = [row["ray/broadcast_mb"] * 1e6 for _, row in played.metrics]
    assert sent == [pytest.approx(everything), pytest.approx(policy.head.weight.nbytes)]
    buffer = played.buffers[0][1]
    tensors = [getattr(buffer, entry.name) for entry in dataclasses.fields(buffer) if entry.name != "context"]
    size = sum(t.nbytes for t in (*buffer.context.values(), *tensors) if t is not None)
    assert played.metrics[0][1]["ray/rollout_mb"] * 1e6 == pytest.approx(size)


def test_the_state_is_that_of_one_process_and_is_taken_up_from_one(played):
    local, remote = played.local.run, played.remote.run
    mine, theirs = local.env.get_state(), remote.env.get_state()
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        np.testing.assert_equal(theirs[name], values)
    for name in ("episodes", "decisions", "broken"):
        np.testing.assert_array_equal(getattr(remote.current, name), getattr(local.current, name))
    remote.current = RolloutState.at(
        remote.policy, remote.env.set_state(mine), local.current.episodes, local.current.decisions
    )
    assert_same(played.local.play(), played.remote.play())


def test_an_error_in_a_worker_is_told_on_one_line_and_not_tried_again(played):
    workers, before = played.workers, [worker.opened.pid for worker in played.workers.workers]
    with pytest.raises(RolloutWorkerError, match=r"^rollout worker \d \(environments .*\) failed: TypeError: ") as told:
        workers.collect_rollout(played.remote.run.current, "three", None, None, None, None)
    assert "\n" not in str(told.value) and re.search(r"\(.*rollout\.py:\d+\)$", str(told.value))
    assert [worker.opened.pid for worker in workers.workers] == before


def test_a_worker_without_room_in_the_cluster_is_said_and_not_awaited_for_ever(played, monkeypatch):
    for name in ("SAY_WAITS_S", "PLACE_TIMEOUT_S", "CLOSE_TIMEOUT_S"):
        monkeypatch.setattr(rollout_workers, name, 0.1)
    said: list[str] = []
    with pytest.raises(RolloutWorkerError, match=r"found no node of the Ray cluster with 1 CPU free \(0 CPU, 0 GPU"):
        RolloutWorkers(played.remote.run.policy, played.workers._make, 4, 1, say=said.append)
    assert said == ["rollout worker 0 waits for room in the Ray cluster, up to 0 s"]


def test_a_worker_that_is_lost_again_and_again_ends_the_run(played, monkeypatch):
    monkeypatch.setattr(rollout_workers, "LOSSES_IN_A_ROW", 1)
    worker = played.workers.workers[0]
    os.kill(worker.opened.pid, signal.SIGKILL)
    with pytest.raises(RolloutWorkerError, match=r"^rollout worker 0 \(environments 0-3, .* lost 1 times in a row"):
        played.remote.play()


# --- Without a cluster ------------------------------------------------------------------------------------------------


def test_parts_are_whole_tiles_where_every_worker_gets_one():
    assert parts_of(64, 3) == [range(20), range(20, 40), range(40, 64)]
    assert parts_of(9, 2) == [range(4), range(4, 9)]
    assert parts_of(6, 4) == [range(1), range(1, 3), range(3, 4), range(4, 6)]
    for num_envs in range(1, 40):
        for workers in range(1, num_envs + 1):
            parts = parts_of(num_envs, workers)
            assert [row for part in parts for row in part] == list(range(num_envs)) and all(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64])
def test_tensors_travel_as_they_are(dtype):
    tensor = torch.arange(-3, 9).reshape(3, 4).to(dtype)
    for sent in (tensor, tensor.T, tensor[0, 0]):
        assert torch.equal(unpack(pack(sent)), sent) and unpack(pack(sent)).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_rollout_workers=4), "num_rollout_workers=4 is not read with rollout_backend=local"),
        (dict(rollout_worker_gpus=0.5), "rollout_worker_gpus=0.5 is not read with rollout_backend=local"),
        (dict(rollout_backend="ray", num_rollout_workers=9), "exceeds num_parallel_envs=8"),
        (dict(ON_RAY, use_subproc_env=True), "use_subproc_env is not read with rollout_backend=ray"),
        (dict(ON_RAY, vector="warp"), "vector=warp is not read with rollout_backend=ray"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PRESETS["flow_mlp"], **SMALL, **changes)


def test_a_worker_refuses_another_policy_and_names_one_that_is_not_there(tmp_path):
    config = dataclasses.replace(PRESETS["flow_mlp"], **SMALL, **ON_RAY)
    directory = FAMILIES["flow_mlp"].directory("embedded")
    named = for_workers(config.policy(), config.policy_path, directory)
    assert named.policy_path == "embedded"  # its place differs from machine to machine
    assert for_workers(config.policy(), str(tmp_path), tmp_path).policy_path == str(tmp_path)
    right = Copy(named, config.env(), config.world(), 3, sha256(directory / "model.safetensors"))
    policy, env = right(4, "cpu", 1)
    assert env.num_envs == 4 and policy.chunk_size == config.chunk_size
    env.close()
    with pytest.raises(ConfigError, match="another policy than the driver's"):
        dataclasses.replace(right, weights="0" * 64)(4, "cpu", 1)
    gone = dataclasses.replace(named, policy_path=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="cannot be read on"):
        dataclasses.replace(right, policy=gone)(4, "cpu", 1)


def test_an_address_where_nobody_answers_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # it may be, for the tests above
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there \(.*refused\)"):
        connect(1)


def test_without_ray_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="rollout_backend=ray needs Ray: pip install"):
        connect(1)


# --- Whole runs -------------------------------------------------------------------------------------------------------


def trained(directory: Path, *flags: str) -> list[dict[str, float]]:
    """The metrics of a run by the command."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train_reinflow.py"), *flags, "--output-dir", str(directory)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


SHORT = [
    "--no-wandb", "--num-envs=8", "--episodes-per-iteration=8", "--minibatch-size=2", "--gradient-accumulation-steps=1",
    "--critic-warmup-iters=0", "--eval-interval=0", "--report-episodes=0", "--save-interval=1", "--num-threads=1",
    "--seed=3", "--lr-decay-ratio=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("first", ["local", "ray"])
def test_a_run_goes_on_with_workers_and_without(tmp_path, first):
    flags = {"local": ["--rollout-backend", "local"], "ray": ["--rollout-backend", "ray", "--num-rollout-workers", "2"]}
    second = {"local": "ray", "ray": "local"}[first]
    straight = trained(tmp_path / "straight", "--preset", "flow_mlp", *SHORT, "--episodes", "24")
    there = tmp_path / "there"
    trained(there, "--preset", "flow_mlp", *SHORT, *flags[first], "--episodes", "16")
    rows = trained(there, "--resume", *flags[second], "--episodes", "24")
    for one, other in zip(straight, rows, strict=True):
        same_metrics(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads", [dict(train_time_mlp=False, train_full_expert=False, prefix_cache="heads"), dict(heads_first=0.5)]
)
def test_heads_alone_send_heads_alone(heads):
    """A SmolVLA from pixels: what the heads read comes back in place of the prefix, and the numbers are the same."""
    local, remote = opened("tiny", **heads), opened("tiny", **heads, **ON_RAY)
    try:
        for _ in range(2):
            one, other = local.play(), remote.play()
            assert_same(one, other, atol=1e-5)
            assert other.head_inputs is not None
            for run in (local.run, remote.run):
                run.learner.update(one, lr_factor=1.0, critic_only=False)
        trained_bytes = sum(p.nbytes for group in remote.run.policy.trainable_groups().values() for p in group)
        assert remote.run.metrics["ray/broadcast_mb"] * 1e6 <= trained_bytes
    finally:
        local.run.env.close()
        remote.run.env.close()


@pytest.mark.slow
def test_a_lost_machine_costs_no_number(monkeypatch):
    """A head without workers and three nodes, of which one is lost with its worker and all that this had played."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    local, remote = opened("flow_mlp"), opened("flow_mlp", **ON_RAY)
    try:
        assert_same(local.play(), remote.play())
        import ray

        actors = {actor["ActorID"]: actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
        lost = actors[remote.run.env.workers[1].handle._actor_id.hex()]
        cluster.remove_node(next(node for node in nodes if node.node_id == lost), allow_graceful=False)
        assert_same(local.play(), remote.play())
        assert remote.run.metrics["ray/workers_lost"] >= 1
    finally:
        remote.run.env.close()
        local.run.env.close()
        cluster.shutdown()


def marked(mark: str) -> list[str]:
    """Processes with this word in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if mark.encode() in (entry / "environ").read_bytes() and "Z" not in (entry / "stat").read_text().split()[2]:
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_however_a_run_ends_no_process_is_left(tmp_path, number):
    """Ctrl-C, which a terminal sends to the whole group, ends it after the iteration at hand."""
    command = [sys.executable, str(ROOT / "train_reinflow.py"), "--preset", "flow_mlp", *SHORT, "--episodes", "100000"]
    command += ["--rollout-backend", "ray", "--num-rollout-workers", "2", "--output-dir", str(tmp_path / "run")]
    mark = f"REINFLOW_TEST={tmp_path}"
    env = os.environ | {"REINFLOW_TEST": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("iteration 2"):
                assert len([line for line in marked(mark) if line.startswith("ray::RolloutWorker")]) == 2
                (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
                break
        rest = run.stdout.read()
    if number == signal.SIGINT:
        assert run.returncode == 0 and "go on with: " in rest
    give_up = time.monotonic() + 60
    while marked(mark) and time.monotonic() < give_up:
        time.sleep(0.5)
    assert marked(mark) == []


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    table = tmp_path / "workers.csv"
    command = [sys.executable, str(ROOT / "benchmarks/workers.py"), "--quick", "--csv", str(table)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with table.open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["one process", "1 workers", "2 workers"]
    assert float(rows["2 workers"]["weights, MB"]) == float(rows["1 workers"]["weights, MB"]) > 1
    assert float(rows["2 workers"]["parts, MB"]) == float(rows["1 workers"]["parts, MB"]) > 0
