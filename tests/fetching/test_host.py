"""Decisions about one host, concurrency, rate and circuit breaker: simulated servers, and a clock of our own."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.fetching.host import (
    FAILURES,
    FIRST_FAILURES,
    INITIAL_CONCURRENCY,
    MAX_PAUSE_SECONDS,
    MAX_PROBE_SECONDS,
    Host,
)
from tests.fuzzing import examples

PER_HOST = 16


def make(concurrency: int = PER_HOST, rate: float | None = None) -> Host:
    return Host("example.org:80", concurrency, rate)


class Limiter(Protocol):
    """A server's limit. Returns None to accept a request, or the seconds of its Retry-After (0: it has none)."""

    def __call__(self, now: float) -> float | None: ...


class TokenBucket:
    """So many requests per second, and a burst after a pause."""

    def __init__(self, rate: float, burst: float, retry_after: bool = False) -> None:
        self._rate, self._burst, self._tokens, self._time, self._tells = rate, burst, burst, 0.0, retry_after

    def __call__(self, now: float) -> float | None:
        self._tokens = min(self._burst, self._tokens + self._rate * (now - self._time))
        self._time = now
        if self._tokens < 1 - 1e-9:
            return float(int(1 + (1 - self._tokens) / self._rate)) if self._tells else 0.0
        self._tokens -= 1
        return None


class LeakyBucket:
    """No request sooner than 1/rate after the one before, as with nginx's limit_req without a burst."""

    def __init__(self, rate: float) -> None:
        self._interval, self._next = 1 / rate, 0.0

    def __call__(self, now: float) -> float | None:
        if now < self._next - 1e-9:
            return 0.0
        self._next = now + self._interval
        return None


class SlidingWindow:
    """So many requests in any window of some seconds; who sends more is banned for a minute."""

    def __init__(self, count: int, seconds: float, ban: float = 0.0) -> None:
        self._count, self._seconds, self._ban, self._until = count, seconds, ban, 0.0
        self._times: list[float] = []

    def __call__(self, now: float) -> float | None:
        if now < self._until:
            return 0.0
        self._times = [time for time in self._times if time > now - self._seconds]
        if len(self._times) >= self._count:
            self._until = now + self._ban
            return 0.0
        self._times.append(now)
        return None


@dataclass
class Simulation:
    """What a host saw."""

    accepted: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    max_active: int = 0

    def rate(self, start: float, end: float) -> float:
        """Accepted requests per second in an interval."""
        return sum(start <= time < end for time in self.accepted) / (end - start)

    @property
    def seconds(self) -> float:
        return max(self.accepted)


def simulate(
    host: Host,
    limiter: Callable[[float], float | None],
    requests: int,
    *,
    latency: float = 0.1,
    until: float = 1e6,
    seed: int = 1,
) -> Simulation:
    """Send requests to a host until all are accepted, as the dispatcher does: a rejected one waits for another turn."""
    random_numbers = random.Random(seed)
    result, now, left = Simulation(), 0.0, requests
    events: list[tuple[float, int, float, float | None]] = []
    serial = 0
    while now < until and (left or events):
        at = host.ready_at(now) if left else None
        if at is not None and (not events or at <= events[0][0]):
            now = at
            host.start(now)
            left -= 1
            serial += 1
            answer = limiter(now)
            (result.accepted if answer is None else result.rejected).append(now)
            result.max_active = max(result.max_active, host.active)
            heapq.heappush(events, (now + latency * random_numbers.uniform(0.5, 1.5), serial, now, answer))
            continue
        assert events, "nothing is in progress, and no request may ever start"
        now, _, started, answer = heapq.heappop(events)
        host.end()
        if answer is None:
            host.respond()
        else:
            host.reject(now, started, answer)
            left += 1
    return result


def start_all(host: Host, now: float) -> int:
    """Start all requests that may start now. Return how many."""
    count = 0
    while host.ready_at(now) == now:
        host.start(now)
        count += 1
    return count


