"""An engine's process whose fake engine logs while it starts."""

import asyncio
import logging

from batchvl.engines.base import EngineInfo
from batchvl.engines.fake import FakeEngine
from batchvl.serving.engine_main import main

logger = logging.getLogger("batchvl.engines.fake")
start = FakeEngine.start


async def log_and_start(engine: FakeEngine) -> EngineInfo:
    logger.debug("not for the terminal")
    logger.info("loading the model: %d%%", 50)
    await asyncio.to_thread(logger.warning, "from a thread")
    return await start(engine)


if __name__ == "__main__":
    FakeEngine.start = log_and_start  # type: ignore[method-assign]
    main()
