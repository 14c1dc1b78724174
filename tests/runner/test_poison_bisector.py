"""Who is tried again with whom, after the engine died."""

from batchvl.runner import poison as suspects
from batchvl.runner.poison import PoisonBisector
from batchvl.serving.exits import EngineExited
from batchvl.types import InlineImage, Row


def rows(*numbers):
    return [Row(number) for number in numbers]


def numbers(group):
    return [row.number for row in group]


def die(held, blamed, answered=0):
    died = EngineExited("dead")
    died.answered = answered
    for row in blamed:
        held.blame(row, died)
    return held.sift()


def test_halves_until_the_culprit_is_alone_twice():
    held = PoisonBisector()
    assert die(held, rows(1, 2, 3, 4)) == ([], True)
    assert numbers(held.next_group()) == [1, 2]
    assert die(held, rows(1, 2)) == ([], True)
    assert numbers(held.next_group()) == [3, 4]
    assert numbers(held.next_group()) == [1]
    culprits, progress = die(held, rows(1))
    assert [(c.row.number, c.deaths) for c in culprits] == [(1, 3)]
    assert progress
    assert numbers(held.next_group()) == [2]
    assert held.next_group() is None


def test_a_row_that_was_alone_at_its_first_death_gets_another_try():
    held = PoisonBisector()
    assert die(held, rows(7)) == ([], False)
    assert numbers(held.next_group()) == [7]
    assert [c.row.number for c in die(held, rows(7))[0]] == [7]


def test_a_death_of_a_process_that_had_answered_others_is_not_yet_the_rows():
    held = PoisonBisector()
    die(held, rows(7), answered=5)
    assert numbers(held.next_group()) == [7]
    assert die(held, rows(7), answered=5) == ([], False)
    assert numbers(held.next_group()) == [7], "next, so that its process is new and has answered nothing"


def test_two_deaths_at_once_are_two_groups():
    held = PoisonBisector()
    first, second = EngineExited("first"), EngineExited("second")
    for row in rows(1, 2):
        held.blame(row, first)
    for row in rows(3, 4):
        held.blame(row, second)
    held.sift()
    assert [numbers(held.next_group()) for _ in range(4)] == [[1], [2], [3], [4]]


def test_full_by_rows_and_by_the_bytes_that_rows_carry(monkeypatch):
    held = PoisonBisector()
    for row in rows(*range(suspects.ROWS)):
        held.blame(row, EngineExited("it died"))
    assert not held.full
    held.blame(Row(9999), EngineExited("it died"))
    assert held.full
    held.sift()
    assert not held.full
    monkeypatch.setattr(suspects, "BYTES", 10)
    held.blame(Row(1, images=(InlineImage(bytes(11), "x"),)), EngineExited("it died"))
    assert held.full