def fail(host: Host, now: float) -> None:
    """Send one request that fails for a reason of the host's."""
    host.start(now)
    host.end()
    host.fail(now)


def test_concurrency_starts_low_and_doubles_with_each_round_of_answers() -> None:
    host, rounds = make(), []
    for now in range(4):
        rounds.append(start_all(host, now))
        for _ in range(rounds[-1]):
            host.end()
            host.respond()
    assert rounds == [INITIAL_CONCURRENCY, 8, 16, 16]


def test_the_limit_of_concurrency_holds_from_the_start() -> None:
    host = make(concurrency=2)
    assert start_all(host, 0) == 2
    assert host.ready_at(0) is None, "one of them has to end first"
    host.end()
    host.respond()
    assert start_all(host, 1) == 1


def test_failures_halve_the_concurrency_and_responses_restore_it() -> None:
    host = make()
    for _ in range(PER_HOST):
        host.start(0)
        host.end()
        host.respond()
    for count in (16, 8, 4):
        assert start_all(host, 1) == count
        for _ in range(count):
            host.end()
        host.fail(1)
    for _ in range(PER_HOST):
        host.start(2)
        host.end()
        host.respond()
    assert start_all(host, 3) == PER_HOST


@pytest.mark.parametrize("responses", [0, 1])
def test_failures_in_a_row_open_the_breaker(responses: int) -> None:
    host, limit = make(), FAILURES if responses else FIRST_FAILURES
    for _ in range(responses):
        host.start(0)
        host.end()
        host.respond()
    for number in range(limit):
        assert host.opened is None
        fail(host, float(number))
    assert host.opened == limit - 1
    assert not host.is_paced


def test_a_response_in_between_keeps_the_breaker_closed() -> None:
    host = make()
    for number in range(100):
        host.start(number)
        host.end()
        if number % FAILURES == 0:
            host.respond()
        else:
            host.fail(number)
    assert host.opened is None


def opened(now: float = 0.0) -> Host:
    host = make()
    for _ in range(FIRST_FAILURES):
        fail(host, now)
    assert host.opened == now
    return host


def test_an_open_breaker_lets_one_probe_through_after_twice_the_time_of_the_last() -> None:
    host, now, waits = opened(), 0.0, []
    for _ in range(7):
        at = host.ready_at(now)
        assert at is not None
        waits.append(at - now)
        host.start(at)
        assert host.ready_at(at) is None, "one probe at a time"
        host.end()
        host.fail(at)
        now = at
    assert waits == [1, 2, 4, 8, 16, MAX_PROBE_SECONDS, MAX_PROBE_SECONDS]


def test_a_response_closes_the_breaker_and_probes_begin_with_a_second_again() -> None:
    host = opened()
    for now in (1.0, 3.0):
        fail(host, now)
    host.start(7)
    host.end()
    host.respond()
    assert host.opened is None
    assert host.ready_at(7) == 7
    for _ in range(FAILURES):
        fail(host, 10)
    assert host.opened == 10
    assert host.ready_at(10) == 11


def test_requests_that_were_in_progress_when_the_breaker_opened_are_no_probes() -> None:
    host = make()
    for _ in range(PER_HOST):
        host.start(0)
        host.end()
        host.respond()
    assert start_all(host, 1) == PER_HOST
    for _ in range(PER_HOST):
        host.end()
        host.fail(2)  # a restart of the server ends all connections at once
    assert host.opened == 2
    assert host.ready_at(2) == 3, "the first probe follows after a second"


def test_rejections_of_requests_that_were_in_progress_when_the_breaker_opened_are_no_probes() -> None:
    host = make()
    assert start_all(host, 0) == INITIAL_CONCURRENCY
    for _ in range(INITIAL_CONCURRENCY):
        host.end()
        host.reject(1, 0, 3600)
    assert host.opened == 1
    assert host.ready_at(1) == 1 + MAX_PAUSE_SECONDS


