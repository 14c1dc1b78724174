"""`batchvl run` on a disk that kills or fails: python -m tests.crash.victim DISK MANIFEST OPTIONS

DISK is for `disk_of`; OPTIONS are those of `batchvl.run`, as JSON as well. Standard output tells how many rows have
been committed so far, and at the end how many calls the disk had. With {"names": 17, "code": "ENOSPC"} in place of
DISK, it is the 17th and all later attempts of the runner to open a file of the output folder for writing, or to make
or rename one, that fail: what does not go through `Disk`, such as logs, included.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from typing import Any

from batchvl.config.sources import resolve_options
from batchvl.errors import BatchvlError
from batchvl.results import Counts
from batchvl.runner.job import Job, RunObserver
from batchvl.storage.disk import Disk

from .disks import Seam, disk_of


class CommitReporter(RunObserver):
    """Writes the number of committed rows to standard output after each commit."""

    def on_commit(self, committed: Counts) -> None:
        os.write(1, f"{committed.rows}\n".encode())


def main() -> int:
    spec, manifest, options = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    disk: Disk = Disk() if "names" in spec else disk_of(spec)
    try:
        job = Job(*resolve_options(manifest, None, options), disk=disk, observer=CommitReporter())
        if "names" in spec:
            refuse_names(str(job.output.path), spec["names"], spec["code"])
        summary = job.run()
    except BatchvlError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    print(summary, file=sys.stderr)
    if isinstance(disk, Seam):
        print(f"calls {len(disk.names)}")
    return summary.exit_code


def refuse_names(folder: str, at: int, code: str) -> None:
    """Has the process fail when it makes a name in the folder for the `at`-th time, and from then on."""
    number = getattr(errno, code)
    counted = itertools.count(1)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.link", "os.mkdir"):
            path = arguments[0 if event == "os.mkdir" else 1]
        else:
            return
        if not isinstance(path, int) and os.fsdecode(path).startswith(folder) and next(counted) >= at:
            raise OSError(number, os.strerror(number), path)

    sys.addaudithook(audit)


if __name__ == "__main__":
    sys.exit(main())
