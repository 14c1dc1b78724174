"""Serve all faults until interrupted, after a table of them: the verdict that is due, and a URL."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from . import FAULTS, OpenWeb


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with OpenWeb(Path(directory)) as web:
            for fault in FAULTS.values():
                print(f"{fault.expected:24} {web.urls(fault)[0][:200]}", flush=True)
            print(f"The certificates of the https URLs are signed by {web.authority}", flush=True)
            await asyncio.Event().wait()


try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
