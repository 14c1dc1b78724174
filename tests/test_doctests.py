"""The examples in docstrings work."""

import doctest
import importlib
import pkgutil

import pytest

import batchvl

SKIPPED = {
    f"batchvl.engines.lmdeploy.{name}"
    for name in ("conversation", "handles", "inputs", "model", "model_config", "preparation", "processor")
}  # import LMDeploy, which is in an environment of its own
MODULES = [
    found.name
    for found in pkgutil.walk_packages(batchvl.__path__, "batchvl.")
    if not found.name.endswith("__main__") and found.name not in SKIPPED
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_docstrings_have_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = sum(len(t.examples) for name in MODULES for t in finder.find(importlib.import_module(name)))
    assert examples > 30
