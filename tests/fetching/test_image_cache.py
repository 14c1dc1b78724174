"""The ledger of encoded images: who uses them, which give way, and that no room is lost whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchvl.fetching.image_cache import MAX_AGE_SECONDS, CachedImage, ImageBuffer, ImageCache, NoRoom
from batchvl.ipc.arena import Arena
from batchvl.types import Extent
from tests.fuzzing import examples

BLOCK = 4096
BLOCKS = 16


@pytest.fixture
def cache() -> Iterator[ImageCache]:
    arena = Arena(BLOCKS, BLOCK)
    yield ImageCache(arena)
    arena.close()


def put(cache: ImageCache, key: str, blocks: int = 1, now: float = 0.0) -> CachedImage:
    """Add an image that one row uses."""
    extents = cache.reserve([blocks * BLOCK])
    assert extents is not None
    [extent] = extents
    cache.arena.at(extent)[:] = key[:1].encode() * extent.length
    image = cache.add(key, extent, now)
    cache.use(image)
    return image


def data(cache: ImageCache, image: CachedImage) -> bytes:
    return bytes(cache.arena.at(image.extent)[:1])


def room(cache: ImageCache) -> int:
    """Bytes of the arena that nobody holds."""
    return cache.arena.free_blocks * BLOCK


def test_an_image_is_found_while_a_row_uses_it_and_afterwards(cache: ImageCache) -> None:
    image = put(cache, "a")
    assert cache.find("a", 1) is image
    assert cache.find("b", 1) is None
    cache.release(image)
    assert cache.find("a", 2) is image
    assert room(cache) == (BLOCKS - 1) * BLOCK


def test_images_that_no_row_uses_give_way_in_the_order_in_which_they_were_last_used(cache: ImageCache) -> None:
    images = {key: put(cache, key, 4) for key in "abcd"}
    for key in "abc":
        cache.release(images[key])
    cache.use(images["a"])
    cache.release(images["a"])
    assert cache.available_bytes == 12 * BLOCK
    assert cache.reserve([4 * BLOCK]) is not None
    assert {key for key in "abcd" if cache.find(key, 0) is not None} == {"a", "c", "d"}
    assert cache.reserve([4 * BLOCK]) is not None
    assert {key for key in "abcd" if cache.find(key, 0) is not None} == {"a", "d"}
    assert cache.reserve([4 * BLOCK + 1]) is None
    assert cache.find("d", 0) is images["d"], "an image in use never gives way"


def test_an_old_image_is_not_used_again(cache: ImageCache) -> None:
    image = put(cache, "a")
    cache.release(image)
    assert cache.find("a", MAX_AGE_SECONDS) is image
    assert cache.find("a", MAX_AGE_SECONDS + 1) is None
    assert room(cache) == BLOCKS * BLOCK


def test_an_old_image_that_rows_use_stays_for_them_beside_its_successor(cache: ImageCache) -> None:
    old, later = put(cache, "a"), MAX_AGE_SECONDS + 1
    assert cache.find("a", later) is None
    new = put(cache, "a", now=later)
    assert cache.find("a", later) is new
    cache.release(old)
    assert room(cache) == (BLOCKS - 1) * BLOCK
    cache.release(new)
    assert cache.find("a", later) is new


def test_an_old_image_gives_way_to_its_successor_although_it_was_released_first(cache: ImageCache) -> None:
    """The download of the successor began while the old image was in use, and ended when it no longer was."""
    old, later = put(cache, "a"), MAX_AGE_SECONDS + 1
    assert cache.find("a", later) is None
    cache.release(old)
    new = put(cache, "a", now=later)
    cache.release(new)
    assert cache.find("a", later) is new
    cache.use(new)
    other = put(cache, "x", BLOCKS - 2, now=later)
    assert data(cache, new) == b"a", "its room was given to another image"
    for image in (new, other):
        cache.release(image)
    cache.clear()
    assert room(cache) == BLOCKS * BLOCK


def test_the_size_to_expect_follows_the_images(cache: ImageCache) -> None:
    before = cache.usual_bytes
    for _ in range(300):
        image = put(cache, "a", 2)
        cache.release(image)
        cache.clear()
    assert 2 * BLOCK <= cache.usual_bytes <= 4 * BLOCK < before


def arrive(buffer: ImageBuffer, length: int | None, chunks: list[bytes]) -> Extent:
    buffer.begin(length)
    for chunk in chunks:
        buffer.write(chunk)
    return buffer.finish()


@pytest.mark.parametrize("length", [10_000, None])
@pytest.mark.parametrize("reserved", [0, 12 * BLOCK])
def test_an_image_arrives(cache: ImageCache, length: int | None, reserved: int) -> None:
    extents = cache.reserve([reserved]) if reserved else None
    buffer = ImageBuffer(cache, 1 << 20, extents[0] if extents else None)
    extent = arrive(buffer, length, [b"ab" * 2500, b"cd" * 2500])
    buffer.discard()
    assert bytes(cache.arena.at(extent)) == b"ab" * 2500 + b"cd" * 2500
    assert room(cache) == (BLOCKS - 3) * BLOCK, "no more than it needs"
    assert cache.private_bytes == 0


@pytest.mark.parametrize("reserved", [0, 2 * BLOCK])
def test_there_is_no_room_for_an_image_of_known_length(cache: ImageCache, reserved: int) -> None:
    extents = cache.reserve([reserved]) if reserved else None
    buffer = ImageBuffer(cache, 1 << 20, extents[0] if extents else None)
    taken = put(cache, "a", 12)
    with pytest.raises(NoRoom) as error:
        buffer.begin(5 * BLOCK)
    assert error.value.needed == 5 * BLOCK
    buffer.discard()
    cache.release(taken)
    cache.clear()
    assert room(cache) == BLOCKS * BLOCK


def test_images_of_unknown_length_share_a_part_of_the_memory(cache: ImageCache) -> None:
    first, second = ImageBuffer(cache, 1 << 20), ImageBuffer(cache, 1 << 20)
    for buffer in (first, second):
        buffer.begin(None)
    first.write(bytes(cache.max_private_bytes - 10))
    with pytest.raises(NoRoom) as error:
        second.write(bytes(11))
    assert error.value.needed == 22
    second.discard()
    first.discard()
    assert cache.private_bytes == 0


def test_an_image_that_outgrows_its_room_asks_for_twice_as_much_and_never_for_more_than_the_limit(
    cache: ImageCache,
) -> None:
    extents = cache.reserve([BLOCK])
    assert extents is not None
    buffer = ImageBuffer(cache, 12 * BLOCK, extents[0])
    buffer.begin(None)
    buffer.write(bytes(BLOCK))
    with pytest.raises(NoRoom) as error:
        buffer.write(b"x")
    assert error.value.needed == 2 * BLOCK + 2
    with pytest.raises(NoRoom) as error:
        buffer.write(bytes(8 * BLOCK))
    assert error.value.needed == 12 * BLOCK
    buffer.discard()
    assert room(cache) == BLOCKS * BLOCK


def fill(buffer: ImageBuffer, blocks: int) -> None:
    for _ in range(blocks):
        buffer.write(bytes(BLOCK))


def test_an_image_of_unknown_length_may_take_the_whole_arena(cache: ImageCache) -> None:
    needed = 0
    while needed < BLOCKS * BLOCK:
        extents = cache.reserve([needed]) if needed else [None]
        assert extents is not None
        buffer = ImageBuffer(cache, 1 << 30, extents[0])
        buffer.begin(None)
        with pytest.raises(NoRoom) as error:
            fill(buffer, 2 * BLOCKS)
        buffer.discard()
        assert needed < error.value.needed <= BLOCKS * BLOCK
        needed = error.value.needed
    extents = cache.reserve([needed])
    assert extents is not None
    buffer = ImageBuffer(cache, 1 << 30, extents[0])
    buffer.begin(None)
    fill(buffer, BLOCKS)
    with pytest.raises(NoRoom) as error:
        buffer.write(b"x")
    assert error.value.needed > BLOCKS * BLOCK
    buffer.discard()


KEYS = st.sampled_from("ab")


class Ledger(RuleBasedStateMachine):
    """Any sequence of what the fetcher does with the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(BLOCKS, BLOCK)
        self.cache = ImageCache(self.arena)
        self.now = 0.0
        self.used: list[tuple[str, int, CachedImage]] = []
        """Key, content and image of each use."""
        self.arriving: list[tuple[str, int, ImageBuffer]] = []
        self.serial = 0

    @rule(seconds=st.sampled_from([1.0, MAX_AGE_SECONDS + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.arriving) < 6)
    @rule(key=KEYS, length=st.one_of(st.none(), st.integers(1, 8 * BLOCK)), reserved=st.integers(0, 8 * BLOCK))
    def begin(self, key: str, length: int | None, reserved: int) -> None:
        if any(other == key for other, _, _ in self.arriving) or self.cache.find(key, self.now) is not None:
            return  # a URL is downloaded once
        extents = self.cache.reserve([reserved]) if reserved else []
        if extents is None:
            return
        buffer = ImageBuffer(self.cache, 8 * BLOCK, extents[0] if extents else None)
        try:
            buffer.begin(length)
            self.serial = (self.serial + 1) % 256
            buffer.write(bytes([self.serial]) * min(length or 100, 100))
        except NoRoom:
            buffer.discard()
        else:
            self.arriving.append((key, self.serial, buffer))

    @precondition(lambda self: self.arriving)
    @rule(chunk=st.integers(1, 3 * BLOCK), which=st.randoms(use_true_random=False))
    def write(self, chunk: int, which: random.Random) -> None:
        number = which.randrange(len(self.arriving))
        _, serial, buffer = self.arriving[number]
        try:
            buffer.write(bytes([serial]) * chunk)
        except NoRoom:
            buffer.discard()
            del self.arriving[number]

    @precondition(lambda self: self.arriving)
    @rule(users=st.integers(0, 3), which=st.randoms(use_true_random=False))
    def finish(self, users: int, which: random.Random) -> None:
        key, serial, buffer = self.arriving.pop(which.randrange(len(self.arriving)))
        try:
            extent = buffer.finish()
        except NoRoom:
            return
        finally:
            buffer.discard()
        image = self.cache.add(key, extent, self.now)
        self.cache.use(image)
        for _ in range(users):
            self.cache.use(image)
            self.used.append((key, serial, image))
        self.cache.release(image)

    @rule(key=KEYS)
    def use(self, key: str) -> None:
        image = self.cache.find(key, self.now)
        if image is not None:
            before, was_used = self.cache.available_bytes, image.users > 0
            self.cache.use(image)
            assert (self.cache.available_bytes < before) != was_used
            self.used.append((key, bytes(self.arena.at(image.extent)[:1])[0], image))

    @precondition(lambda self: self.used)
    @rule(which=st.randoms(use_true_random=False))
    def release(self, which: random.Random) -> None:
        _, _, image = self.used.pop(which.randrange(len(self.used)))
        self.cache.release(image)

    @precondition(lambda self: self.arriving)
    @rule()
    def discard(self) -> None:
        self.arriving.pop()[2].discard()

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def images_in_use_keep_their_bytes(self) -> None:
        for key, serial, image in self.used:
            assert image.key == key
            assert set(self.arena.at(image.extent)) == {serial}

    @invariant()
    def the_ledger_is_right(self) -> None:
        cache = self.cache
        assert 0 <= cache.private_bytes <= cache.max_private_bytes
        assert cache.available_bytes <= self.arena.size

    def teardown(self) -> None:
        for _, _, buffer in self.arriving:
            buffer.discard()
        for _, _, image in self.used:
            self.cache.release(image)
        self.cache.clear()
        assert self.cache.private_bytes == 0
        assert self.arena.free_blocks == BLOCKS, "room was lost"
        assert self.cache.available_bytes == self.arena.size
        self.arena.close()


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=examples(100), stateful_step_count=80, deadline=None)
