"""Which rows are retried together after the engine died."""

from batchvl.runner import poison
from batchvl.runner.poison import PoisonBisector
from batchvl.serving.exits import EngineExited
from batchvl.types import InlineImage, Row


def rows(*numbers):
    return [Row(number) for number in numbers]


def numbers(group):
    return [row.number for row in group]


def die(bisector, in_flight, answered=0):
    exited = EngineExited("dead")
    exited.answered = answered
    for row in in_flight:
        bisector.record_death(row, exited)
    return bisector.split()


def test_groups_are_halved_until_the_poison_row_was_alone_twice():
    bisector = PoisonBisector()
    assert die(bisector, rows(1, 2, 3, 4)) == ([], True)
    assert numbers(bisector.next_group()) == [1, 2]
    assert die(bisector, rows(1, 2)) == ([], True)
    assert numbers(bisector.next_group()) == [3, 4]
    assert numbers(bisector.next_group()) == [1]
    poison_rows, progress = die(bisector, rows(1))
    assert [(p.row.number, p.deaths) for p in poison_rows] == [(1, 3)]
    assert progress
    assert numbers(bisector.next_group()) == [2]
    assert bisector.next_group() is None


def test_a_row_that_was_alone_at_its_first_death_is_retried():
    bisector = PoisonBisector()
    assert die(bisector, rows(7)) == ([], False)
    assert numbers(bisector.next_group()) == [7]
    assert [p.row.number for p in die(bisector, rows(7))[0]] == [7]


def test_a_row_is_not_to_blame_if_the_process_had_answered_others():
    bisector = PoisonBisector()
    die(bisector, rows(7), answered=5)
    assert numbers(bisector.next_group()) == [7]
    assert die(bisector, rows(7), answered=5) == ([], False)
    assert numbers(bisector.next_group()) == [7], "it is next, so that its process is new and has answered nothing"


def test_two_deaths_are_two_groups():
    bisector = PoisonBisector()
    first, second = EngineExited("first"), EngineExited("second")
    for row in rows(1, 2):
        bisector.record_death(row, first)
    for row in rows(3, 4):
        bisector.record_death(row, second)
    bisector.split()
    assert [numbers(bisector.next_group()) for _ in range(4)] == [[1], [2], [3], [4]]


def test_full_by_rows_and_by_inline_bytes(monkeypatch):
    bisector = PoisonBisector()
    for row in rows(*range(poison.MAX_ROWS)):
        bisector.record_death(row, EngineExited("it died"))
    assert not bisector.full
    bisector.record_death(Row(9999), EngineExited("it died"))
    assert bisector.full
    bisector.split()
    assert not bisector.full
    monkeypatch.setattr(poison, "MAX_BYTES", 10)
    bisector.record_death(Row(1, images=(InlineImage(bytes(11), "x"),)), EngineExited("it died"))
    assert bisector.full
