"""The memory planner: its figures against the allocator's records, its sums, its advice and its command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.memory_plan import allocated_peak, compare
from reinflow import ConfigError
from reinflow_so101.memory_planner.plan import (
    GIB,
    Limits,
    MemoryConfig,
    advice,
    fits,
    make_plan,
    parse_args,
    run,
    sweep_table,
    traced,
)
from reinflow_so101.memory_planner.trace import Linear, MemoryTrace, PassBytes, trace_passes
from reinflow_vla.directory import PolicyDirectoryError
from train_reinflow import PRESETS, make_policy

MIB = 2**20
PI0 = MemoryConfig(replace(PRESETS["pi0"], num_parallel_envs=8), Limits())


@pytest.fixture(scope="module")
def pi0_passes() -> PassBytes:
    """Of the published size; no weight of it is ever made."""
    return traced(PI0.training)


# --- Against what is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "optimizer"), [("tiny", "natural"), ("tiny-pi0", "natural"), ("tiny-pi0", "adam")])
def test_planned_bytes_are_within_15_percent_of_the_allocators(preset, optimizer):
    epochs = 1 if optimizer == "natural" else 2
    config = replace(
        PRESETS[preset], policy_optimizer=optimizer, num_ppo_epochs=epochs, prefix_cache="kv", num_threads=1
    )
    passes = trace_passes(config)
    policy = make_policy(config, "cpu")
    rows = compare(config, policy, passes, rows=6)
    assert {row.name.split(",")[0] for row in rows} == {"weights", "buffer", "encoding", "forward and backward"}
    for row in rows:
        assert abs(row.error) < 0.15, (row.name, row.planned, row.measured)


def test_allocator_and_trace_agree_on_a_known_peak():
    known = torch.ones(1000, 1000)

    def run_once() -> torch.Tensor:
        first = known + 1  # 4 MB
        second = first * 2  # 4 MB beside it
        del first
        return second.sum() + (second @ second).sum()  # 4 MB beside the second

    assert allocated_peak(run_once) == pytest.approx(8e6, rel=0.01)
    with MemoryTrace([known]) as trace:
        run_once()
    assert trace.peak == pytest.approx(8e6, rel=0.01) and trace.live == 0


def test_recomputation_and_adapters_save_what_they_should():
    plain = replace(PRESETS["tiny-pi0"], pi0_gradient_checkpointing=False)
    saving, adapted = replace(plain, pi0_gradient_checkpointing=True), replace(plain, peft_rank=2)
    passes = {name: trace_passes(c) for name, c in (("plain", plain), ("saving", saving), ("adapted", adapted))}
    assert passes["saving"].update("kv").per_row < 0.75 * passes["plain"].update("kv").per_row
    assert passes["adapted"].policy < 0.8 * passes["plain"].policy
    assert passes["adapted"].scalars > passes["plain"].scalars


# --- The published Pi0 ----------------------------------------------------------------------------------------------


def test_published_pi0_has_its_known_sizes(pi0_passes):
    assert pi0_passes.kept["kv"] == pytest.approx(15.0e6, rel=0.01)  # 3 cameras, bf16
    assert pi0_passes.policy == pytest.approx(4 * 315e6, rel=0.01)
    assert 7 < pi0_passes.frozen / GIB < 8.5


def test_pi0_on_24_gb_is_feasible_and_its_breakdown_adds_up(pi0_passes):
    plan = make_plan(PI0, pi0_passes)
    assert fits(plan, PI0) and "suffice" in advice(PI0, plan)
    assert plan.phase("update") == pytest.approx(plan.overhead * sum(row.update for row in plan.rows))
    assert plan.device_bytes == max(plan.phase("rollout"), plan.phase("update")) < 24 * GIB
    buffer = next(row for row in plan.rows if row.name == "rollout buffer")
    assert buffer.update == 120 * (pi0_passes.kept["kv"] + pi0_passes.rest)


def test_auto_moves_the_cache_before_it_gives_it_up(pi0_passes):
    many = replace(PI0, training=replace(PI0.training, episodes_per_iteration=512))
    plan = make_plan(many, pi0_passes)
    assert (plan.cache.keep, plan.cache.offload) == ("kv", True)
    assert plan.host_bytes > 1536 * pi0_passes.kept["kv"]
    tight = make_plan(replace(many, limits=Limits(ram_gb=20.0)), pi0_passes)  # half of either is too small for kv
    assert (tight.cache.keep, tight.cache.offload) == ("embeddings", True)
    granted = replace(many, training=replace(many.training, prefix_cache_gb=22.0))  # as the run: granted is granted
    assert not make_plan(granted, pi0_passes).cache.offload and not fits(make_plan(granted, pi0_passes), granted)
    # An update then runs the language model, too.
    assert pi0_passes.update("embeddings")(8) > pi0_passes.update("kv")(8)


def test_a_refused_prefix_cache_does_not_fit_and_is_still_advised(pi0_passes, capsys):
    small = replace(
        PI0, limits=Limits(ram_gb=20.0), training=replace(PI0.training, prefix_cache="kv", episodes_per_iteration=512)
    )
    plan = run(small)
    out = " ".join(capsys.readouterr().out.split())
    assert plan.refused and not fits(plan, small)
    assert "prefix_cache=kv needs" in out and "do not suffice; this switch does it: --prefix-cache auto" in out


@pytest.mark.parametrize("preset", ["tiny", "tiny-pi0"])
def test_heads_alone_are_planned_as_they_are_allocated(preset):
    heads = {"train_full_expert": False, "train_time_mlp": False, "peft_rank": 0}
    config = replace(PRESETS[preset], **heads, num_threads=1)
    passes, policy = trace_passes(config), make_policy(config, "cpu")
    assert policy.prefix_cache.keep == "heads"
    assert passes.kept["heads"] == policy.prefix_cache.bytes_per_decision
    assert passes.update("heads").per_row < 0.5 * passes.update("kv").per_row
    weights, buffer, _, backward = compare(config, policy, passes, rows=6)
    for row in (weights, buffer, backward):
        assert abs(row.error) < 0.15, (row.name, row.planned, row.measured)


def test_too_small_a_device_names_a_switch(pi0_passes):
    small = replace(PI0, limits=Limits(vram_gb=14.0))
    said = advice(small, make_plan(small, pi0_passes))
    assert "do not suffice" in said and "--peft-rank 16" in said
    tiny = MemoryConfig(PRESETS["tiny-pi0"], Limits(vram_gb=0.5))
    assert "no switch" in advice(tiny, make_plan(tiny, traced(tiny.training)))


def test_sweep_grows_with_envs_and_minibatch(pi0_passes):
    peaks = sweep_table(replace(PI0, limits=Limits(vram_gb=1000.0)), pi0_passes)
    assert all(row == sorted(row) for row in peaks)
    assert all(list(column) == sorted(column) for column in zip(*peaks, strict=True))


# --- The command ----------------------------------------------------------------------------------------------------


def test_command_prints_breakdown_sweep_and_verdict(capsys):
    flags = ["--preset", "tiny-pi0", "--rollout-backend", "ray", "--num-rollout-workers", "2"]
    sizes = ["--num-envs", "4", "--episodes-per-iteration", "8", "--vram-gb", "4", "--sweep"]
    plan = run(parse_args([*flags, *sizes], PRESETS))
    out = capsys.readouterr().out
    assert "rollout buffer" in out and "num_parallel_envs" in out and "4 GiB suffice" in out
    assert plan.device_bytes < 4 * GIB
    on_cpu = run(parse_args([*flags, "--for-device", "cpu", "--ram-gb", "0.5"], PRESETS))
    assert on_cpu.ram == () and "0.5 GiB RAM do not suffice" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(ConfigError, match="flow_mlp"):
        parse_args(["--preset", "flow_mlp"], PRESETS)
    with pytest.raises(ConfigError, match="vram_gb=-1"):
        Limits(vram_gb=-1)
    with pytest.raises(PolicyDirectoryError, match="no such directory"):
        trace_passes(replace(PRESETS["tiny"], pretrained_path="nowhere"))


def test_lines_go_through_two_measured_points():
    line = Linear.through(lambda rows: 10 + 3 * rows)
    assert line(7) == 31