def test_downloads_wait_for_a_host_until_its_patience_ends_and_its_probe_has_failed() -> None:
    host = opened()
    assert host.may_wait(29.9, 30)
    assert host.may_wait(31, 30), "a probe is due"
    host.start(31)
    assert host.may_wait(41, 30), "a probe is in progress"
    host.end()
    host.fail(41)
    assert not host.may_wait(41, 30)
    host.probe_now()
    assert host.may_wait(41, 30)
    assert host.ready_at(41) == 41


def test_a_closed_breaker_has_no_limit_of_patience() -> None:
    host = make()
    fail(host, 0)
    assert host.may_wait(1e9, 0)


def test_retry_after_is_kept() -> None:
    host = make()
    host.start(0)
    host.end()
    host.reject(0.1, 0, 20)
    assert host.opened is None
    assert host.is_paced
    at = host.ready_at(0.1)
    assert at is not None
    assert at >= 20.1


def test_a_host_that_asks_for_hours_is_probed_after_a_minute_and_used_if_it_responds() -> None:
    host = make()
    host.start(0)
    host.end()
    host.reject(0, 0, 86_400)
    assert host.opened == 0
    assert host.ready_at(0) == MAX_PAUSE_SECONDS
    host.start(MAX_PAUSE_SECONDS)
    host.end()
    host.respond()
    at = host.ready_at(MAX_PAUSE_SECONDS)
    assert at is not None
    assert at <= 2 * MAX_PAUSE_SECONDS, "it responds again"


