"""Every benchmark still runs; what it measures is not tested."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mujoco.batch import Batch

from so101_sim.scene import PickScene
from tests.documented_commands import start, started_as

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))


def run(script: str, *flags: str) -> str:
    """Standard output of a benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(capsys: pytest.CaptureFixture[str], script: str, *flags: str) -> str:
    """The same without a process that imports torch and LeRobot once more."""
    capsys.readouterr()
    with started_as(script, flags):
        start(f"benchmarks/{script}")
    return capsys.readouterr().out


def quick(name: str, tmp_path: Path) -> dict[str, list[dict[str, str]]]:
    """A benchmark's CSV files by the name of the table ("" for the main one), run here: torch is imported once."""
    importlib.import_module(name).main(["--quick", "--csv", str(tmp_path / "table.csv")])
    tables = {}
    for path in tmp_path.glob("table*.csv"):
        with path.open() as file:
            tables[path.stem.removeprefix("table").removeprefix("_")] = list(csv.DictReader(file))
    return tables


def numbers(row: dict[str, str], unit: str) -> list[float]:
    """The columns that end in `unit`; empty cells are left out."""
    values = [float(value) for name, value in row.items() if name.endswith(unit) and value]
    assert values, (unit, row)
    return values


def test_kl_scaling(tmp_path, capsys):
    assert "KL" in run_here(capsys, "kl_scaling.py", "--quick", "--csv", str(tmp_path / "kl.csv"))
    assert len((tmp_path / "kl.csv").read_text().splitlines()) == 3


def test_perception(tmp_path):
    rows = quick("perception", tmp_path)[""]
    assert (
        rows[0]["block"] == "all" and 0 < float(rows[0]["median mm"]) < 15
    )  # 3.7; a prefix that forgot is off by more
    assert {row["block"].split()[0] for row in rows} == {"all", "r", "angle"}


def test_plot_runs_reads_recorded_metrics(tmp_path):
    recorded = ROOT / "tests/data/doctor/healthy_20_iterations/metrics.jsonl"
    lines = [json.loads(line) | {"time/iteration": 30.0} for line in recorded.read_text().splitlines()]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = run("plot_runs.py", str(tmp_path / "run"), "--png", str(tmp_path / "curve.png"), "--csv-dir", str(tmp_path))
    assert "run: before None, after None, 600" in out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    rows = (tmp_path / "run.csv").read_text().splitlines()
    assert len(rows) == 21
    assert rows[-1].split(",")[1] == f"{lines[-1]['progress/episodes']:.5g}"


def test_memory_plan_compares_plan_and_process(tmp_path, capsys):
    flags = ("--policy", "tiny-pi0", "--rows", "2", "--csv", str(tmp_path / "memory.csv"))
    out = run_here(capsys, "memory_plan.py", *flags)
    assert "forward and backward, 2 decisions" in out
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 5


def test_physics_compares_the_same_work(tmp_path):
    (row,) = quick("physics", tmp_path)[""]
    assert (row["envs"], row["threads"]) == ("2", "1")
    rates = numbers(row, "substeps/s")
    assert len(rates) == 4 and min(rates) > 0
    # One pass, so both are the same measurement.
    ours, batch = float(row["ours, substeps/s"]), float(row["mujoco.batch, substeps/s"])
    assert float(row["ours / batch"]) == pytest.approx(ours / batch)


def test_physics_variants_end_in_the_same_state():
    physics = importlib.import_module("physics")
    config = physics.tiny_env()
    work = physics.expert_work(config, 2, 2)
    scene = PickScene(config)
    batch = Batch(scene.model, 2, nthread=1)
    physics.batch_alone(batch, scene, physics.Work(work.states[:1], work.actions[:1]))()
    np.testing.assert_array_equal(batch.state, work.states[1]["integration"])


def test_rendering(tmp_path):
    tables = quick("rendering", tmp_path)
    (row,), (split,) = tables[""], tables["split"]
    assert len(numbers(row, ", ms")) == 5
    assert min(numbers(row, ", ms")) > 0
    assert float(split["mjr_readPixels, ms"]) > 0


def test_rollout_parts_add_up(tmp_path):
    tables = quick("rollout", tmp_path)
    assert [row["form"] for row in tables[""]] == ["sequential", "batched"]
    for row, policy in zip(tables[""], tables["policy"], strict=True):
        total = 1e3 / float(row["episodes/s"])
        assert sum(numbers(row, ", ms")) == pytest.approx(total, rel=1e-6)
        assert sum(numbers(policy, ", ms")) == pytest.approx(float(row["policy, ms"]), rel=1e-6)


def test_update(tmp_path):
    rows = quick("update", tmp_path)[""]
    assert {(row["K"], row["executed"]) for row in rows} == {("1", "50"), ("1", "10"), ("4", "50"), ("4", "10")}
    assert all(float(row["naive / this"]) == 1 for row in rows if row["update"] == "naive")
    encode = {row["update"]: float(row["encode"]) for row in rows if (row["K"], row["executed"]) == ("1", "50")}
    assert encode["cached"] < encode["embeddings"]
    assert encode["cached"] < encode["naive"]


