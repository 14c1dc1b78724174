"""The rows that a retry selects, by error code."""

import pytest

from batchvl.errors import RENAMED_CODES, OptionError, row_errors
from batchvl.results.retry_selection import RETRYABLE_CODES, RetrySelection
from batchvl.results.rowset import Outcomes

FAILURES = {1: "corrupt_picture", 2: "corrupt_image", 3: "engine_error", 4: "missing_file"}
OUTCOMES = Outcomes.of([(0, None), *FAILURES.items()])


def selected(selection: RetrySelection) -> list[int]:
    return sorted(row for rows in selection.failed(OUTCOMES).values() for row in rows)


@pytest.mark.parametrize("code", ["corrupt_picture", "corrupt_image"])
def test_codes_of_version_0_1_and_their_present_spellings_select_the_same_rows(code):
    selection = RetrySelection.of([code])
    assert selected(selection) == [1, 2]
    assert selection.codes_json == ["corrupt_image"]


def test_every_renamed_code_is_accepted_and_names_a_present_code():
    codes = {error.code for error in row_errors()}
    assert set(RENAMED_CODES.values()) <= codes
    assert not RENAMED_CODES.keys() & codes
    assert RetrySelection.of(RENAMED_CODES).codes == set(RENAMED_CODES.values())


def test_other_selections():
    assert selected(RetrySelection.of()) == [3]
    assert RetrySelection.of().codes == RETRYABLE_CODES
    assert selected(RetrySelection.of(all=True)) == [1, 2, 3, 4]
    assert selected(RetrySelection.of(["missing_file", "engine_error"])) == [3, 4]


def test_invalid_selections():
    with pytest.raises(OptionError, match=r"--codes: unknown error code nonsense; known codes: .*missing_file"):
        RetrySelection.of(["nonsense"])
    with pytest.raises(OptionError, match="specify only one"):
        RetrySelection.of(["missing_file"], all=True)
