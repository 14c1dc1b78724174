"""The number of concurrent downloads, against simulated throughput and a clock of our own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.fetching.level import INITIAL, ConcurrencyLevel
from tests.fuzzing import examples

MAXIMUM = 2048
Capacity = Callable[[int], float]
"""Images per second by the number of concurrent downloads."""


def knee(latency: float, images_per_second: float, decline: float = 0.0) -> Capacity:
    """Throughput that grows with the number of downloads up to a limit, and then falls by a share per doubling."""

    def capacity(active: int) -> float:
        unlimited = active / latency
        if unlimited <= images_per_second:
            return unlimited
        return images_per_second * (images_per_second / unlimited) ** decline

    return capacity


def simulate(
    capacity: Capacity, seconds: float, *, maximum: int = MAXIMUM, available: int = 1 << 30, seed: int = 1
) -> tuple[ConcurrencyLevel, list[int], list[float]]:
    """Keep as many downloads in progress as the level allows.

    Args:
        capacity: The throughput.
        seconds: Duration.
        maximum: Limit of the level.
        available: Downloads that their hosts allow at the same time.
        seed: Of the durations' randomness.

    Returns:
        The level, its number at the end of each second, and the times at which downloads ended.
    """
    random_numbers, level, now = random.Random(seed), ConcurrencyLevel(maximum, 0.0), 0.0
    ends: list[tuple[float, float]] = []
    done: list[float] = []
    numbers: list[int] = []
    while now < seconds:
        while len(ends) < min(level.value, available):
            duration = (len(ends) + 1) / capacity(len(ends) + 1) * random_numbers.uniform(0.5, 1.5)
            heapq.heappush(ends, (now + duration, now))
        if len(ends) < available:
            level.limits(now)
        now, started = heapq.heappop(ends)
        level.complete(now, now - started)
        done.append(now)
        numbers += [level.value] * (int(now) - len(numbers))
    return level, numbers, done


def throughput(done: list[float], start: float, end: float) -> float:
    return sum(start <= time < end for time in done) / (end - start)


@pytest.mark.parametrize("latency", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("limit", [300.0, 1000.0])
@pytest.mark.parametrize("decline", [0.0, 0.5])
def test_it_reaches_the_knee_and_stays_near_it(latency: float, limit: float, decline: float) -> None:
    level, numbers, done = simulate(knee(latency, limit, decline), 120)
    reachable = min(limit, MAXIMUM / latency)
    if decline and latency * limit < INITIAL:
        reachable = knee(latency, limit, decline)(INITIAL)  # it never goes below the number that it starts with
    # A doubling has to raise the throughput by a fifth, so up to a sixth may be missing: 256 where 300 are best.
    assert throughput(done, 60, 120) >= 0.83 * reachable
    needed = max(INITIAL, limit * latency)
    assert sum(number > 4 * needed for number in numbers[30:]) == 0, "far more than what helps"
    late = numbers[60:]
    assert sum(number > 2 * needed for number in late) <= 0.25 * len(late), "attempts to raise it become rare"
    assert level.value <= 4 * needed


def test_it_grows_to_the_maximum_while_that_pays() -> None:
    _, numbers, _ = simulate(knee(1.0, 1e9), 40)
    assert numbers[30:] == [MAXIMUM] * len(numbers[30:])


def test_it_grows_within_seconds_per_doubling() -> None:
    _, numbers, _ = simulate(knee(0.4, 1e9), 20)
    assert next(second for second, number in enumerate(numbers) if number >= 1024) <= 15


def test_it_stays_while_hosts_and_not_the_number_limit_the_downloads() -> None:
    level, _, _ = simulate(knee(0.4, 1e9), 30, available=40)
    assert level.value == INITIAL


def test_it_never_exceeds_a_small_maximum() -> None:
    level, numbers, _ = simulate(knee(0.4, 1e9), 20, maximum=5)
    assert level.value == 5
    assert set(numbers) == {5}


def test_a_number_that_no_longer_pays_is_tried_again_later() -> None:
    """The web, or the hosts of this part of the manifest, become faster."""
    slow, fast = knee(0.4, 150), knee(0.4, 1200)
    calls = 0

    def capacity(active: int) -> float:
        nonlocal calls
        calls += 1
        return slow(active) if calls < 9000 else fast(active)  # for a minute

    _, _, done = simulate(capacity, 240)
    assert throughput(done, 30, 55) >= 0.85 * 150
    assert throughput(done, 180, 240) >= 0.85 * 1200


def test_it_rises_soon_when_none_ends() -> None:
    """All downloads are with hosts that do not respond."""
    level, times = ConcurrencyLevel(MAXIMUM, 0.0), []
    for tenth in range(100):
        before = level.value
        level.limits(tenth / 10)
        if level.value > before:
            times.append(tenth / 10)
            assert level.stalls_at is not None
            assert tenth / 10 < level.stalls_at < tenth / 10 + 10
    assert times == [1.0, 3.0, 7.0]


def test_it_does_not_rise_after_a_time_in_which_something_else_held_the_downloads_up() -> None:
    level = ConcurrencyLevel(MAXIMUM, 0.0)
    level.limits(0.1)
    level.is_enough(59.0)
    level.limits(59.9)
    assert level.value == INITIAL
    level.limits(60.0)
    assert level.value == 2 * INITIAL


def test_it_does_not_stall_at_its_maximum() -> None:
    assert ConcurrencyLevel(INITIAL, 0.0).stalls_at is None


def test_it_does_not_rise_when_one_ends_now_and_then() -> None:
    level = ConcurrencyLevel(MAXIMUM, 0.0)
    level.complete(0.0, 0.0)
    for tenth in range(19):
        level.limits(tenth / 10)
        if not tenth % 5:
            level.complete(tenth / 10, 5.0)  # two of these take longer than the window yet
    assert level.value == INITIAL


def test_after_a_collapse_it_rises_however_long_the_next_attempt_is_away() -> None:
    """Hosts that do not respond take all but a few of the downloads, long after the last attempt that paid."""
    level, now = ConcurrencyLevel(MAXIMUM, 0.0), 0.0
    for _ in range(300 * 200):
        now += 1 / 200
        level.limits(now)
        level.complete(now, INITIAL / 200)
    held, clogged = level.value, now
    while now < clogged + 5:
        now += 0.3 / (level.value - held + 2)  # two of those that were in progress are left to the others
        level.limits(now)
        level.complete(now, 0.3)
    assert level.value > held


@settings(max_examples=examples(100))
@given(
    st.lists(st.tuples(st.floats(0, 30), st.floats(0, 100), st.booleans()), max_size=200), st.integers(1, 4 * MAXIMUM)
)
def test_the_number_stays_within_its_limits(steps: list[tuple[float, float, bool]], maximum: int) -> None:
    level, now = ConcurrencyLevel(maximum, 0.0), 0.0
    for pause, seconds, is_limiting in steps:
        now += pause
        if is_limiting:
            level.limits(now)
        level.complete(now, seconds)
        assert min(INITIAL, maximum) <= level.value <= maximum