@pytest.mark.parametrize("latency", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("rate", [5.0, 20.0])
@pytest.mark.parametrize("retry_after", [False, True])
def test_a_token_bucket(rate: float, latency: float, retry_after: bool) -> None:
    share = 0.75 if retry_after and latency > 1 else 0.9  # Retry-After is in whole seconds
    for seed in range(3):
        result = simulate(make(), TokenBucket(rate, rate, retry_after), 2000, latency=latency, seed=seed)
        assert len(result.accepted) == 2000, "every request got through"
        assert result.rate(10, result.seconds) >= share * min(rate, PER_HOST / latency)
        assert len(result.rejected) <= (220 if latency > 1 else 120)


@pytest.mark.parametrize("latency", [0.02, 0.3])
@pytest.mark.parametrize("rate", [1.0, 10.0])
def test_a_leaky_bucket_without_a_burst(rate: float, latency: float) -> None:
    result = simulate(make(), LeakyBucket(rate), 600, latency=latency)
    assert len(result.accepted) == 600
    assert result.rate(60, result.seconds) >= 0.85 * rate, "it may be no faster than the limit, ever"
    assert len(result.rejected) <= 45


def test_a_sliding_window() -> None:
    result = simulate(make(), SlidingWindow(200, 10), 5000)
    assert len(result.accepted) == 5000
    assert result.rate(60, result.seconds) >= 0.8 * 20


def test_a_sliding_window_that_bans_for_a_minute() -> None:
    """Each discovery of the limit costs a minute, so the rate has to stay below it for long."""
    result = simulate(make(), SlidingWindow(200, 10, ban=60), 5000)
    assert len(result.accepted) == 5000
    assert result.rate(0, result.seconds) >= 0.15 * 20
    assert len(result.rejected) <= 200


def test_one_request_a_minute() -> None:
    result = simulate(make(), LeakyBucket(1 / 60), 20)
    assert len(result.accepted) == 20
    assert result.seconds <= 1.6 * 20 * 60
    assert len(result.rejected) <= 2 * 20


def test_a_limit_that_is_lifted_is_forgotten_within_minutes() -> None:
    host = make()
    limiter = TokenBucket(2, 2)
    result = simulate(host, lambda now: limiter(now) if now < 60 else None, 5000)
    assert result.seconds <= 240
    assert result.rate(result.seconds - 10, result.seconds) >= 50


def test_a_limited_host_gets_evenly_spaced_requests() -> None:
    result = simulate(make(), TokenBucket(10, 1), 500)
    gaps = [later - earlier for earlier, later in zip(result.accepted[300:], result.accepted[301:], strict=False)]
    assert min(gaps) >= 0.05


def test_a_limit_that_returns_is_respected_again_at_once() -> None:
    """However high the rate has become in the meantime."""
    limits = TokenBucket(20, 20), TokenBucket(20, 20)

    def limiter(now: float) -> float | None:
        return limits[0](now) if now < 30 else None if now < 1000 else limits[1](now)

    host = make()
    result = simulate(host, limiter, 400_000, latency=0.05, until=1060)
    assert result.rate(900, 1000) >= 200
    assert host.opened is None
    assert sum(time >= 1000 for time in result.rejected) <= 200
    assert result.rate(1020, 1060) >= 0.85 * 20


@pytest.mark.parametrize("rate", [0.01, 0.5, 7.0])
def test_a_rate_that_the_user_sets_is_never_exceeded(rate: float) -> None:
    result = simulate(make(rate=rate), lambda _: None, 100)
    assert result.seconds == pytest.approx(99 / rate, rel=0.01)
    limited = simulate(make(rate=rate), TokenBucket(rate / 2, 1), 100)
    assert limited.seconds >= 99 / rate


def test_a_single_rejection_among_many_responses_changes_nothing() -> None:
    host = make()
    for _ in range(2):
        for _ in range(20):
            host.start(0)
            host.end()
            host.respond()
        host.start(0)
        host.end()
        host.reject(0, 0, 0)
    assert not host.is_paced
    host.start(0)
    host.end()
    host.reject(0, 0, 0)
    assert host.is_paced, "two in a row are the host's"


def test_rejections_at_the_same_time_are_one_decrease() -> None:
    burst, single = make(), make()
    for host, count in ((burst, 8), (single, 1)):
        for _ in range(PER_HOST):
            host.start(0)
            host.end()
            host.respond()
        for _ in range(8):
            host.start(10)
        for number in range(8):
            host.end()
            if number < count:
                host.reject(10.1, 10, 0)
    assert burst.ready_at(10.1) == single.ready_at(10.1)
    assert burst.opened is None


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 100),
        st.sampled_from(["start", "respond", "fail", "reject", "neither", "probe"]),
        st.one_of(st.just(0.0), st.floats(0, 1e9)),
    ),
    max_size=60,
)


@settings(max_examples=examples(300))
@given(EVENTS, st.integers(1, 20), st.one_of(st.none(), st.floats(0.001, 1000)))
def test_a_host_with_nothing_in_progress_can_be_asked_within_minutes(
    events: list[tuple[float, str, float]], concurrency: int, rate: float | None
) -> None:
    """Whatever happens to its requests, a queue can start again: soon, and not only at the end of all days."""
    host, now = make(concurrency, rate), 0.0
    started: list[float] = []
    interval = max(60.0, 1 / rate if rate else 0.0)
    for seconds, kind, retry_after in events:
        now += seconds
        if kind == "start":
            if (at := host.ready_at(now)) is not None:
                assert at >= now
                now = at
                host.start(now)
                started.append(now)
        elif kind == "probe":
            host.probe_now()
        elif started:
            begun = started.pop(0)
            host.end()
            if kind == "respond":
                host.respond()
            elif kind == "fail":
                host.fail(now)
            elif kind == "reject":
                host.reject(now, begun, retry_after)
        assert host.active == len(started) <= concurrency
        at = host.ready_at(now)
        if not started:
            assert at is not None
            assert at <= now + max(MAX_PAUSE_SECONDS, MAX_PROBE_SECONDS) + 2 * interval
        elif at is None:
            assert host.opened is not None or len(started) <= concurrency
