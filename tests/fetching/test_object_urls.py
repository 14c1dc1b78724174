"""URLs of objects in buckets and of files on the Hub, and which of them a manifest may have read."""

from __future__ import annotations

import pytest

from batchvl.errors import ForbiddenAddress, InvalidUrl, OptionError
from batchvl.fetching.hub import Hub
from batchvl.fetching.image_client import UrlParser
from batchvl.fetching.object_urls import BucketGuard, parse_object_url
from batchvl.fetching.sources import source_label
from batchvl.types import WebImage


@pytest.mark.parametrize(
    ("url", "origin", "target"),
    [
        ("s3://photos/a/b.jpg", "s3://photos", "/a/b.jpg"),
        ("S3://photos/a", "s3://photos", "/a"),
        ("gcs://photos/a", "gs://photos", "/a"),
        ("gs://photos.example.org/a", "gs://photos.example.org", "/a"),
        ("s3://photos/50%25%2f?x=1#y z+ü", "s3://photos", "/50%25%2f?x=1#y z+ü"),
        ("s3://photos/...", "s3://photos", "/..."),
        ("s3://photos/" + "k" * 1024, "s3://photos", "/" + "k" * 1024),
        ("az://photos/a?b", "abfs://photos", "/a?b"),
        ("abfss://photos@me2.dfs.core.windows.net/a/b", "abfs://photos@me2.dfs.core.windows.net", "/a/b"),
        ("abfs://photos@me2.blob.core.windows.net/a", "abfs://photos@me2.dfs.core.windows.net", "/a"),
        ("abfs://$web@me2.dfs.core.chinacloudapi.cn/a", "abfs://$web@me2.dfs.core.chinacloudapi.cn", "/a"),
    ],
)
def test_a_key_is_what_is_written(url: str, origin: str, target: str) -> None:
    parsed = parse_object_url(url)
    assert (parsed.origin, parsed.target, parsed.key) == (origin, target, origin + target)


@pytest.mark.parametrize(
    "url",
    [
        "s3://photos",
        "s3://photos/",
        "s3:///a",
        "s3://.../a",
        "s3://photos?endpoint_override=evil.example.org/a",
        "s3://me:secret@photos/a",
        "s3://photos/../private/a",
        "s3://photos/a/../../private/a",
        "s3://photos/..",
        "s3://photos/./a",
        "s3://photos//a",
        "s3://photos/a/",
        "s3://photos/a\0",
        "s3://photos/a\nb",
        "s3://photos/a\udc80",
        "s3://photos/" + "k" * 1025,
        "abfs://photos",
        "abfs://Photos/a",
        "abfs://me:secret@photos/a",
        "abfs://secret@photos/a",
        "abfs://photos:secret@me2.dfs.core.windows.net/a",
        "abfs://photos@evil.example.org/a",
        "abfs://photos@evil.example.org#.dfs.core.windows.net/a",
        "abfs://photos@me2.dfs.core.windows.net.evil.example.org/a",
        "abfs://photos@me2.dfs.core.windows.net:8443/a",
        "abfs://photos@me2@me3.dfs.core.windows.net/a",
        "abfs://photos@.dfs.core.windows.net/a",
        "abfs://photos@me2.dfs.core.windows.net/../a",
        "abfs://photos@me2.dfs.core.windows.net/a?sv=1&sig=secret",
        "az://photos/a?sig=secret",
    ],
)
def test_bad_urls_of_objects(url: str) -> None:
    with pytest.raises(InvalidUrl) as failed:
        parse_object_url(url)
    assert "secret" not in str(failed.value) + source_label(WebImage(url))


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("s3://photos", "s3://photos/a"),
        ("s3://photos/", "s3://photos/a"),
        ("S3://pho*", "s3://photos/a"),
        ("gcs://photos", "gs://photos/a"),
        ("gs://photos", "gcs://photos/a"),
        ("az://photos", "abfss://photos/a"),
        ("ABFSS://pho*", "az://photos/a"),
        ("abfs://*@me2.dfs.core.windows.net", "abfs://photos@me2.dfs.core.windows.net/a"),
        ("az://photos@me2.blob.core.windows.net", "abfs://photos@me2.dfs.core.windows.net/a"),
        ("abfs://photos@me?.dfs.core.windows.net/", "abfs://photos@me2.dfs.core.windows.net/a"),
    ],
)
def test_buckets_that_are_allowed(pattern: str, url: str) -> None:
    assert UrlParser(BucketGuard(["s3://other", pattern])).parse(WebImage(url)).target == "/a"


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("s3://photos", "gs://photos/a"),
        ("s3://photos", "s3://photos2/a"),
        ("s3://photos", "s3://Photos/a"),
        ("s3://photo?", "s3://photo/a"),
        ("abfs://*", "abfs://photos@me2.dfs.core.windows.net/a"),
        ("abfs://p*t", "abfs://photos@me2.dfs.core.windows.net/a"),
        ("abfs://photos[!x]me2.dfs.core.windows.net", "abfs://photos@me2.dfs.core.windows.net/a"),
        ("abfs://photos@me2.dfs.core.windows.net", "abfs://photos/a"),
        ("abfs://*@me2.dfs.core.windows.net", "abfs://photos@me3.dfs.core.windows.net/a"),
        ("s3://photos", "abfs://photos/a"),
    ],
)
def test_buckets_that_are_not_allowed(pattern: str, url: str) -> None:
    with pytest.raises(ForbiddenAddress, match=f"allow it with --allow-bucket {url.removesuffix('/a')}$"):
        UrlParser(BucketGuard([pattern])).parse(WebImage(url))
    with pytest.raises(ForbiddenAddress):
        UrlParser(BucketGuard()).parse(WebImage(url))


