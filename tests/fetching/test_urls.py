"""URLs reach the server as they are written, and redirects lead where RFC 3986 says."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.errors import FetchError, InvalidUrl, UnsupportedSource
from batchvl.fetching.urls import Target, parse_url, resolve_redirect
from tests.fuzzing import examples

AS_WRITTEN = [
    "/",
    "/a%2Fb/https%3A%2F%2Fexample.com%2Fa.jpg",
    "/%27%7E%28%3a%c3%A9%zz%",
    "/a+b;c=d,e'(f)*!$&=:@~.jpg",
    "//double//slashes/",
    "/./a/../b/..",
    "/a?",
    "/a??",
    "/a?b?c",
    "/?z=1&a=%20&z=+&empty=&&bare",
    "/a?redirect=http://example.org/b?c=d",
    "/plain/s3%3A%2F%2Fb%2Fa.jpg%40webp",
    "/a[0].jpg?size[w]=3",
]
ENCODED = {
    "/a b?c d": "/a%20b?c%20d",
    "/\u00e9?\u65e5=\U0001f600": "/%C3%A9?%E6%97%A5=%F0%9F%98%80",
    '/"<>\\^`{|}': "/%22%3C%3E%5C%5E%60%7B%7C%7D",
    "/a\0b\x7f": "/a%00b%7F",
    "/a\r\nb\tc": "/abc",
    "?a": "/?a",
    "/a?b#c d?e": "/a?b",
    "#top": "/",
    "": "/",
}
BASE = "http://a/b/c/d;p?q"
RFC_3986 = {  # section 5.4
    "g": "/b/c/g",
    "./g": "/b/c/g",
    "g/": "/b/c/g/",
    "/g": "/g",
    "?y": "/b/c/d;p?y",
    "g?y": "/b/c/g?y",
    "#s": "/b/c/d;p?q",
    "g#s": "/b/c/g",
    "g?y#s": "/b/c/g?y",
    ";x": "/b/c/;x",
    "g;x": "/b/c/g;x",
    "": "/b/c/d;p?q",
    ".": "/b/c/",
    "./": "/b/c/",
    "..": "/b/",
    "../": "/b/",
    "../g": "/b/g",
    "../..": "/",
    "../../": "/",
    "../../g": "/g",
    "../../../g": "/g",
    "/./g": "/g",
    "/../g": "/g",
    "g.": "/b/c/g.",
    ".g": "/b/c/.g",
    "g..": "/b/c/g..",
    "..g": "/b/c/..g",
    "./../g": "/b/g",
    "./g/.": "/b/c/g/",
    "g/./h": "/b/c/g/h",
    "g/../h": "/b/c/h",
    "g;x=1/./y": "/b/c/g;x=1/y",
    "g;x=1/../y": "/b/c/y",
    "g?y/../x": "/b/c/g?y/../x",
    "g#s/../x": "/b/c/g",
    "http:g": "/b/c/g",  # with the scheme of the base, as browsers read it
    "http:/g": "/g",
}


@asynccontextmanager
async def serving(respond: Callable[[bytes], bytes]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve each request head with `respond`. Yields host and port, and the heads so far."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(respond(heads[-1]))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heads


def no_content(_: bytes) -> bytes:
    return b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


def target_of(head: bytes) -> str:
    """Return the request target of a request as the server got it."""
    method, target, version = head.partition(b"\r\n")[0].split(b" ")
    assert (method, version) == (b"GET", b"HTTP/1.1")
    return target.decode("ascii")


def error_of(url: str) -> FetchError:
    with pytest.raises(FetchError) as caught:
        parse_url(url)
    return caught.value


@pytest.mark.parametrize(("written", "sent"), [*zip(AS_WRITTEN, AS_WRITTEN, strict=True), *ENCODED.items()])
async def test_the_server_gets_what_is_written(written: str, sent: str) -> None:
    async with serving(no_content) as (host, heads), aiohttp.ClientSession() as session:
        target = parse_url(f"http://{host}{written}")
        async with session.get(target.url, allow_redirects=False) as response:
            assert response.status == 204
        assert target_of(heads[0]) == target.target == sent
        assert target.key == f"http://{host}{sent}"


@pytest.mark.parametrize("written", [path for path in AS_WRITTEN if "/." not in path])
@pytest.mark.parametrize("absolute", [True, False])
async def test_a_redirect_leads_to_what_is_written(written: str, absolute: bool) -> None:
    def redirect(head: bytes) -> bytes:
        return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nConnection: close\r\n\r\n".encode()

    async with serving(redirect) as (host, heads), aiohttp.ClientSession() as session:
        location = f"http://{host}{written}" if absolute or written.startswith("//") else written
        first = parse_url(f"http://{host}/first")
        async with session.get(first.url, allow_redirects=False) as response:
            second = resolve_redirect(first, response.headers["Location"])
        async with session.get(second.url, allow_redirects=False):
            pass
        assert target_of(heads[1]) == second.target == written


@pytest.mark.parametrize("path", AS_WRITTEN)
async def test_signed_urls_are_accepted(path: str) -> None:
    def sign(target: str) -> str:
        return hashlib.sha256(f"key{target}".encode()).hexdigest()

    def check(head: bytes) -> bytes:
        signed, _, signature = target_of(head).rpartition("&s=")
        status = "200 OK" if sign(signed) == signature else "403 Forbidden"
        return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()

    async with serving(check) as (host, _), aiohttp.ClientSession() as session:
        url = parse_url(f"http://{host}{path}&s={sign(path)}").url
        async with session.get(url, allow_redirects=False) as response:
            assert response.status == 200


async def test_the_proxy_gets_the_whole_url_as_written() -> None:
    async with serving(no_content) as (proxy, heads), aiohttp.ClientSession() as session:
        for path in AS_WRITTEN:
            url = f"http://example.org:81{path}"
            async with session.get(parse_url(url).url, proxy=f"http://{proxy}", allow_redirects=False):
                pass
            assert target_of(heads[-1]) == url


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/\u00e9 b", "/%C3%A9%20b"),  # a header in UTF-8
        ("/\udce9", "/%E9"),  # in Latin-1
        ("c%2f?d%27", "/c%2f?d%27"),
    ],
)
async def test_raw_bytes_of_a_location_are_encoded(location: str, target: str) -> None:
    raw = location.encode("utf-8", "surrogateescape")

    def redirect(_: bytes) -> bytes:
        return b"HTTP/1.1 302 Found\r\nLocation: " + raw + b"\r\nConnection: close\r\n\r\n"

    async with serving(redirect) as (host, _), aiohttp.ClientSession() as session:
        first = parse_url(f"http://{host}/first")
        async with session.get(first.url, allow_redirects=False) as response:
            assert resolve_redirect(first, response.headers["Location"]).key == f"http://{host}{target}"


@pytest.mark.parametrize(
    ("authority", "host", "port", "origin"),
    [
        ("Example.ORG", "example.org", 80, "example.org:80"),
        ("example.org:", "example.org", 80, "example.org:80"),
        ("example.org.:80", "example.org.", 80, "example.org:80"),
        ("example.org:443", "example.org", 443, "example.org:443"),
        ("example.org:00080", "example.org", 80, "example.org:80"),
        ("a_b.-c-.example:8080", "a_b.-c-.example", 8080, "a_b.-c-.example:8080"),
        ("[2001:DB8::0:1]:81", "2001:db8::1", 81, "[2001:db8::1]:81"),
        ("[fe80::1%25eth0]", "fe80::1%25eth0", 80, "[fe80::1%25eth0]:80"),
        ("m\u00fcnchen.example", "xn--mnchen-3ya.example", 80, "xn--mnchen-3ya.example:80"),
        ("stra\u00dfe.example", "xn--strae-oqa.example", 80, "xn--strae-oqa.example:80"),
        ("\uff11\uff12\uff17.1", "127.1", 80, "127.1:80"),
        ("0x7f.1", "0x7f.1", 80, "0x7f.1:80"),
        ("2130706433", "2130706433", 80, "2130706433:80"),
        ("exa\nmple.org", "example.org", 80, "example.org:80"),
    ],
)
def test_hosts(authority: str, host: str, port: int, origin: str) -> None:
    target = parse_url(f" http://{authority}/a \n")
    assert target[1:5] == ("http", host, port, "/a")
    assert target.origin == origin
    assert target.url.raw_host == host
    assert target.url.port == port


@pytest.mark.parametrize(
    "url",
    [
        "http:",
        "http://",
        "http:a",
        "http:/a/b",
        "http:///a.png",
        "http://?",
        "http:\\\\host\\a",
        "http://me@/",
        "http://:80/",
        "http://.",
        "http://a..b/",
        "http://.a/",
        "http://a../",
        f"http://{'a' * 64}.com/",
        "http://a b/",
        "http://a\0b/",
        "http://a<b/",
        "http://a\\b/",
        "http://example.org\\@127.0.0.1/",
        "http://\u2100.org/",
        "http://e\u200bvil.com/",
        "http://a:99999/",
        "http://a:0/",
        "http://a:-1/",
        "http://a:+80/",
        "http://a:8_0/",
        "http://a:\uff18/",
        "http://a:port/",
        "http://me:p/ss@host/",
        "http://[::1",
        "http://[::1]x/",
        "http://[1.2.3.4]/",
        "http://[v1.a]/",
        "http://::1/",
        "http://a/\ud800",
    ],
)
def test_invalid_urls(url: str) -> None:
    error = error_of(url)
    assert (type(error), str(error)) == (InvalidUrl, "not a valid URL")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("", "no scheme"),
        ("a.jpg", "no scheme"),
        ("ftp://me:secret@host/", "scheme 'ftp'"),
        ("\0http://host/", "scheme '\\x00http'"),
        ("me:secret@host", "scheme 'me'"),
        ("x" * 1000 + ":", f"scheme '{'x' * 16}'"),
    ],
)
def test_other_schemes(url: str, found: str) -> None:
    error = error_of(url)
    assert (type(error), str(error)) == (UnsupportedSource, f"found {found}, expected http or https")


@pytest.mark.parametrize(
    ("user_info", "credentials"),
    [
        ("me:pass", "me:pass"),
        ("me", "me:"),
        (":pass", ":pass"),
        ("me:a:b@c%2F%40", "me:a:b@c/@"),
        ("m%C3%A9:\u65e5", "m\u00e9:\u65e5"),
    ],
)
def test_user_and_password_become_a_header(user_info: str, credentials: str) -> None:
    target = parse_url(f"https://{user_info}@example.org:444/a")
    assert target.authorization == "Basic " + base64.b64encode(credentials.encode()).decode()
    assert str(target.url) == "https://example.org:444/a"
    assert target.key == f"https://{user_info}@example.org:444/a"


@pytest.mark.parametrize("user_info", ["", "@", ":@"])
def test_without_user_and_password_there_is_no_header(user_info: str) -> None:
    assert parse_url(f"http://{user_info}example.org/").authorization is None


def test_equal_requests_have_equal_keys() -> None:
    same = ["http://a/b?c", "HTTP://A:80/b?c", " http://a/b?c#d ", "http://a:/b?c"]
    others = ["https://a/b?c", "http://a:81/b?c", "http://me@a/b?c", "http://a/B?c", "http://a/b?c&", "http://a/%62?c"]
    assert len({parse_url(url).key for url in same}) == 1
    assert len({parse_url(url).key for url in same[:1] + others}) == 1 + len(others)


@pytest.mark.parametrize(("reference", "target"), RFC_3986.items())
def test_relative_redirects(reference: str, target: str) -> None:
    resolved = resolve_redirect(parse_url(BASE), reference)
    assert resolved.key == f"http://a{target}"
    assert str(resolved.url) == resolved.key
    assert resolved == parse_url(resolved.key)


@pytest.mark.parametrize(
    ("location", "key"),
    [
        ("http://example.org/x/../%2e", "http://example.org/x/../%2e"),
        ("//example.org:81?a", "http://example.org:81/?a"),
        (" HTTPS://Example.org/a b\r\n", "https://example.org/a%20b"),
        ("//m\u00fcnchen.example/", "http://xn--mnchen-3ya.example/"),
        ("a?", "http://a/b/c/a?"),
        ("//me:pw@b/c", "http://me:pw@b/c"),
    ],
)
def test_redirects_to_hosts(location: str, key: str) -> None:
    assert resolve_redirect(parse_url(BASE), location).key == key


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("ftp://a/b", UnsupportedSource),
        ("file:///etc/passwd", UnsupportedSource),
        ("javascript:alert(1)", UnsupportedSource),
        ("data:image/png;base64,AAAA", UnsupportedSource),
        ("localhost:8000/a", UnsupportedSource),
        ("https:/a", InvalidUrl),  # another scheme than the base's
        ("//", InvalidUrl),
        ("http://", InvalidUrl),
        ("http:///a", InvalidUrl),
        ("//a:99999/", InvalidUrl),
        ("//a\\@b/", InvalidUrl),
        ("//\udce9/", InvalidUrl),
    ],
)
def test_redirects_to_no_url(location: str, error: type[FetchError]) -> None:
    with pytest.raises(FetchError, match=r"^redirects to a") as caught:
        resolve_redirect(parse_url(BASE), location)
    assert type(caught.value) is error


@pytest.mark.parametrize("location", ["/b", "c", "?d", "", "http://a/b", "//A:80/b"])
def test_a_redirect_within_the_origin_keeps_the_user(location: str) -> None:
    base = parse_url("http://me:secret@a/")
    resolved = resolve_redirect(base, location)
    assert resolved.authorization == base.authorization is not None
    assert resolved.key.startswith("http://me:secret@a/")


@pytest.mark.parametrize("location", ["https://a/", "http://a:81/", "//b/", "//b.a/", "//you@a/"])
def test_a_redirect_elsewhere_loses_the_user(location: str) -> None:
    base = parse_url("http://me:secret@a/")
    resolved = resolve_redirect(base, location)
    assert resolved.authorization != base.authorization
    assert "secret" not in resolved.key


@settings(max_examples=examples(300))
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str, location: str) -> None:
    try:
        target = parse_url("http://a/" + text)
    except InvalidUrl:
        assert any("\ud800" <= character <= "\udfff" for character in text)
        return
    assert target.target.isascii()
    assert target.target.isprintable()
    assert " " not in target.target
    assert parse_url(target.key) == target
    try:
        resolved: Target = resolve_redirect(target, location)
    except (InvalidUrl, UnsupportedSource):
        return
    assert parse_url(resolved.key) == resolved
