"""Check that image files, and members of archives, exist and are allowed, without reading the images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from cachetools import LRUCache

from ..errors import RowError
from ..images.image_files import ImageFiles
from ..types import Failure, FileImage

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
        self._files = ImageFiles(roots, limit)
        self._checked: LRUCache[FileImage, Failure | None] = LRUCache(_CACHED_FILES)
        self._threads = ThreadPoolExecutor(THREADS, "batchvl-files")

    def __enter__(self) -> FileChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def failures(self, images: Collection[FileImage]) -> dict[FileImage, Failure]:
        """Return the failures that a run would have, by image: files missing, forbidden, empty or too large. Blocks."""
        results = {image: self._checked[image] for image in images if image in self._checked}
        new = [image for image in dict.fromkeys(images) if image not in results]
        batches = [new[at : at + _BATCH] for at in range(0, len(new), _BATCH)]
        run = self._threads.map if len(batches) > 1 else map
        for batch, failures in zip(batches, run(self._check, batches), strict=True):
            for image, failure in zip(batch, failures, strict=True):
                self._checked[image] = results[image] = failure
        return {image: failure for image, failure in results.items() if failure is not None}

    def _check(self, images: Sequence[FileImage]) -> list[Failure | None]:
        return [self._failure(image) for image in images]

    def _failure(self, image: FileImage) -> Failure | None:
        try:
            self._files.check(image)
        except RowError as error:
            return Failure.of(error)
        return None
