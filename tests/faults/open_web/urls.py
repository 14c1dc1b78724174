"""URLs that are spelled in all ways, for servers that check every byte of a request, as those of signed URLs do.

A URL is sent as it is written. Only characters that no URL may have are encoded (RFC 3986, section 2), for which a
server may expect one of several spellings.
"""

from __future__ import annotations

from .messages import PAGE, answer
from .registry import add
from .server import Exchange


def _url(name: str, written: str, *sent: str, authority: str = "HOST", scheme: str = "http", curl: bool = True) -> None:
    """Register a server that accepts some spellings of a request only.

    Args:
        name: Of the fault, without its beginning.
        written: What follows the authority in the URL.
        sent: The spellings that it accepts; if none, as written.
        authority: Template of the URL's authority.
        scheme: The URL's scheme, as it is spelled.
        curl: Whether curl's verdict is the same.
    """

    async def check(exchange: Exchange) -> None:
        is_host = exchange.fields.get("host") == exchange.expand("HOST")
        is_known = is_host and exchange.target in (sent or (written,))
        await exchange.send(answer() if is_known else answer(body=PAGE, status="403 Wrong signature"))

    add(f"url_{name}", "ok", check, url=f"{scheme}://{authority}{written}", curl=curl)


# Escapes stay what they are.
_url("escaped_slash", "/a%2Fb.jpg")
_url("escaped_quote", "/it%27s.jpg?a=%27")
_url("escaped_tilde", "/%7Eme/a.jpg?a=%7E")
_url("escaped_parentheses", "/a%28b%29.jpg?a=%28b%29")
_url("escaped_colon", "/rs%3A300/a.jpg?t=20%3A01")
_url("escaped_unreserved", "/%41%2D%2E%5F.jpg")
_url("escaped_comma_and_at", "/a%2C%40.jpg?crop=0%2C0%2C1&x=%40%21%2A%3B")
_url("escaped_plus", "/a%2Bb.jpg?a=%2B")
_url("escaped_equals_and_ampersand", "/a.jpg?a=%26b%3Dc")
_url("escaped_percent", "/a%2520b.jpg?a=%25")
_url("escaped_question_mark_and_hash", "/a%3Fb%23c.jpg?a=%3F%23")
_url("escaped_dots", "/a/%2E%2E/b.jpg")
_url("escaped_in_lower_case", "/%c3%a9%2f.jpg?a=%2f%c3")
_url("escaped_latin_1", "/caf%E9.jpg")
_url("escaped_nul", "/a%00b.jpg")
_url("escaped_line_end", "/a%0d%0aX:%20b.jpg")
_url("escaped_url", "/plain/https%3A%2F%2Fx.example%2Fa.jpg%40webp")
_url("signed_by_s3", "/x.jpg?X-Amz-Credential=AK%2F2024%2Fus%2Faws4_request&X-Amz-Signature=ab%2Fcd%2B%3D")
_url("signed_by_azure", "/x.jpg?sv=2024-01-01&sig=a%2Fb%2Bc%3D%3D&se=2024-01-01T00%3A00%3A00Z")

# So do legal characters.
_url("plus", "/a+b.jpg?a=b+c")
_url("unescaped_base64", "/x.jpg?sig=a/b+c==&t=00:00:00Z")
_url("double_slash", "/a//b///c.jpg")
_url("double_slash_first", "//a/b.jpg")
_url("dot_segments", "/a/../b/./c.jpg")  # curl with --path-as-is
_url("parameters", "/a;b=1/c.jpg;d?e;f=1")
_url("subdelimiters", "/!$&'()*+,;=:@-._~.jpg?!$&'()*+,;=:@-._~/?")
_url("colon_in_path", "/rs:fit:300:300/a:b.jpg")
_url("url_in_path", "/https://x.example/a.jpg")
_url("url_in_query", "/fetch?u=http://x.example/a.jpg?b=c&d")
_url("at_in_path", "/@me/a@2x.jpg")
_url("query_empty", "/a.jpg?")
_url("query_of_ampersands", "/a.jpg?&&a=&=b&")
_url("query_repeated", "/a.jpg?a=2&a=1&b=0&a=2")
_url("query_escaped_for_html", "/a.jpg?a=1&amp;b=2")
_url("query_without_path", "?a=b", "/?a=b")
_url("without_path", "", "/")
_url("fragment", "/a.jpg#part", "/a.jpg")
_url("fragment_empty", "/a.jpg?a#", "/a.jpg?a")
_url("of_2_kb", "/" + "a" * 2000 + ".jpg")
_url("of_30_kb", "/a.jpg?s=" + "a" * 30_000)

