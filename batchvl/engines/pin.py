"""The model that a run's first engine process found, which all others must be of."""

from __future__ import annotations

import asyncio

import msgspec

from ..errors import EngineLost
from .protocol import EngineInfo, EngineSpec


class Pin:
    """`spec` is what processes are told to run; `info` what the first one that was up told of itself."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.up = asyncio.Event()
        """Set once a process of it has been up."""

    def check(self, info: EngineInfo) -> None:
        """A process is up. Raises EngineLost for one that is of another model."""
        if self.info is None:
            self.info = info
            self.spec = msgspec.structs.replace(self.spec, revision=info.revision or self.spec.revision)
            return
        for what in ("revision", "template_sha256"):
            then, now = getattr(self.info, what), getattr(info, what)
            if now != then:
                raise EngineLost(
                    f"the model has changed since the run began: the engine was started again with {what} {now}, not "
                    f"{then}: rows would be answered by another model"
                )
