"""What of an engine's time counts, and what of its waits."""

import pytest

from batchvl.serving.utilization import UtilizationMeter


@pytest.fixture
def uptime():
    return UtilizationMeter()


def counted(uptime):
    return uptime.seconds, uptime.wait_seconds


def test_from_the_first_list_to_the_last_answer_and_the_last_list(uptime):
    uptime.up(10)
    uptime.waited(5, for_rows=True)
    uptime.listed(15)
    uptime.answered(17)
    assert counted(uptime) == (2, 0), "what comes before the first list is the start"
    uptime.waited(8, for_rows=True)
    assert counted(uptime) == (2, 0)
    uptime.listed(20)
    uptime.answered(24)
    assert counted(uptime) == (9, 3)
    uptime.waited(12, for_rows=True)
    uptime.down(30)
    assert counted(uptime) == (9, 3), "no list and no answer came any more"


def test_the_time_between_two_processes_is_left_out(uptime):
    uptime.up(0)
    uptime.listed(0)
    uptime.waited(1, for_rows=True)
    uptime.down(10)
    uptime.up(100)
    uptime.waited(2, for_rows=True)
    uptime.listed(102)
    uptime.answered(105)
    assert counted(uptime) == (15, 3)


def test_a_process_that_is_to_be_replaced_waits_for_no_rows(uptime):
    uptime.up(0)
    uptime.listed(0)
    uptime.waited(1, for_rows=True)
    uptime.waited(5, for_rows=False)
    uptime.waited(6, for_rows=True)
    uptime.listed(7)
    uptime.answered(8)
    assert counted(uptime) == (8, 2)


def test_an_engine_that_comes_up_after_the_first_list_counts_from_then_on(uptime):
    uptime.listed(0)
    uptime.up(10)
    uptime.waited(4, for_rows=True)
    uptime.listed(14)
    uptime.answered(20)
    assert counted(uptime) == (10, 4)
