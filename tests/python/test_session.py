"""The owner's session and the pickles of its messages, by properties; no worker is needed."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import talk_targets as targets
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anyfork import _boot, _session
from anyfork._errors import CallCancelled

pytestmark = pytest.mark.timeout(120)

KINDS = [*range(16), 2**16 - 1]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Model:
    """What a call of so many may be answered, written down once more."""

    def __init__(self, count: int, stream: bool) -> None:
        self.session = _session.Session("fork", True)
        what = (targets.echo, [(n,) for n in range(count)])
        self.call, message = self.session.begin(_session.CALL_MANY, what, count)
        self.first = message[1]
        self.count = count
        self.expected: list[Any] = []
        if stream:
            self.call.stream = _session.Stream(2)
        self.items = 0
        self.ended = False
        self.over = False

    def is_legal(self, kind: int, number: int, parts: tuple[bytes, ...]) -> bool:
        if kind == _session.READY:
            return True
        if not self.first <= number < self.first + self.count:
            # Of an earlier call: late, and nobody's.
            return number < self.first and kind in _session._OF_CALLS
        if kind in (_session.RESULT, _session.RAISED, _session.CANCELLED):
            return number == self.first + len(self.expected) and not self.over
        if kind == _session.PROGRESS:
            return True
        if self.call.stream is None:
            return False
        if kind == _session.ITEM:
            return self.items < 2 and not self.ended
        return kind == _session.END or (kind == _session.CREDIT and len(parts[0]) == 4)

    def take(self, kind: int, value: int) -> None:
        if kind == _session.RESULT:
            self.expected.append((True, value))
        elif kind == _session.RAISED:
            self.expected.append((False, ValueError))
        elif kind == _session.CANCELLED:
            self.expected.append((False, CallCancelled))
            self.over = True
        elif kind == _session.ITEM:
            self.items += 1
        elif kind == _session.END:
            self.ended = True
        self.over = self.over or len(self.expected) == self.count


def parts_of(kind: int, value: int) -> tuple[bytes, ...]:
    if kind == _session.RAISED:
        return (_boot.describe(ValueError(str(value))),)
    if kind == _session.CREDIT:
        return _session.number(value)
    return (pickle.dumps(value, 5),)


@settings(max_examples=300, deadline=None)
@example(count=1, stream=False, said=[(5, 1, 0, False), (5, 2, 0, False)])  # one answer too many
@given(
    count=st.integers(1, 4),
    stream=st.booleans(),
    said=st.lists(
        st.tuples(
            st.one_of(st.sampled_from([_session.RESULT, _session.RAISED]), st.sampled_from(KINDS)),
            st.integers(0, 6),
            st.integers(0, 2**32 - 1),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_any_messages(count: int, stream: bool, said: list[tuple[int, int, int, bool]]) -> None:
    """What is legal has its outcome, what is not is a ProtocolError, and no descriptor that
    came with either is left."""
    before = descriptors()
    model = Model(count, stream)
    for kind, number, value, with_fd in said:
        if kind == _session.LOG:
            continue
        parts = parts_of(kind, value)
        fds = (os.open("/dev/null", os.O_RDONLY),) if with_fd else ()
        legal = model.is_legal(kind, number, parts)
        try:
            model.session.received((kind, number, parts, fds))
        except _session.ProtocolError:
            assert not legal, (kind, number)
            break
        assert legal, (kind, number)
        in_turn = model.first <= number < model.first + count
        if in_turn:
            model.take(kind, value)
    got = [(ok, value if ok else type(value)) for ok, value in model.call.outcomes]
    assert got == model.expected
    if model.call.stream is not None:
        model.call.stream.drop()
    assert descriptors() == before


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=VALUES, buffers=st.lists(st.binary(), max_size=3), fds=st.integers(0, 3))
def test_any_value(value: Any, buffers: list[bytes], fds: int) -> None:
    """Values, buffers out of band and descriptors arrive as they were, as a result too."""
    before = descriptors()
    blobs = [targets.Blob(buffer) for buffer in buffers]
    r, w = pipe = os.pipe()
    try:
        check_value(value, buffers, fds, blobs, r, w)
    finally:
        for fd in pipe:
            os.close(fd)
    assert descriptors() == before


def check_value(
    value: Any, buffers: list[bytes], fds: int, blobs: list[Any], r: int, w: int
) -> None:
    sent = (value, blobs, [_session.Descriptor(w) for _ in range(fds)])
    for parts, numbers in (
        _session.dump(sent),
        _session.dump_call((targets.echo, (sent,)), "fork", True),
    ):
        assert list(numbers) == [w] * fds and len(parts) == 1 + len(buffers)
        got = _session.load([bytes(part) for part in parts], [os.dup(fd) for fd in numbers])
        if len(got) == 2:
            assert got[0] is targets.echo
            (got,) = got[1]
        assert got[0] == value
        assert [bytes(blob.data) for blob in got[1]] == buffers
        for descriptor in got[2]:
            os.write(descriptor.fileno(), b"x")
            assert os.read(r, 9) == b"x"
        del got


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), fds=st.integers(0, 2))
def test_bytes_that_are_no_pickle(data: bytes, fds: int) -> None:
    """An outcome that tells so; the descriptors are closed."""
    before = descriptors()
    session = _session.Session("fork", True)
    call, message = session.begin(_session.CALL, (targets.echo, (1,)))
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(fds)]
    session.received((_session.RESULT, message[1], (b"\x80\x05" + data + b"!",), numbers))
    assert call.done and not call.outcomes[0][0]
    assert descriptors() == before
