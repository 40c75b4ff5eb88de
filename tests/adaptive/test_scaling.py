"""The scaling optimiser beside exhaustive search: exact under every limit; what is said where none can be kept."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import fields, replace

import numpy as np
import pytest
from scaling_cases import drawn

from sparing.adaptive import scaling
from sparing.adaptive.scaling import (
    InfeasibleError,
    Profile,
    ScalingOptimizer,
    bytes_moved,
    bytes_moved_whole,
    estimate_latency,
)
from sparing.core.errors import InvalidValue


def figures_of(profile: Profile) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(selections (N, B), drops, seconds, bytes (N,)) of all selections there are."""
    blocks, sizes = profile.drops.shape
    every = np.array(list(itertools.product(range(sizes), repeat=blocks)))
    at = np.arange(blocks)
    saved = (profile.latency[:, None] * profile.rel)[at, every].sum(1)
    held = profile.frame_bytes + profile.bytes[at, every].sum(1)
    return every, profile.drops[at, every].sum(1), profile.model_latency - saved, held


def limits_for(profile: Profile, seed: int) -> tuple[float, float]:
    """Limits between those of the smallest and the original network."""
    draw = np.random.default_rng(seed)
    _, _, seconds, held = figures_of(profile)
    return tuple(float(a.min() + draw.uniform(0.02, 1) * (a.max() - a.min())) for a in (seconds, held))


@pytest.mark.parametrize("method", ["enumerate", "milp"])
@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_all_selections_is_found(seed: int, method: str) -> None:
    profile = drawn(seed, noisy=seed % 2 == 0)
    every, drops, seconds, held = figures_of(profile)
    deadline, memory = limits_for(profile, seed)
    for max_latency, max_bytes in ((deadline, memory), (None, memory), (deadline, None), (None, None)):
        fits = (seconds <= (max_latency or math.inf)) & (held <= (max_bytes or math.inf))
        optimizer = ScalingOptimizer(profile)
        if not fits.any():
            with pytest.raises(InfeasibleError):
                optimizer.solve(max_latency, max_bytes, method=method)
            continue
        found = optimizer.solve(max_latency, max_bytes, method=method)
        assert found.est_accuracy == pytest.approx(profile.accuracy - drops[fits].min(), abs=1e-12)
        place = int(np.flatnonzero((every == found.options).all(1))[0])
        assert fits[place]
        assert not found.relaxed
        assert (found.est_latency, found.est_bytes) == pytest.approx((seconds[place], held[place]), rel=1e-12)
        assert found.sparsities == tuple(profile.sparsities[list(found.options)])


@pytest.mark.parametrize("seed", range(6))
def test_networks_that_share_memory_keep_a_deadline_each(seed: int) -> None:
    profiles = [drawn(10 * seed, 3, 4), drawn(10 * seed + 1, 2, 3), drawn(10 * seed + 2, 3, 2)]
    weights = [1.0, 3.0, 0.5]
    parts = [figures_of(profile) for profile in profiles]
    deadlines = [limits_for(profile, seed)[0] for profile in profiles]
    total = [part[3] for part in parts]
    share = np.random.default_rng(seed).uniform(0.1, 0.9)
    memory = sum(float(held.min() + share * (held.max() - held.min())) for held in total)
    best = math.inf
    for points in itertools.product(*(np.flatnonzero(p[2] <= d) for p, d in zip(parts, deadlines, strict=True))):
        if sum(part[3][i] for part, i in zip(parts, points, strict=True)) <= memory:
            best = min(best, sum(w * part[1][i] for w, part, i in zip(weights, parts, points, strict=True)))
    optimizer = ScalingOptimizer(profiles, weights=weights)
    if math.isinf(best):
        with pytest.raises(InfeasibleError, match=f"{memory:.0f}"):
            optimizer.solve(deadlines, memory)
        return
    for method in ("enumerate", "milp"):
        found = optimizer.solve(deadlines, memory, method=method)
        drops = [p.accuracy - s.est_accuracy for p, s in zip(profiles, found, strict=True)]
        assert sum(w * d for w, d in zip(weights, drops, strict=True)) == pytest.approx(best, abs=1e-12)
        assert sum(selection.est_bytes for selection in found) <= memory
        assert all(s.est_latency <= d for s, d in zip(found, deadlines, strict=True))