def test_limit_counts_what_a_product_needs(tmp_path):
    limit, torch = importlib.import_module("limit"), importlib.import_module("torch")
    assert limit.count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5
    tables = quick("limit", tmp_path)
    assert {row["product"] for row in tables["peak"]} == {"large", "expert layer"}
    for row in tables[""]:
        assert 0 < float(row["needed, GFLOP"]) < float(row["done, GFLOP"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tmp_path):
    tables = quick("memory", tmp_path)
    (buffer,), (update,), (flat,) = tables["buffer"], tables["update"], tables["flat"]
    named = sum(int(buffer[name]) for name in ("context kv", "chain", "the rest"))
    assert 0 < named <= int(buffer["bytes a decision"])
    assert float(update["peak, MB"]) >= float(update["before, MB"]) > 0
    assert flat["iterations"] == "3"
    assert float(flat["highest, MB"]) >= float(flat["at the end, MB"]) > 0


def test_end_to_end(tmp_path):
    tables = quick("end_to_end", tmp_path)
    seconds = {row["what"]: float(row["seconds"]) for row in tables["startup"]}
    assert min(seconds.values()) > 0
    parts = ("--preset tiny: ready", "report before", "first iteration")
    assert seconds["the same with the report"] == pytest.approx(sum(seconds[name] for name in parts))
    assert sum(float(row["share"]) for row in tables["phases"][:-1]) == pytest.approx(1.0)


def test_times_of_a_round_make_the_ratio():
    common = importlib.import_module("_common")
    assert common.speed_ratio({"fast": [1.0, 2.0, 1.0], "slow": [2.0, 6.0, 4.0]}, "fast", "slow") == 3.0
    order = []

    def variant(name):
        return lambda: order.append(name) or 0.5

    times = common.interleaved({"a": variant("a"), "b": variant("b")}, repeats=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert times == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_gpu_script_says_what_is_missing():
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode != 0
    assert "sees no CUDA device" in done.stderr


@pytest.mark.slow
def test_ablation(tmp_path):
    assert "| baseline |" in run("ablation.py", "--quick", "--output-dir", str(tmp_path))


def test_outcomes_depend_on_policy_and_seed_alone(tmp_path):
    """The state-based policy: any number of environments and any vector form give the same episodes."""
    rows = quick("batch_invariance", tmp_path)[""]
    assert len(rows) == 6 and {row["form"] for row in rows} == {"batched", "sequential", "subproc"}
    assert all(row["same outcome"] == row["episodes"] for row in rows)
    assert len({row["success"] for row in rows}) == 1


@pytest.mark.slow
def test_warp_worlds(tmp_path):
    pytest.importorskip("mujoco_warp", reason='pip install "reinflow-so101[warp]"')
    (row,) = quick("warp_worlds", tmp_path)[""]
    parts = sum(float(row[f"{name}, s"]) for name in ("physics", "drawing", "the rest"))
    assert parts == pytest.approx(float(row["s for all"]))
    assert float(row["episodes/s"]) == pytest.approx(int(row["worlds"]) / float(row["s for all"]))


@pytest.mark.slow
def test_ranks(tmp_path):
    one, two = quick("ranks", tmp_path)[""]
    assert (one["ranks"], one["waiting"], two["ranks"]) == ("1", "0.0%", "2") and two["waiting"] != "0.0%"
    assert float(one["differs"]) == 0 and float(two["differs"]) < 1e-3
    assert all(rate > 0 for row in (one, two) for rate in numbers(row, ", s"))


def test_gym_speed(tmp_path):
    rows = quick("gym_speed", tmp_path)[""]
    assert all(rate > 0 for row in rows for rate in numbers(row, "steps/s"))


@pytest.mark.slow
def test_scale(tmp_path):
    """Every row adds up, and the heads alone are always faster."""
    run("scale.py", "--quick", "--csv", str(tmp_path / "scale.csv"))
    rows = list(csv.DictReader((tmp_path / "scale.csv").open()))
    assert len(rows) == 24
    for row in rows:
        shares = [float(row[name].rstrip("%")) for name in ("physics", "acting", "update", "sums")]
        assert abs(sum(shares) - 100) <= 2 and float(row["s"]) > 0
    heads = [float(row["s"]) for row in rows if row["learns"] == "heads"]
    whole = [float(row["s"]) for row in rows if row["learns"] == "whole expert"]
    assert all(h < w for h, w in zip(heads, whole, strict=True))
    here = {row["policy"]: row["GiB planned"] for row in rows if "this one" in row["on"]}
    assert "too many" in here["Pi0, 3.5 B"] and "too many" not in here["tiny, 3 M"]


def test_the_model_of_scale_knows_what_a_gpu_did():
    """A decision of 450 M took 12 ms on an H100 and 1,280 of an update 6 s, of operations as counted for the notes."""
    h100 = importlib.import_module("scale").H100
    assert 475e9 / h100.narrow + 10.8e9 / h100.wide == pytest.approx(0.0120, rel=0.15)
    assert 1280 * 131.6e9 / h100.wide == pytest.approx(6.03, rel=0.15)


def test_what_learners_add_up():
    """Gradients, and of a natural step both covariances and the direction."""
    scale, torch, presets = (importlib.import_module(name) for name in ("scale", "torch", "train_reinflow"))
    layer = torch.nn.Linear(3, 5)
    natural, adam = presets.PRESETS["tiny"], presets.PRESETS["pi0"]
    assert scale.added_up(adam, layer, list(layer.parameters())) == 20
    assert scale.added_up(natural, layer, list(layer.parameters())) == 20 + 4 * 4 + 5 * 5 + 20
