"""The directory of `--cache`: what it keeps, what it removes, and what damage and many processes do to it."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.fetching import cache_directory
from batchvl.fetching.cache_directory import MAX_EVICTED, OVERSHOOT, TEMPORARY_SECONDS, CacheDirectory
from batchvl.storage.disk import Disk
from tests.fuzzing import examples
from tests.timing import scaled

ROOT = Path(__file__).parents[2]
LIMIT = 32 * 2**20
DAY = 86400.0
BLOCK = 4096


def cache_at(path: Path, max_bytes: int = 2**30, max_age: float = DAY, disk: Disk | None = None) -> CacheDirectory:
    cache = CacheDirectory(path, max_bytes, max_age, disk)
    cache.open()
    return cache


def image(url: str) -> bytes:
    """The image of a URL, of up to 40 KB."""
    return url.encode() * (sha256(url.encode()).digest()[0] * 10 + 1)


def images(path: Path) -> list[Path]:
    return [file for file in path.glob("images/??/*") if not file.name.startswith(".")]


def size(path: Path) -> int:
    return sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in path.glob("*/??/*"))


def set_age(path: Path, seconds: float) -> None:
    """Let all files look as if they had not been used for a time."""
    then = time.time() - seconds
    for file in path.glob("*/??/*"):
        os.utime(file, (then, then))


def test_an_image_is_found_again_by_its_url_in_another_process(tmp_path: Path) -> None:
    cache_at(tmp_path / "new" / "cache").store("http://a/1", b"image")
    code = """if True:
        import sys; from pathlib import Path; from batchvl.fetching.cache_directory import CacheDirectory
        cache = CacheDirectory(Path(sys.argv[1]), 2**30, 60)
        print(cache.find("http://a/1", 100), cache.find("http://a/2", 100))"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "new" / "cache")], capture_output=True, text=True)
    assert run.stdout == "b'image' None\n", run.stderr