@pytest.mark.parametrize("limits", [(None, 1.0), (1e-9, None), (1e-9, 1.0)])
def test_what_cannot_be_kept_is_refused_with_the_least_that_can(limits: tuple[float | None, float | None]) -> None:
    profile = drawn(3)
    _, _, seconds, held = figures_of(profile)
    with pytest.raises(InfeasibleError) as caught:
        ScalingOptimizer(profile).solve(*limits)
    least = f"{seconds.min():.6g} s" if limits[0] else f"{math.ceil(held.min())} bytes"
    assert least in str(caught.value)
    assert f"{limits[0]:g}" in str(caught.value) if limits[0] else "max_bytes = 1 " in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_relaxed_limits_are_the_smallest_that_can_be_kept(seed: int) -> None:
    profile = drawn(seed)
    _, drops, seconds, held = figures_of(profile)
    deadline = float(np.quantile(seconds, 0.1))
    memory = float(held[seconds <= deadline].min()) - 1
    optimizer = ScalingOptimizer(profile)
    found = optimizer.solve(deadline, memory, relax=True)
    assert found.relaxed
    assert found.max_bytes == pytest.approx(memory + 1, rel=1e-12)
    assert found.max_latency == deadline
    fits = (seconds <= deadline) & (held <= memory + 1)
    assert profile.accuracy - found.est_accuracy == pytest.approx(drops[fits].min(), abs=1e-12)

    memory, impossible = float(np.quantile(held, 0.3)), float(seconds.min()) / 2
    found = optimizer.solve(impossible, memory, relax=True)
    assert found.relaxed
    assert found.est_bytes <= memory
    assert found.max_latency == pytest.approx(seconds[held <= memory].min(), rel=1e-9)
    assert found.est_latency == pytest.approx(seconds[held <= memory].min(), rel=1e-9)

    found = optimizer.solve(impossible, 1.0, relax=True)
    assert found.max_bytes == pytest.approx(held.min(), rel=1e-12)
    assert found.est_bytes == pytest.approx(held.min(), rel=1e-12)


