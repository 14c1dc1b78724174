"""The long form: whole runs killed at random moments, then kills at every call that the output makes to its disk.

    python -m tests.crash [--kills 500] [--seed N] [--scratch DIR]

Prints figures, and the seed, by which the same kills are drawn again. Where something is not as it must be it says what
and ends with exit code 1, and the output folder stays in DIR; otherwise DIR is removed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .campaign import Campaign
from .seam import Series


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500, help="of whole runs [default: 500]")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="[default: any]")
    parser.add_argument("--scratch", type=Path, default=None, help="a new folder for all files [default: in /tmp]")
    told = parser.parse_args()
    scratch = told.scratch or Path(tempfile.mkdtemp(prefix="batchvl-crash-"))
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"seed {told.seed}, in {scratch}", flush=True)

    # First, since it forks: afterwards Arrow has threads.
    begin, series = time.monotonic(), Series(_new(scratch / "calls"))
    points = series.points()
    for number, point in enumerate(points, 1):
        series.kill(point)
        if number % 100 == 0:
            _tell(f"{number} of {len(points)} kills at a call")
    print(", ".join(f"{count} {name}" for name, count in series.figures.items()))
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)

    campaign = Campaign(_new(scratch / "runs"), told.seed)
    try:
        campaign.run(told.kills, _tell)
    finally:
        print(campaign.figures, flush=True)
    shutil.rmtree(scratch)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