def test_the_same_image_of_many_urls_is_stored_once_under_its_hash(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    for number in range(5):
        cache.store(f"http://a/{number}", b"image")
    assert [file.name for file in images(tmp_path)] == [sha256(b"image").hexdigest()]
    assert all(cache.find(f"http://a/{number}", LIMIT) == b"image" for number in range(5))


def test_a_url_has_the_image_that_was_stored_last(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.store("http://a/1", b"old")
    cache.store("http://a/1", b"new")
    assert cache.find("http://a/1", LIMIT) == b"new"


def test_no_url_is_on_the_disk(tmp_path: Path) -> None:
    cache_at(tmp_path).store("http://me:pa55@a/1?signature=s3cret", b"image")
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert not any(secret in file.read_bytes() + str(file).encode() for secret in (b"pa55", b"s3cret"))


def test_a_new_directory_is_for_its_user_alone_and_left_out_of_backups(tmp_path: Path) -> None:
    cache_at(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    tag = (tmp_path / "cache" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_an_image_is_too_old_after_its_age_however_often_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, now = cache_at(tmp_path, max_age=100), time.time()
    cache.store("http://a/1", b"image")
    for seconds, found in ((60, b"image"), (95, b"image"), (105, None), (-105, None)):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        assert cache.find("http://a/1", LIMIT) == found, seconds


def test_with_an_age_of_0_nothing_is_found(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, max_age=0)
    cache.store("http://a/1", b"image")
    assert cache.find("http://a/1", LIMIT) is None


def test_an_image_that_is_too_large_for_this_run_is_not_found_and_stays(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.store("http://a/1", b"image")
    assert cache.find("http://a/1", 4) is None
    assert cache.find("http://a/1", 5) == b"image"


@pytest.mark.parametrize(
    "data",
    [b"", b"imag", b"imagE", b"image ", bytes(5)],
    ids=["empty", "truncated", "a bit that flipped", "longer", "zeros after a power failure"],
)
def test_a_damaged_image_is_absent_and_can_be_stored_again(tmp_path: Path, data: bytes) -> None:
    cache = cache_at(tmp_path)
    cache.store("http://a/1", b"image")
    [file] = images(tmp_path)
    file.write_bytes(data)
    assert cache.find("http://a/1", LIMIT) is None
    assert (cache.damaged, images(tmp_path)) == (1, [])
    cache.store("http://a/1", b"image")
    assert cache.find("http://a/1", LIMIT) == b"image"


def test_an_image_of_a_wrong_length_is_replaced_by_the_next_that_is_the_same(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.store("http://a/1", b"image")
    images(tmp_path)[0].write_bytes(b"ima")
    cache.store("http://a/2", b"image")
    assert cache.find("http://a/1", LIMIT) == b"image"


@given(st.binary(max_size=200) | st.sampled_from([b"{}", b"[]", b"null", b'{"sha256": 1}']))
@settings(max_examples=examples(50))
def test_a_damaged_record_is_absent(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        cache = cache_at(Path(directory))
        cache.store("http://a/1", b"image")
        [record] = Path(directory).glob("urls/*/*")
        record.write_bytes(data)
        assert cache.find("http://a/1", LIMIT) is None


def test_a_record_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    cache = cache_at(tmp_path / "cache")
    cache.store("http://a/1", b"image")
    [record] = (tmp_path / "cache").glob("urls/*/*")
    for name in ("../../../secret", str(tmp_path / "secret"), sha256(b"image").hexdigest() + "\n"):
        record.write_text(json.dumps({"sha256": name, "fetched": time.time()}))
        assert cache.find("http://a/1", LIMIT) is None


def test_the_size_is_bounded_and_what_is_used_stays(tmp_path: Path) -> None:
    bound = 64 * BLOCK
    cache = cache_at(tmp_path, bound)
    cache.store("http://a/used", b"used")
    cache.store("http://a/unused", b"unused")
    largest = 0
    for number in range(200):
        set_age(tmp_path, 3600)
        assert cache.find("http://a/used", LIMIT) == b"used"
        cache.store(f"http://a/{number}", str(number).encode())
        largest = max(largest, size(tmp_path))
    assert bound / 2 < largest <= bound + bound // OVERSHOOT + 2 * BLOCK
    assert cache.find("http://a/unused", LIMIT) is None
    assert cache.find("http://a/199", LIMIT) == b"199"
    assert 100 < cache.evicted <= 202


def test_urls_of_one_image_take_room_too(tmp_path: Path) -> None:
    """As signed URLs do, which are others every day."""
    cache = cache_at(tmp_path, 64 * BLOCK)
    for number in range(200):
        cache.store(f"http://a/cat?signature={number}", b"image")
    assert size(tmp_path) <= 64 * BLOCK * (OVERSHOOT + 1) / OVERSHOOT + 2 * BLOCK
    assert cache.find("http://a/cat?signature=199", LIMIT) == b"image"


def test_a_smaller_bound_holds_after_some_more_images(tmp_path: Path) -> None:
    for number in range(MAX_EVICTED // 2 + 500):  # with as many records, more files than are removed at a time
        cache_at(tmp_path).store(str(number), str(number).encode())
    cache = cache_at(tmp_path, 64 * BLOCK)
    for number in range(10):
        cache.store(f"new {number}", b"new")
    assert size(tmp_path) <= 64 * BLOCK * (OVERSHOOT + 1) / OVERSHOOT + 2 * BLOCK


def test_runs_that_store_little_remove_as_much_as_one_that_stores_much(tmp_path: Path) -> None:
    bound = 256 * BLOCK
    for number in range(600):
        cache_at(tmp_path, bound).store(str(number), str(number).encode())
    # Each run looks at the directory with a probability of one in sixteen.
    assert size(tmp_path) <= 3 * bound


def test_the_size_is_bounded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_directory, "MIN_PART_BYTES", 64 * BLOCK)
    bound = 64 * 8 * BLOCK  # eight parts
    cache, largest = cache_at(tmp_path, bound), 0
    for number in range(1500):
        cache.store(str(number), str(number).encode())
        if number % 50 == 0:
            largest = max(largest, size(tmp_path))
    assert bound / 2 < largest <= bound * 1.25


def test_only_its_own_files_are_removed_and_temporary_ones_once_they_are_old(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, 8 * BLOCK)
    cache.store("http://a/1", b"image")
    [file] = images(tmp_path)
    mine = [file.with_name("holiday.jpg"), file.parent / "0123", tmp_path / "notes.txt"]
    old, new = file.with_name(f".{'0' * 16}.tmp"), file.with_name(f".{'1' * 16}.tmp")
    for path in (*mine, old, new):
        path.write_bytes(bytes(BLOCK))
    set_age(tmp_path, 10 * TEMPORARY_SECONDS)
    os.utime(new)
    for number in range(50):
        cache.store(str(number), str(number).encode())
    assert all(path.exists() for path in (*mine, new))
    assert not old.exists()
    assert not file.exists()


def test_a_disk_that_fails_in_the_middle_of_an_image_leaves_nothing(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
            super().write(fd, bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_at(tmp_path, disk=FullDisk())
    with pytest.raises(OSError, match="No space"):
        cache.store("http://a/1", bytes(1000))
    assert not [file for file in tmp_path.glob("*/??/*") if file.is_file()]
    assert cache.find("http://a/1", LIMIT) is None


def use(path: Path, seed: int) -> None:
    """Store, find and damage images of a directory at random for a time."""
    numbers = random.Random(seed)
    cache, started, found = cache_at(path, 400 * BLOCK), time.monotonic(), 0
    while (seconds := time.monotonic() - started) < 3 or not (found and cache.evicted):
        assert seconds < scaled(30), f"{found} images were found, and {cache.evicted} removed"
        url = f"http://a/{numbers.randrange(300)}"
        if numbers.random() < 0.5:
            cache.store(url, image(url))
        elif (data := cache.find(url, LIMIT)) is not None:
            found += 1
            assert data == image(url), url
        if numbers.random() < 0.02 and (files := images(path)):
            try:
                os.truncate(numbers.choice(files), 3)
            except FileNotFoundError:
                pass


def test_many_processes_at_once(tmp_path: Path) -> None:
    code = f"import sys, pathlib; from {__name__} import use; use(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(seed)], cwd=ROOT, stderr=subprocess.PIPE)
        for seed in range(4)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert errors == [""] * 4
    assert size(tmp_path) <= 400 * BLOCK * 1.5
    assert not list(tmp_path.glob("*/??/.*")), "a temporary file is left"


def store_and_die(path: Path, calls: int) -> None:
    """Store a URL's new image in a cache; be killed at a call to the disk, writes in their middle."""

    class DyingDisk(Disk):
        """Kills its process at the call of a number."""

        calls = 0

        def die(self) -> None:
            self.calls += 1
            if self.calls == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        def create(self, path: Path) -> int:
            self.die()
            return super().create(path)

        def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
            super().write(fd, memoryview(data)[: len(data) // 2])
            self.die()
            super().write(fd, memoryview(data)[len(data) // 2 :])

        def close(self, fd: int) -> None:
            self.die()
            super().close(fd)

        def rename(self, source: Path, target: Path) -> None:
            self.die()
            super().rename(source, target)

    CacheDirectory(path, 2**30, DAY, DyingDisk()).store("http://a/1", b"new" * 1000)


def test_no_image_is_half_there_after_a_kill(tmp_path: Path) -> None:
    code = f"""if True:
        import sys, pathlib; from {__name__} import store_and_die
        store_and_die(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"""
    found, left = [], 0
    for calls in range(1, 20):
        path = tmp_path / str(calls)
        cache = cache_at(path)
        cache.store("http://a/1", b"old" * 1000)
        writer = subprocess.run([sys.executable, "-c", code, str(path), str(calls)], cwd=ROOT)
        data = cache.find("http://a/1", LIMIT)
        assert data is not None
        assert data in (b"old" * 1000, b"new" * 1000)
        found.append(data[:3])
        for file in images(path):
            assert sha256(file.read_bytes()).hexdigest() == file.name
        left += len(list(path.glob("*/??/.*")))
        assert cache.damaged == 0
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
    else:
        pytest.fail("the writer was killed at every call")
    assert found == [b"old"] * (len(found) - 1) + [b"new"]
    assert len(found) >= 8, "an image and the entry of its URL: each created, written, closed and renamed"
    assert left, "no kill hit a write: the test shows nothing"