@pytest.mark.parametrize("pattern", ["photos", "s3://", "s3://photos/a", "ftp://photos", "*", "s3:photos", "hf://"])
def test_bad_patterns_of_buckets(pattern: str) -> None:
    with pytest.raises(OptionError, match="--allow-bucket"):
        BucketGuard([pattern])


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("hf://datasets/me/cats/a/b.png", "/datasets/me/cats/resolve/main/a/b.png"),
        ("HF://me/model/a.png", "/me/model/resolve/main/a.png"),
        ("hf://models/me/model/a.png", "/me/model/resolve/main/a.png"),
        ("hf://spaces/me/demo@v1.0/a.png", "/spaces/me/demo/resolve/v1.0/a.png"),
        ("hf://datasets/me/cats@refs/pr/7/a.png", "/datasets/me/cats/resolve/refs%2Fpr%2F7/a.png"),
        ("hf://datasets/me/cats@refs%2Fpr%2F7/a.png", "/datasets/me/cats/resolve/refs%2Fpr%2F7/a.png"),
        ("hf://datasets/me/cats/a?b#c%2f d.png", "/datasets/me/cats/resolve/main/a%3Fb%23c%252f%20d.png"),
        ("hf://datasets/me/cats/a@b.png", "/datasets/me/cats/resolve/main/a%40b.png"),
    ],
)
def test_where_a_file_of_the_hub_is(monkeypatch: pytest.MonkeyPatch, url: str, target: str) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    parsed = Hub(BucketGuard()).target(url)
    assert (parsed.origin, parsed.scheme, parsed.target) == ("huggingface.co:443", "https", target)


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/cats/a.png",
        "hf://datasets/me/cats",
        "hf://datasets/me/cats/",
        "hf://datasets/me/../a.png",
        "hf://datasets/me/cats/../a.png",
        "hf://datasets/me/cats//a.png",
        "hf://me@evil.example.org/cats/a.png",
        "hf://datasets/me/cats@../a.png",
        "hf://datasets/me/cats@/a.png",
    ],
)
def test_bad_urls_of_the_hub(url: str) -> None:
    with pytest.raises(InvalidUrl):
        Hub(BucketGuard()).target(url)


def test_the_token_is_for_repositories_that_are_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub = Hub(BucketGuard(["hf://datasets/me/*"]))
    mine, theirs = hub.target("hf://datasets/me/cats/a.png"), hub.target("hf://datasets/you/cats/a.png")
    model = hub.target("hf://me/cats/a.png")
    assert [target.authorization for target in (mine, theirs, model)] == ["Bearer hf_secret", None, None]
    assert "hf_secret" not in mine.key
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert Hub(BucketGuard(["hf://*"])).target("hf://me/cats/a.png").authorization is None
    (tmp_path / "token").write_text("hf_kept\n")
    assert Hub(BucketGuard(["hf://*"])).target("hf://me/cats/a.png").authorization == "Bearer hf_kept"


def test_a_url_with_the_token_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    parser = UrlParser(BucketGuard(["hf://*"]))
    with_token = parser.parse(WebImage("hf://datasets/me/cats/a.png"))
    without = parser.parse(WebImage("https://huggingface.co/datasets/me/cats/resolve/main/a.png"))
    assert (with_token.url, with_token.target) == (without.url, without.target)
    assert with_token.key != without.key


def test_an_endpoint_that_is_not_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.internal")
    with pytest.raises(OptionError, match="HF_ENDPOINT"):
        Hub(BucketGuard())
