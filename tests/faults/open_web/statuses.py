"""Faults in statuses: errors for good, errors for now, and limits on requests with Retry-After."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate

from .messages import IMAGE, PAGE, answer, head
from .registry import add, conversation, response
from .server import Exchange

# Successes
for _status in ("201 Created", "202 Accepted", "203 Elsewhere", "299 Fine"):
    response(f"status_{_status[:3]}", answer(status=_status))
response("status_204", head(status="204 No Content"), "empty_image", body=b"")
response("status_205", answer(status="205 Reset Content", body=b""), "empty_image", body=b"")
_RANGE = f"Content-Range: bytes 0-999/{len(IMAGE)}"
response("status_206", answer(_RANGE, status="206 Partial", body=IMAGE[:1000]), "truncated_image", body=IMAGE[:1000])
response("status_206_of_all", answer(f"Content-Range: bytes 0-{len(IMAGE) - 1}/{len(IMAGE)}", status="206 Partial"))

# Errors for good
for _code in (304, 400, 401, 402, 403, 404, 405, 406, 407, 410, 412, 415, 416, 418, 421, 451, 499):
    _body = b"" if _code == 304 else PAGE
    response(f"status_{_code}", answer(status=f"{_code} No", body=_body), "http_status")
response("status_404_with_an_image", answer(status="404 Not Found"), "http_status")
response("status_404_without_end", head(status="404 Not Found") + PAGE, "http_status")
response("status_410_with_retry_after", answer("Retry-After: 1", status="410 Gone", body=PAGE), "http_status")

# Errors for now, which never end
for _code in (408, 425, 429, 500, 501, 502, 503, 504, 520, 522, 599):
    response(f"status_{_code}", answer(status=f"{_code} Not now", body=PAGE), "http_retryable")
response("status_999", answer(status="999 Denied", body=PAGE), "http_retryable")


@conversation(url="http://me:s3cr3t@HOST/password")
async def password(exchange: Exchange) -> None:
    known = exchange.fields.get("authorization") == "Basic bWU6czNjcjN0"
    challenge = answer('WWW-Authenticate: Basic realm="x"', status="401 Unauthorized", body=PAGE)
    await exchange.send(answer() if known else challenge)


def _until(
    name: str,
    failures: int,
    status: str,
    field: Callable[[], str] | None = None,
    *,
    expected: str = "ok",
    curl: bool = True,
) -> None:
    """Register a fault that answers with a status that many times, with a field of its header, and then the image."""

    async def answer_at_last(exchange: Exchange) -> None:
        fields = [field()] if field else []
        failure = answer(*fields, status=status, body=PAGE)
        await exchange.send(failure if exchange.number <= failures else answer())

    add(name, expected, answer_at_last, curl=curl)


def _retry_after(text: str) -> Callable[[], str]:
    return lambda: f"Retry-After: {text}"


def _retry_at(seconds: float) -> Callable[[], str]:
    return lambda: f"Retry-After: {formatdate(time.time() + seconds, usegmt=True)}"


_until("status_500_once", 1, "500 Oops")
_until("status_502_twice", 2, "502 Bad Gateway")
_until("status_408_once", 1, "408 Request Timeout")
_until("status_429_once", 1, "429 Too Many Requests")
_until("status_503_once", 1, "503 Busy")
_until("retry_after_1", 1, "429 Too Many Requests", _retry_after("1"))
_until("retry_after_1_of_503", 1, "503 Busy", _retry_after("1"))
_until("retry_after_0_three_times", 3, "429 Too Many Requests", _retry_after("0"))
_until("retry_after_a_date", 1, "429 Too Many Requests", _retry_at(2))
# curl gives up at such a date.
_until("retry_after_a_past_date", 1, "503 Busy", _retry_at(-3600), curl=False)
_until("retry_after_a_fraction", 1, "429 Too Many Requests", _retry_after("0.5"))
_until("retry_after_a_negative_number", 1, "429 Too Many Requests", _retry_after("-3"))
_until("retry_after_garbage", 1, "503 Busy", _retry_after("soon, -3"))
_until("retry_after_an_hour", 1000, "429 Too Many Requests", _retry_after("3600"), expected="http_retryable")
_until("retry_after_ages", 1000, "503 Busy", _retry_after("9" * 400), expected="http_retryable")
_until("retry_after_1_forever", 1000, "429 Too Many Requests", _retry_after("1"), expected="http_retryable")
_until("retry_after_of_a_missing_image", 1000, "404 Not Found", _retry_after("0"), expected="http_status")
