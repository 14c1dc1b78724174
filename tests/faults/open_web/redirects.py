"""Faults in redirects: where they lead, how often, and how Location is spelled."""

from __future__ import annotations

from .messages import CHUNKED, IMAGE, PAGE, answer, chunk, head, redirect
from .registry import add, conversation, response
from .server import Exchange


def _redirect(
    name: str,
    location: str | bytes,
    expected: str = "ok",
    *,
    status: str = "302 Found",
    arrives: tuple[str, ...] | str = (),
    tls: str = "",
    curl: bool = True,
) -> None:
    """Register a redirect.

    Args:
        name: Of the fault, without its beginning.
        location: The template of the Location.
        expected: The verdict.
        status: Of the redirect.
        arrives: What the target of the second request must be, byte for byte, if that is what is tested.
        tls: The kind of certificate.
        curl: Whether curl's verdict is the same.
    """

    async def answer_twice(exchange: Exchange) -> None:
        if exchange.target == f"/redirect_{name}":
            place = location if isinstance(location, bytes) else exchange.expand(location).encode()
            await exchange.send(redirect(b"Location: " + place, status=status))
        elif arrives and exchange.target not in ((arrives,) if isinstance(arrives, str) else arrives):
            await exchange.send(answer(body=PAGE, status="403 Wrong signature"))
        else:
            await exchange.send(answer())

    add(f"redirect_{name}", expected, answer_twice, tls=tls, curl=curl)


# Statuses
for _status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
    _redirect(_status[:3], "/next.jpg", status=_status)
_redirect("300", "/next.jpg", status="300 Multiple Choices")
_redirect("304", "/next.jpg", "http_status", status="304 Not Modified", curl=False)  # not a redirect (RFC 9110)

# Relative and absolute
_redirect("relative", "next.jpg?a=b", arrives="/next.jpg?a=b")
_redirect("relative_upwards", "../../next.jpg", arrives="/next.jpg")
_redirect("relative_query", "?a=b", arrives="/redirect_relative_query?a=b")
_redirect("without_scheme", "//HOST/next.jpg", arrives="/next.jpg")
_redirect("to_another_host", "http://OTHER/next.jpg", arrives="/next.jpg")
_redirect("with_fragment", "/next.jpg#part", arrives="/next.jpg")
_redirect("scheme_in_capitals", "HTTP://HOST/next.jpg", arrives="/next.jpg")
_redirect("without_path", "http://HOST", arrives="/")
_redirect("without_path_but_query", "http://HOST?a=b", arrives="/?a=b")
_redirect("from_tls_to_plain", "http://PLAIN/next.jpg", arrives="/next.jpg", tls="valid")
_redirect("from_plain_to_tls", "https://TLS/next.jpg", arrives="/next.jpg")
# curl reads such addresses. No image is at one, but many attempts to get past a guard are.
_redirect("to_the_address_as_a_number", "http://DECIMAL/next.jpg", "invalid_url", curl=False)

# Spelling: what is written is what is asked for; only characters that no URL may have are encoded.
_redirect("escapes", "/a%2Fb%27%7E%28%3A%c3%a9.jpg?s=%2B%2f+%20", arrives="/a%2Fb%27%7E%28%3A%c3%a9.jpg?s=%2B%2f+%20")
_redirect("double_slash", "/a//b.jpg", arrives="/a//b.jpg")
_redirect("semicolon", "/a;b=c.jpg;d", arrives="/a;b=c.jpg;d")
_redirect("url_in_query", "/a?u=http://x.example/y?z=1", arrives="/a?u=http://x.example/y?z=1")
_redirect("space", "/a b c.jpg", arrives="/a%20b%20c.jpg")
_redirect("utf_8", "/käse.jpg", arrives=("/k%C3%A4se.jpg", "/k%c3%a4se.jpg"))
_redirect("latin_1", "/käse.jpg".encode("latin-1"), arrives=("/k%E4se.jpg", "/k%e4se.jpg"))
_redirect("spaces_around", "   /next.jpg   ", arrives="/next.jpg")

