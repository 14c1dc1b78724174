"""The long crash campaign: kills at every call of the output to its disk, then of whole runs at random moments.

    python -m tests.crash [--kills 500] [--seed N] [--scratch DIR]

Prints figures and the seed, which repeats the same draws. On a violation it reports what is wrong, exits with code 1
and keeps the output directory in DIR; otherwise DIR is removed.
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
    parser.add_argument("--kills", type=int, default=500, help="number of kills of whole runs [default: 500]")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="seed of the draws [default: random]"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="new directory for all files [default: in /tmp]")
    args = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="batchvl-crash-"))
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}, in {scratch}", flush=True)

    # First, because it forks: later Arrow has threads.
    begin, series = time.monotonic(), Series(_new(scratch / "calls"))
    points = series.points()
    for number, point in enumerate(points, 1):
        series.kill(point)
        if number % 100 == 0:
            _report(f"{number} of {len(points)} kills at a call")
    print(", ".join(f"{count} {name}" for name, count in series.figures.items()))
    print(f"  {time.monotonic() - begin:.0f} s", flush=True)

    campaign = Campaign(_new(scratch / "runs"), args.seed)
    try:
        campaign.run(args.kills, _report)
    finally:
        print(campaign.figures, flush=True)
    shutil.rmtree(scratch)


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
