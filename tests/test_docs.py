"""The documents say what the code does."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_reference_page_is_what_the_code_says():
    page = runpy.run_path(str(DOCS / "make_reference.py"))
    assert page["PAGE"].read_text(encoding="utf-8") == page["reference"](), "run: python docs/make_reference.py"


def test_each_guarantee_names_tests_that_are_there():
    promises = re.split(r"^- \*\*", (DOCS / "guarantees.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(promises) > 15
    for promise in promises:
        files = re.findall(r"`(tests/[\w/]+\.py)`", promise)
        assert files, promise
        for file in files:
            assert re.search(r"^(?:async )?def test_", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file
