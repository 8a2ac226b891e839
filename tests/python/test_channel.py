"""Channels: what is sent arrives, and what no channel has sent is refused."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from attack_helpers import parametrized, run_check
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from anyfork._anyfork import Channel

FRAME = struct.Struct("=IHHQQQIHHHHHH")  # struct afk_frame
MAGIC, VERSION = 0x434B4641, 1
some = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.timeout(300)
@parametrized("attack_channel")
def test_channel(check: str, place: str) -> None:
    run_check("attack_channel", check, place)


@contextmanager
def pair() -> Iterator[tuple[Channel, Channel]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = Channel(a.detach()), Channel(b.detach())
    try:
        yield ours, theirs
    finally:
        ours.close()
        theirs.close()


sizes = st.one_of(
    st.integers(0, 300),
    st.integers(16_000, 16_500),
    st.integers(60_000, 70_000),
    st.integers(0, 300_000),
)
parts = st.lists(sizes, max_size=12)


def made(sizes: list[int], seed: int) -> list[bytes]:
    return [bytes([(seed + i) % 256]) * size for i, size in enumerate(sizes)]


@pytest.mark.timeout(300)
@some
@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 2**64 - 1), parts), max_size=8),
    st.integers(0, 3),
)
@example([(0, 0, [])], 0)
@example([(1, 2, [0] * 9)], 0)
@example([(1, 2, [16_336])], 0)
@example([(1, 2, [70_000])] * 8, 3)
def test_any_messages_arrive(messages: list[tuple[int, int, list[int]]], keep: int) -> None:
    """In order, whole, and as long as they are kept."""
    kept: list[tuple[Any, list[bytes]]] = []
    with pair() as (a, b):
        for seed, (kind, number, sizes) in enumerate(messages):
            sent = made(sizes, seed)
            assert a.send(kind, number, sent)
            message = b.receive()
            assert message is not None
            assert message[:2] == (kind, number)
            assert message[3] == ()
            kept = [*kept[-keep:], (message[2], sent)] if keep else [(message[2], sent)]
            for got, was in kept:
                assert [bytes(part) for part in got] == was
        assert b.receive() is None
    for got, was in kept:  # the channels have gone
        assert [bytes(part) for part in got] == was


@pytest.mark.timeout(300)
@some
@given(st.lists(sizes, min_size=1, max_size=60))
def test_what_has_room_is_queued_in_order(sizes: list[int]) -> None:
    with pair() as (a, b):
        n = 0
        while n < len(sizes) and a.send(1, n, made([sizes[n]], n)):
            n += 1
        for i in range(n):
            message = b.receive()
            assert message is not None
            assert message[1] == i
            assert [bytes(part) for part in message[2]] == made([sizes[i]], i)
        assert b.receive() is None


def frame(**members: int) -> bytes:
    fields = {
        "magic": MAGIC,
        "version": VERSION,
        "kind": 1,
        "id": 2,
        "body_bytes": 8,
        "segment_bytes": 0,
        "n_parts": 0,
        "n_fds": 0,
        "flags": 0,
        "slot": 0,
    }
    fields.update(members)
    return FRAME.pack(*fields.values(), 0, 0, 0)


@contextmanager
def beside_raw() -> Iterator[tuple[socket.socket, Channel]]:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(other.detach())
    try:
        with raw:
            yield raw, channel
    finally:
        channel.close()


def received_or_refused(channel: Channel) -> tuple[Any, ...] | None:
    try:
        message = channel.receive()
    except ConnectionAbortedError as e:
        assert "the peer sent" in str(e)
        assert "start the worker again" in str(e)
        assert channel.closed
        return None
    assert message is not None
    assert not channel.closed
    return message


members = st.fixed_dictionaries(
    {},
    optional={
        "magic": st.one_of(st.just(MAGIC), st.integers(0, 2**32 - 1)),
        "version": st.integers(0, 2**16 - 1),
        "body_bytes": st.one_of(st.integers(0, 200), st.integers(0, 2**64 - 1)),
        "segment_bytes": st.one_of(st.integers(0, 9000), st.integers(0, 2**64 - 1)),
        "n_parts": st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1)),
        "n_fds": st.integers(0, 3),
        "flags": st.integers(0, 9),
        "slot": st.one_of(st.integers(0, 2), st.integers(0, 2**16 - 1)),
    },
)


@pytest.mark.timeout(300)
@some
@given(members, st.binary(max_size=200), st.integers(0, 2))
@example({}, b"\0" * 8, 0)
@example({"n_parts": 1, "body_bytes": 16}, struct.pack("=Q", 3) + b"abc\0\0\0\0\0", 0)
def test_any_frame_is_received_or_refused(changed: dict[str, int], body: bytes, fds: int) -> None:
    with beside_raw() as (raw, channel):
        socket.send_fds(raw, [frame(**changed) + body], [raw.fileno()] * fds)
        message = received_or_refused(channel)
        if message is None:
            assert raw.recv(100) == b""  # the peer is told by the end
            return
        assert message[0] == 1
        assert sum(len(part) for part in message[2]) <= len(body)
        assert len(message[3]) == fds
        for fd in message[3]:
            socket.close(fd)


@pytest.mark.timeout(300)
@some
@given(st.binary(max_size=20_000))
@example(b"")
def test_any_bytes_are_refused(data: bytes) -> None:
    with beside_raw() as (raw, channel):
        raw.send(data)
        if data[:4] != struct.pack("=I", MAGIC):
            assert received_or_refused(channel) is None
            with pytest.raises(ValueError, match="closed"):
                channel.receive()


def test_the_frame_of_this_test_is_that_of_the_channel() -> None:
    raw, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(other.detach())
    with raw:
        assert channel.send(1, 2, [b"abc"])
        body = struct.pack("=Q", 3) + b"abc\0\0\0\0\0"
        assert raw.recv(1000) == frame(body_bytes=len(body), n_parts=1) + body
    channel.close()
