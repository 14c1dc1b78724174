"""`batchvl run` on a disk that kills or fails: python -m tests.crash.victim DISK MANIFEST OPTIONS

DISK is JSON for `disk_of`; OPTIONS are those of `batchvl.run` as JSON. Standard output has the number of committed rows
after each commit and, at the end, the number of calls to the disk. With {"names": 17, "code": "ENOSPC"} as DISK, the
runner's 17th and all later attempts to open a file in the output directory for writing, or to create or rename one,
fail, including those that bypass `Disk`, such as logs.
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


def refuse_names(directory: str, at: int, code: str) -> None:
    """Let the `at`-th and all later attempts of this process to create a name in the directory fail."""
    number = getattr(errno, code)
    attempts = itertools.count(1)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in ("os.rename", "os.link", "os.mkdir"):
            path = arguments[0 if event == "os.mkdir" else 1]
        else:
            return
        if not isinstance(path, int) and os.fsdecode(path).startswith(directory) and next(attempts) >= at:
            raise OSError(number, os.strerror(number), path)

    sys.addaudithook(audit)


if __name__ == "__main__":
    sys.exit(main())