# Illegal characters are encoded. curl sends some of them as they are, or refuses them on its command line.
_url("space", "/a b.jpg?c d", "/a%20b.jpg?c%20d", "/a%20b.jpg?c+d", curl=False)
_url("umlaut", "/käse.jpg?ä", "/k%C3%A4se.jpg?%C3%A4", curl=False)
_url("umlaut_decomposed", "/ka\u0308se.jpg", "/ka%CC%88se.jpg", curl=False)
_url("emoji", "/😀.jpg", "/%F0%9F%98%80.jpg", curl=False)
_url("umlaut_and_escapes", "/ä%2F%7e.jpg?ä=%27", "/%C3%A4%2F%7e.jpg?%C3%A4=%27", curl=False)
_url("quotation_marks", '/"a".jpg', "/%22a%22.jpg", curl=False)
_url("angle_brackets", "/<a>.jpg", "/%3Ca%3E.jpg", curl=False)
_url("pipe", "/a|b.jpg?c|d", "/a|b.jpg?c|d", "/a%7Cb.jpg?c%7Cd", "/a%7Cb.jpg?c|d")
_url("brackets", "/a[1].jpg?b[]=1", "/a[1].jpg?b[]=1", "/a%5B1%5D.jpg?b%5B%5D=1", "/a%5B1%5D.jpg?b[]=1")
_url("braces", "/{a}.jpg?{b}", "/{a}.jpg?{b}", "/%7Ba%7D.jpg?%7Bb%7D")
_url("backslash", "/a\\b.jpg", "/a\\b.jpg", "/a%5Cb.jpg")
_url("caret_and_backtick", "/a^`b.jpg", "/a^`b.jpg", "/a%5E%60b.jpg")
_url("lone_percent", "/100%.jpg", "/100%.jpg", "/100%25.jpg")
_url("percent_without_digits", "/%zz.jpg?%", "/%zz.jpg?%", "/%25zz.jpg?%25")

# Around the path
_url("scheme_in_capitals", "/a.jpg", scheme="HTTP")
_url("user", "/a%2Fb.jpg", authority="me:s3cr3t@HOST")
_url("user_with_escapes", "/a%2Fb.jpg", authority="m%40e:s3cr3t%2F%3A@HOST")
_url("user_without_password", "/a%2Fb.jpg", authority="me@HOST")

# Nothing to ask. curl has no guard, so it is not tried.
for _name, _text, _code in (
    ("private_address", "http://10.1.2.3/x.jpg", "forbidden_address"),
    ("metadata_service", "http://169.254.169.254/x.jpg", "forbidden_address"),
    ("loopback_of_ipv6", "http://[::1]:PORT/x.jpg", "forbidden_address"),
    ("address_as_a_number", "http://DECIMAL/x.jpg", "invalid_url"),
    ("port_out_of_range", "http://ADDRESS:99999/x.jpg", "invalid_url"),
    ("without_host", "http:///x.jpg", "invalid_url"),
    ("label_of_300_characters", f"http://{'a' * 300}.example/x.jpg", "invalid_url"),
    ("scheme_ftp", "ftp://ADDRESS/x.jpg", "unsupported_source"),
):
    add(f"url_{_name}", _code, None, url=_text, curl=False)
