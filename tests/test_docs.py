"""The documentation is up to date with the code."""

import re
import runpy
from pathlib import Path

from batchvl.config.options import FetchOptions, flag
from batchvl.errors import row_errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_reference_page_is_up_to_date():
    page = runpy.run_path(str(DOCS / "make_reference.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run: python docs/make_reference.py"


def test_the_fetching_page_has_every_code_of_its_stage():
    page = (DOCS / "fetching.md").read_text(encoding="utf-8").partition("## Codes")[2]
    codes = re.findall(r"^\| `(\w+)` \| (yes|no) \|", page, re.MULTILINE)
    errors = [error for error in row_errors() if error.stage == "fetch"]
    assert codes == [(error.code, "yes" if error.retryable else "no") for error in errors]


def test_the_fetching_page_names_every_option_of_fetching():
    page = (DOCS / "fetching.md").read_text(encoding="utf-8")
    assert [name for name in FetchOptions.__dataclass_fields__ if flag(name) not in page] == []


def test_each_guarantee_names_existing_tests():
    guarantees = re.split(r"^- \*\*", (DOCS / "guarantees.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(guarantees) > 15
    for guarantee in guarantees:
        files = re.findall(r"`(tests/[\w/]+\.py)`", guarantee)
        assert files, guarantee
        for file in files:
            assert re.search(r"^(?:async )?def test_", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file
