"""Whether pictures' files are there: `Paths`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ..errors import RowError
from ..images.files import check_beneath
from ..recent import Recent
from ..types import Failure

THREADS = 16
"""Files looked at at once: on a network's disk each look is a wait."""
_SLICE = 16
_REMEMBERED = 32_768


class Paths:
    """Looks at files without opening them, at each once while it is remembered; a context manager.

    roots: folders that they may lie in, the manifest's first. limit: bytes that a file may have.
    """

    def __init__(self, roots: Sequence[Path], limit: int) -> None:
        self._roots, self._limit = roots, limit
        self._found: Recent[str, Failure | None] = Recent(_REMEMBERED)
        self._threads = ThreadPoolExecutor(THREADS, "batchvl-files")

    def __enter__(self) -> Paths:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def failures(self, paths: Collection[str]) -> dict[str, Failure]:
        """What a run would fail with over files, by path: missing, forbidden, empty or too large. Others are left out.

        Blocks.
        """
        known = {path: self._found[path] for path in paths if path in self._found}
        new = [path for path in dict.fromkeys(paths) if path not in known]
        slices = [new[at : at + _SLICE] for at in range(0, len(new), _SLICE)]
        looks = self._threads.map(self._look, slices) if len(slices) > 1 else map(self._look, slices)
        for some, found in zip(slices, looks, strict=True):
            for path, failure in zip(some, found, strict=True):
                self._found[path] = known[path] = failure
        return {path: failure for path, failure in known.items() if failure is not None}

    def _look(self, paths: Sequence[str]) -> list[Failure | None]:
        return [self._failure(path) for path in paths]

    def _failure(self, path: str) -> Failure | None:
        try:
            check_beneath(path, self._roots, self._limit)
        except RowError as error:
            return Failure.of(error)
        return None
