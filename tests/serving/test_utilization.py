"""The part of an engine's time, and of its waits, that counts."""

import pytest

from batchvl.serving.utilization import UtilizationMeter


@pytest.fixture
def meter():
    return UtilizationMeter()


def counted(meter):
    return meter.seconds, meter.wait_seconds


def test_time_counts_from_the_first_batch_to_the_last_answer_and_waits_to_the_last_batch(meter):
    meter.on_up(10)
    meter.on_wait(5, for_rows=True)
    meter.on_batch(15)
    meter.on_answers(17)
    assert counted(meter) == (2, 0), "the time before the first batch is start-up"
    meter.on_wait(8, for_rows=True)
    assert counted(meter) == (2, 0)
    meter.on_batch(20)
    meter.on_answers(24)
    assert counted(meter) == (9, 3)
    meter.on_wait(12, for_rows=True)
    meter.on_down(30)
    assert counted(meter) == (9, 3), "no batch and no answer followed"


def test_the_time_between_two_processes_is_left_out(meter):
    meter.on_up(0)
    meter.on_batch(0)
    meter.on_wait(1, for_rows=True)
    meter.on_down(10)
    meter.on_up(100)
    meter.on_wait(2, for_rows=True)
    meter.on_batch(102)
    meter.on_answers(105)
    assert counted(meter) == (15, 3)


def test_a_process_that_drains_does_not_wait_for_rows(meter):
    meter.on_up(0)
    meter.on_batch(0)
    meter.on_wait(1, for_rows=True)
    meter.on_wait(5, for_rows=False)
    meter.on_wait(6, for_rows=True)
    meter.on_batch(7)
    meter.on_answers(8)
    assert counted(meter) == (8, 2)


def test_an_engine_that_comes_up_after_the_first_batch_counts_from_then_on(meter):
    meter.on_batch(0)
    meter.on_up(10)
    meter.on_wait(4, for_rows=True)
    meter.on_batch(14)
    meter.on_answers(20)
    assert counted(meter) == (10, 4)
