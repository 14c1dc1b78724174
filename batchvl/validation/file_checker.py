"""Check that image files exist and are allowed, without opening them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from cachetools import LRUCache

from ..errors import RowError
from ..images.files import check_beneath
from ..types import Failure

THREADS = 16
"""Files checked concurrently: on a network file system each check is a round trip."""
_BATCH = 16  # files that a thread takes at a time
_CACHED_FILES = 32_768


class FileChecker:
    """Check files, each once while its result is cached. A context manager.

    Args:
        roots: Directories that files may be in. Relative paths start from the first, the manifest's.
        limit: Bytes that a file may have.
    """

    def __init__(self, roots: Sequence[Path], limit: int) -> None:
        self._roots, self._limit = roots, limit
        self._checked: LRUCache[str, Failure | None] = LRUCache(_CACHED_FILES)
        self._threads = ThreadPoolExecutor(THREADS, "batchvl-files")

    def __enter__(self) -> FileChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def failures(self, paths: Collection[str]) -> dict[str, Failure]:
        """Return the failures that a run would have, by path: files missing, forbidden, empty or too large. Blocks."""
        results = {path: self._checked[path] for path in paths if path in self._checked}
        new = [path for path in dict.fromkeys(paths) if path not in results]
        batches = [new[at : at + _BATCH] for at in range(0, len(new), _BATCH)]
        run = self._threads.map if len(batches) > 1 else map
        for batch, failures in zip(batches, run(self._check, batches), strict=True):
            for path, failure in zip(batch, failures, strict=True):
                self._checked[path] = results[path] = failure
        return {path: failure for path, failure in results.items() if failure is not None}

    def _check(self, paths: Sequence[str]) -> list[Failure | None]:
        return [self._failure(path) for path in paths]

    def _failure(self, path: str) -> Failure | None:
        try:
            check_beneath(path, self._roots, self._limit)
        except RowError as error:
            return Failure.of(error)
        return None
