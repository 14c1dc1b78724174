"""Servers opt images out of use for AI with X-Robots-Tag."""

from __future__ import annotations

import aiohttp
import pytest
from multidict import CIMultiDict

from batchvl.fetching.opt_out import opt_out_of
from tests.fetching.test_urls import serving

DATE = "unavailable_after: Sunday, 25-Jun-40 15:00:00 PST"


@pytest.mark.parametrize(
    "values",
    [
        ["noai"],
        ["NoAI"],
        ["  noai  "],
        ["noindex, nofollow , noai"],
        ["noindex,noai,"],
        ["noindex", "noai"],
        ["batchvl: noai"],
        ["BatchVL : nofollow, noai"],
        ["*: noai"],
        ["otherbot: noindex, batchvl: noai"],
        ["otherbot: noindex", "noai"],
        ["batchvl: all", "noai"],
        [f"{DATE}, noai"],
        [f"batchvl: {DATE}, noai"],
        ["unavailable_after: 2040-06-25T15:00:00+00:00, noai"],
        ["unavailable_after: 25 Jun 2040 15:00:00 PST, noai"],
        ["max-snippet: 20, max-image-preview: large, max-video-preview: -1, noai"],
    ],
)
def test_opted_out(values: list[str]) -> None:
    assert opt_out_of(("X-Robots-Tag", value) for value in values) == "noai"
    others = [value.lower().replace("noai", "noimageai") for value in values]
    assert opt_out_of(("x-robots-tag", value) for value in others) == "noimageai"


@pytest.mark.parametrize(
    "values",
    [
        [],
        [""],
        [","],
        [":"],
        ["all"],
        ["noindex, noimageindex, nofollow, none"],
        ["noairplanes, nonoai, no ai"],
        ["otherbot: noai"],
        ["otherbot: noindex, noai"],
        ["batchvl: noindex, otherbot: noai"],
        ["batchvl2: noai", "notbatchvl: noai"],
        [f"otherbot: {DATE}, noai"],
        [DATE],
        ["noai: batchvl"],
    ],
)
def test_not_opted_out(values: list[str]) -> None:
    assert opt_out_of([("X-Robots-Tag", value) for value in values]) is None


def test_other_headers_do_not_count() -> None:
    assert opt_out_of([("X-Robots-Tags", "noai"), ("Robots", "noai"), ("Y-Robots-Tag", "noai")]) is None


def test_another_agent_and_other_directives() -> None:
    headers = CIMultiDict({"X-Robots-Tag": "otherbot: noindex"})
    assert opt_out_of(headers.items(), "otherbot", {"noindex"}) == "noindex"
    assert opt_out_of(headers.items(), "batchvl", {"noindex"}) is None


async def test_headers_of_a_response() -> None:
    def respond(_: bytes) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\nx-robots-tag: otherbot: noai\r\nX-ROBOTS-TAG: noindex, noimageai\r\n"
            b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )

    async with (
        serving(respond) as (host, _),
        aiohttp.ClientSession() as session,
        session.get(f"http://{host}/") as response,
    ):
        assert opt_out_of(response.headers.items()) == "noimageai"