def test_deadlines_of_several_networks_grow_by_one_factor() -> None:
    profiles = [drawn(1, 3, 3), drawn(2, 2, 4)]
    parts = [figures_of(profile) for profile in profiles]
    memory = sum(float(np.quantile(part[3], 0.4)) for part in parts)
    deadlines = [float(part[2].min()) / 2 for part in parts]
    least = min(
        max(parts[0][2][i] / deadlines[0], parts[1][2][j] / deadlines[1])
        for i, j in itertools.product(range(len(parts[0][2])), range(len(parts[1][2])))
        if parts[0][3][i] + parts[1][3][j] <= memory
    )
    found = ScalingOptimizer(profiles).solve(deadlines, memory, relax=True)
    assert [s.max_latency / d for s, d in zip(found, deadlines, strict=True)] == pytest.approx([least] * 2, rel=1e-9)
    assert all(selection.relaxed for selection in found)
    assert sum(selection.est_bytes for selection in found) <= memory * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_stepping_ends_where_trying_step_by_step_ends(seed: int) -> None:
    profile = drawn(seed)
    _, _, seconds, held = figures_of(profile)
    original = profile.frame_bytes + float(profile.bytes[:, 0].sum())
    optimizer = ScalingOptimizer(profile)
    for deadline, memory in (
        (float(np.quantile(seconds, 0.1)), float(held.min()) * 0.5),
        (float(seconds.min()) * 0.99, float(np.quantile(held, 0.5))),
    ):
        want_latency, want_memory = deadline, memory
        while not ((seconds <= want_latency) & (held <= want_memory)).any():
            if want_memory < held.min():
                want_memory = float(held.min())
            elif want_memory < original:
                want_memory += scaling.MEMORY_STEP
            else:
                want_latency += scaling.LATENCY_STEP
        found = optimizer.solve(deadline, memory, relax=True, stepping=True)
        assert found.relaxed
        assert (found.max_latency, found.max_bytes) == pytest.approx((want_latency, want_memory), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_that_of_all_selections(seed: int) -> None:
    profile = drawn(seed)
    _, drops, seconds, held = figures_of(profile)
    deadline = float(np.quantile(seconds, 0.4))
    for limit in (None, deadline):
        fits = seconds <= (limit or math.inf)
        order = np.lexsort((drops[fits], held[fits]))
        want, best = [], math.inf
        for i in order:
            if drops[fits][i] < best:
                best = drops[fits][i]
                want.append((held[fits][i], best))
        found = ScalingOptimizer(profile).pareto_front(limit)
        points = [(one.est_bytes, profile.accuracy - one.est_accuracy) for one in found]
        np.testing.assert_allclose(points, want, rtol=1e-9, atol=1e-12)
        assert all(one.est_latency <= (limit or math.inf) for one in found)
    with pytest.raises(InfeasibleError, match="cannot be kept"):
        ScalingOptimizer(profile).pareto_front(float(seconds.min()) / 2)


def test_the_front_of_several_networks_agrees_with_solving_at_each_of_its_points() -> None:
    optimizer = ScalingOptimizer([drawn(1, 3, 3), drawn(2, 2, 4)])
    front = optimizer.pareto_front()
    assert len(front) > 5
    for point in front:
        found = optimizer.solve([None, None], sum(one.est_bytes for one in point))
        assert sum(one.est_accuracy for one in found) == pytest.approx(
            sum(one.est_accuracy for one in point), abs=1e-12
        )


def test_hundreds_of_options_and_ties_are_no_trouble() -> None:
    profile = drawn(5, 6, 200, noisy=False)
    found = ScalingOptimizer(profile).solve(profile.model_latency * 0.6, float(profile.bytes[:, 0].sum()) * 0.6)
    exact = ScalingOptimizer(profile).solve(
        profile.model_latency * 0.6, float(profile.bytes[:, 0].sum()) * 0.6, method="milp"
    )
    assert found.est_accuracy == pytest.approx(exact.est_accuracy, abs=1e-9)
    same = drawn(6, 1, 5, noisy=False)
    repeated = {name: np.repeat(getattr(same, name), 12, axis=0) for name in ("drops", "bytes", "rel", "latency")}
    equal = replace(same, **repeated, model_latency=float(same.latency[0] * 12))
    found, exact = (
        ScalingOptimizer(equal).solve(equal.model_latency * 0.6, float(equal.bytes[:, 0].sum()) * 0.7, method=method)
        for method in ("auto", "milp")
    )
    assert found.est_accuracy == pytest.approx(exact.est_accuracy, abs=1e-9)


def test_highs_takes_over_where_too_much_is_within_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = drawn(8, 6, 5)
    deadline, memory = limits_for(profile, 1)
    usual = ScalingOptimizer(profile).solve(deadline, memory)
    monkeypatch.setattr(scaling, "MAX_STATES", 1)
    assert ScalingOptimizer(profile).solve(deadline, memory).est_accuracy == pytest.approx(usual.est_accuracy, abs=1e-9)


def test_a_choice_for_three_networks_takes_milliseconds() -> None:
    profiles = [drawn(seed, 8, 6, noisy=False) for seed in range(3)]
    optimizer = ScalingOptimizer(profiles)
    draw = np.random.default_rng(0)
    slowest = []
    for _ in range(20):
        deadlines = [
            one.model_latency - draw.uniform(0.1, 0.9) * float((one.latency[:, None] * one.rel).max(1).sum())
            for one in profiles
        ]
        memory = draw.uniform(optimizer.smallest_bytes * 1.1, optimizer.original_bytes)
        seconds = []
        for _ in range(5):
            start = time.thread_time()  # what else the machine does is not counted
            optimizer.solve(deadlines, memory)
            seconds.append(time.thread_time() - start)
        slowest.append(min(seconds))
    assert np.median(slowest) < 5e-3
    assert max(slowest) < 10e-3  # checking the shapes of all calls takes time, too


# --- the run-time estimate and switching


def test_a_machine_that_is_half_as_fast_doubles_every_latency() -> None:
    profile = drawn(4)
    current = [0, 1, 2, 3]
    measured = 2 * profile.latency * (1 - profile.rel[np.arange(4), current])
    now = estimate_latency(profile.latency, profile.rel, profile.model_latency, measured, current)
    assert not now.kept[np.abs(now.ratio - now.ratio.mean()) >= now.ratio.std()].any()
    np.testing.assert_allclose(now.ratio, 0.5)
    assert now.model_latency == pytest.approx(2 * profile.model_latency)
    np.testing.assert_allclose(now.block_latency, 2 * profile.latency)
    np.testing.assert_allclose(now.drop, 2 * profile.latency[:, None] * profile.rel)
    slow, usual = ScalingOptimizer(profile, now=now), ScalingOptimizer(profile)
    deadline = profile.model_latency * 0.7
    assert slow.solve(2 * deadline).options == usual.solve(deadline).options
    assert slow.solve(2 * deadline).est_latency == pytest.approx(2 * usual.solve(deadline).est_latency)


def test_a_block_that_was_disturbed_does_not_count() -> None:
    profile = drawn(4)
    measured = profile.latency * np.array([1, 1.02, 0.98, 5])
    now = estimate_latency(profile.latency, profile.rel, profile.model_latency, measured, [0] * 4)
    assert now.kept.tolist() == [True, True, True, False]
    assert now.mean_ratio == pytest.approx(np.mean([1, 1 / 1.02, 1 / 0.98]))


def test_switching_moves_only_what_changes() -> None:
    size = np.array([[10.0, 5, 1], [20, 8, 2]])
    assert bytes_moved(size, None, [0, 0]) == 0
    assert bytes_moved(size, [0, 0], [0, 2]) == 22
    assert bytes_moved(size, [0, 1], [0, 1]) == 0
    assert bytes_moved_whole(size, [0, 0], [0, 2]) == 42


# --- bad input


@pytest.mark.parametrize(
    ("limits", "named"),
    [((0.0, None), "0.0"), ((-1.0, None), "-1.0"), ((math.nan, None), "nan"), ((None, -5.0), "-5.0")],
)
def test_limits_are_positive_numbers(limits: tuple[float | None, float | None], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        ScalingOptimizer(drawn(1)).solve(*limits)


def test_bad_arguments_are_named() -> None:
    one = drawn(1)
    with pytest.raises(InvalidValue, match="2 deadlines"):
        ScalingOptimizer([one, one]).solve([0.1])
    with pytest.raises(InvalidValue, match="method = 'fast'"):
        ScalingOptimizer(one).solve(method="fast")  # type: ignore[call-overload]
    with pytest.raises(InvalidValue, match="at least one network"):
        ScalingOptimizer([])
    with pytest.raises(InvalidValue, match=r"weights = \[0.0\]"):
        ScalingOptimizer(one, weights=[0.0])
    with pytest.raises(InvalidValue, match="2 weights"):
        ScalingOptimizer(one, weights=[1.0, 1.0])
    with pytest.raises(InvalidValue, match="finite"):
        ScalingOptimizer(replace(one, drops=np.full_like(one.drops, np.nan)))
    with pytest.raises(InvalidValue, match=r"bytes \(4, 3\)"):
        ScalingOptimizer(replace(one, bytes=one.bytes[:, :3]))
    with pytest.raises(InvalidValue, match=r"options = \[0, 0, 0, 9\]"):
        ScalingOptimizer(one).selection([0, 0, 0, 9])
    with pytest.raises(InvalidValue, match=r"current = \[0, 0, 0, 4\]"):
        estimate_latency(one.latency, one.rel, 1.0, one.latency, [0, 0, 0, 4])
    with pytest.raises(InvalidValue, match="positive"):
        estimate_latency(one.latency, one.rel, 1.0, np.zeros(4), [0] * 4)
    with pytest.raises(InvalidValue, match=r"\(3,\)"):
        estimate_latency(one.latency, one.rel, 1.0, one.latency[:3], [0] * 4)


def test_without_a_deadline_times_decide_nothing_and_the_smaller_of_equals_is_taken() -> None:
    profile = drawn(3)
    even = replace(profile, drops=np.where(profile.sparsities > 0.7, 0.2, 0.0) * np.ones_like(profile.drops))
    third = tuple(int(row.argmin()) for row in np.where(even.drops > 0, np.inf, even.bytes))
    for seed in range(4):
        noisy = replace(even, rel=np.random.default_rng(seed).normal(0, 0.3, even.rel.shape))
        assert ScalingOptimizer(noisy).solve().options == third
        assert ScalingOptimizer(noisy).solve(max_bytes=1e9, method="milp").options == third


def test_a_profile_as_json_is_the_same_and_as_long_whatever_the_times_are() -> None:
    profile = drawn(0)
    again = Profile.from_config(json.loads(json.dumps(profile.to_config())))
    for item in fields(Profile):
        np.testing.assert_array_equal(getattr(again, item.name), getattr(profile, item.name))
    faster = replace(profile, latency=profile.latency / 3, rel=-profile.rel / 7, model_latency=1e-3)
    assert len(json.dumps(faster.to_config())) == len(json.dumps(profile.to_config()))
