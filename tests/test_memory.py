"""Memory for large reads: writable, of the asked size, and each thread's own."""

from __future__ import annotations

from threading import Thread

import pytest

from loramgr.memory import fresh, large_pages, piece


@pytest.mark.parametrize("size", [0, 1, 4096, (1 << 22) - 1, 1 << 22, (1 << 22) + 1, 9_000_001])
def test_large_pages_are_writable_zeros_of_that_size(size: int) -> None:
    memory = memoryview(large_pages(size))
    assert len(memory) == memory.nbytes == size
    assert not memory.readonly
    assert bytes(memory) == bytes(size)
    memory[size // 2 :] = b"x" * (size - size // 2)
    assert bytes(memory).count(b"x") == size - size // 2


def test_a_piece_is_used_again_and_grows() -> None:
    first = piece("a", 10)
    first[:] = b"0123456789"
    assert bytes(piece("a", 4)) == b"0123"
    assert len(piece("a", 5_000_000)) == 5_000_000
    assert bytes(first) == b"0123456789"  # what was given out stays


def test_threads_have_pieces_of_their_own() -> None:
    mine = piece("a", 8)
    mine[:] = b"a" * 8
    others: list[bytes] = []

    def write() -> None:
        memory = piece("a", 8)
        memory[:] = b"b" * 8
        others.append(bytes(memory))

    thread = Thread(target=write)
    thread.start()
    thread.join()
    assert (bytes(mine), others) == (b"a" * 8, [b"b" * 8])


def test_slots_are_apart_and_fresh_memory_is_nobodys() -> None:
    piece("a", 4)[:] = b"aaaa"
    piece("b", 4)[:] = b"bbbb"
    fresh("a", 4)[:] = b"cccc"
    assert (bytes(piece("a", 4)), bytes(piece("b", 4))) == (b"aaaa", b"bbbb")


def test_a_thread_keeps_no_more_than_64_mib() -> None:
    kept, given = piece("large", 1 << 26), piece("large", (1 << 26) + 1)
    given[:1] = b"x"
    assert bytes(piece("large", 1)) == bytes(kept[:1]) == b"\0"