# Nowhere
_redirect("empty", "", "http_status")
_redirect("without_host", "http:///next.jpg", "invalid_url")
_redirect("port_out_of_range", "http://ADDRESS:99999/next.jpg", "invalid_url")
_redirect("to_nobody", "http://REFUSED/next.jpg", "connection_failed")
_redirect("to_file", "file:///etc/passwd", "unsupported_source")
_redirect("to_ftp", "ftp://ADDRESS/next.jpg", "unsupported_source")
_redirect("to_data", "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "unsupported_source")
_redirect("to_javascript", "javascript:alert(1)", "unsupported_source")
# We allow 127.0.0.0/8 here, and nothing else that is not public. curl would go there, and is not even tried.
_redirect("to_a_private_address", "http://10.1.2.3/next.jpg", "forbidden_address", curl=False)
_redirect("to_the_metadata_service", "http://169.254.169.254/next.jpg", "forbidden_address", curl=False)
_redirect("to_loopback_of_ipv6", "http://[::1]:PORT/next.jpg", "forbidden_address", curl=False)
_redirect("to_address_zero", "http://0.0.0.0:PORT/next.jpg", "forbidden_address", curl=False)


def _hops(name: str, count: int, expected: str) -> None:
    """Register a chain of redirects."""

    async def answer_hop(exchange: Exchange) -> None:
        hop = int(exchange.target.partition("/hop/")[2] or 0)
        await exchange.send(answer() if hop == count else redirect(f"Location: /hop/{hop + 1}"))

    add(f"redirects_{name}", expected, answer_hop)


response("redirect_in_a_field", answer("Refresh: 0; url=/next.jpg", body=PAGE), "not_an_image", body=PAGE)

_hops("5", 5, "ok")
_hops("6", 6, "too_many_redirects")
_hops("without_end", -1, "too_many_redirects")


@conversation("too_many_redirects")
async def redirect_to_itself(exchange: Exchange) -> None:
    await exchange.send(redirect(f"Location: {exchange.target}"))


@conversation()
async def redirect_to_itself_once(exchange: Exchange) -> None:
    await exchange.send(redirect(f"Location: {exchange.target}") if exchange.number == 1 else answer())


@conversation("http_status")
async def redirect_without_location(exchange: Exchange) -> None:
    await exchange.send(redirect())


@conversation("http_status")
async def redirect_to_a_missing_page(exchange: Exchange) -> None:
    moved = exchange.target == "/next.jpg"
    await exchange.send(answer(body=PAGE, status="404 Not Found") if moved else redirect("Location: /next.jpg"))


@conversation()
async def redirect_with_two_locations(exchange: Exchange) -> None:
    first = exchange.target == "/redirect_with_two_locations"
    await exchange.send(redirect("Location: /next.jpg", "Location: /next.jpg") if first else answer())


@conversation()
async def redirect_after_an_error(exchange: Exchange) -> None:
    if exchange.target != "/next.jpg":
        await exchange.send(redirect("Location: /next.jpg"))
    else:
        await exchange.send(answer(status="500 Oops" if exchange.number == 1 else "200 OK"))


# curl reads the body of a redirect to its end, which never comes; we need not.
@conversation(curl=False)
async def redirect_with_a_body_without_end(exchange: Exchange) -> None:
    if exchange.target == "/next.jpg":
        await exchange.send(answer())
        return
    await exchange.send(head("Location: /next.jpg", CHUNKED, status="302 Found"))
    while True:
        await exchange.send(chunk(IMAGE), pause=0.01)


# Cookies and passwords. curl keeps cookies for all URLs of a command; ours belong to one row.
@conversation(rows=2, curl=False)
async def redirect_with_a_cookie(exchange: Exchange) -> None:
    """The image needs a cookie of the redirect, which another row must not have at first."""
    cookie = exchange.fields.get("cookie", "")
    if exchange.target.startswith("/next"):
        await exchange.send(answer() if cookie == "pass=1" else answer(body=PAGE, status="403 No cookie"))
    elif cookie:
        await exchange.send(answer(body=PAGE, status="403 A cookie of another row"))
    else:
        onward = exchange.target.replace("/redirect_with_a_cookie", "/next")
        await exchange.send(redirect(f"Location: {onward}", "Set-Cookie: pass=1; Path=/"))


@conversation()
async def redirect_to_itself_with_a_cookie(exchange: Exchange) -> None:
    if exchange.fields.get("cookie") == "pass=1":
        await exchange.send(answer())
    else:
        await exchange.send(redirect(f"Location: {exchange.target}", "Set-Cookie: pass=1; Path=/; HttpOnly"))


@conversation()
async def redirect_leaves_cookies_behind(exchange: Exchange) -> None:
    if exchange.target != "/next.jpg":
        place = exchange.expand("http://OTHER/next.jpg")
        await exchange.send(redirect(f"Location: {place}", "Set-Cookie: pass=1; Path=/"))
    elif "cookie" in exchange.fields:
        await exchange.send(answer(body=PAGE, status="403 A cookie of another host"))
    else:
        await exchange.send(answer())


@conversation(url="http://me:s3cr3t@HOST/redirect_keeps_the_password")
async def redirect_keeps_the_password(exchange: Exchange) -> None:
    if "authorization" not in exchange.fields:
        await exchange.send(answer(body=PAGE, status="401 Unauthorized"))
    else:
        await exchange.send(answer() if exchange.target == "/next.jpg" else redirect("Location: /next.jpg"))


@conversation(url="http://me:s3cr3t@HOST/redirect_leaves_the_password_behind")
async def redirect_leaves_the_password_behind(exchange: Exchange) -> None:
    if exchange.target != "/next.jpg":
        await exchange.send(redirect(f"Location: {exchange.expand('http://OTHER/next.jpg')}"))
    elif "authorization" in exchange.fields:
        await exchange.send(answer(body=PAGE, status="403 A password of another host"))
    else:
        await exchange.send(answer())
