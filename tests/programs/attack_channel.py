"""Attacks on Channel: messages, views, threads, forks, signals, peers that die or lie."""

from __future__ import annotations

import array
import errno
import gc
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attack_common import LIMIT, places, raises, same, status_of

import anyfork
from anyfork._anyfork import Channel, View

LARGE = 200_000  # arrives as views
SEGMENT_SLOTS = 64


def ends() -> tuple[int, int]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return a.detach(), b.detach()


def mappings() -> int:
    with open("/proc/self/maps") as f:
        return sum("anyfork-channel" in line for line in f)


@contextmanager
def pair(**options: Any) -> Iterator[tuple[Channel, Channel]]:
    a, b = (Channel(fd, **options) for fd in ends())
    try:
        yield a, b
    finally:
        a.close()
        b.close()
    del a, b


@contextmanager
def no_mapping_is_left() -> Iterator[None]:
    gc.collect()
    before = mappings()
    yield
    gc.collect()
    same(mappings(), before)


def there(a: Channel, b: Channel, parts: list[Any], fds: tuple[int, ...] = ()) -> tuple[Any, ...]:
    assert a.send(7, 9, parts, fds)
    same(b.wait(LIMIT), 1)
    message = b.receive()
    assert message is not None
    same(message[:2], (7, 9))
    return message[2:]


def child(body: Callable[[], object]) -> int:
    """A fork of this interpreter; 0 is the exit status of a body that returns."""
    pid = os.fork() if anyfork._anyfork.in_main() else anyfork.fork()
    if pid == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return pid


def can_fork(place: str) -> bool:
    if place == "main":
        return True
    try:
        anyfork._anyfork.check_fork()
    except anyfork.MethodUnavailable:
        return False
    return True


# ---- what is sent ------------------------------------------------------------------


def check_what_has_the_buffer_protocol(place: str) -> None:
    with no_mapping_is_left(), pair() as (a, b):
        for n in (0, 1, 500, 5_000, 50_000):
            numbers = array.array("i", range(n))
            sent: list[Any] = [
                numbers,
                memoryview(numbers).cast("B"),
                bytearray(numbers.tobytes()),
                pickle.PickleBuffer(numbers.tobytes()),
                memoryview(numbers.tobytes()).cast("B", shape=[4, n]) if n else b"",
            ]
            parts, fds = there(a, b, sent)
            same(fds, ())
            for part, original in zip(parts, sent, strict=True):
                same(bytes(memoryview(part)), memoryview(original).tobytes())
            for part in parts:
                assert isinstance(part, View if 20 * n > 65536 else bytes), (n, type(part))
            del parts, part
        raises(TypeError, a.send, 1, 1, ["text"])
        raises(TypeError, a.send, 1, 1, 3)
        raises(BufferError, a.send, 1, 1, [memoryview(b"abcd")[::2]])
        raises(ValueError, a.send, -1, 1, [])
        raises(ValueError, a.send, 65536, 1, [])
        raises(OverflowError, a.send, 1, 1 << 64, [])
        raises(OverflowError, a.send, 1, -1, [])
        raises(TypeError, a.send, "x", "y", [])
        raises(TypeError, a.send, 1, 1)
        raises(TypeError, a.send, 1, 1, [], (), ())
        raises(TypeError, a.send, 1, 1, [], fd=())
        raises(TypeError, a.send, 1, 1, [], (), fds=())
        raises(TypeError, a.wait, "x")
        raises(ValueError, a.wait, float("nan"))
        same(b.receive(), None)  # nothing of that was sent
        same(there(a, b, [b"x"]), ((b"x",), ()))


def check_pickles_without_a_copy(place: str) -> None:
    class Blob(bytearray):
        def __reduce_ex__(self, protocol: Any) -> Any:
            return bytes, (pickle.PickleBuffer(self),)

    with no_mapping_is_left(), pair() as (a, b):
        blob = Blob(os.urandom(LARGE))
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps([blob, 1], 5, buffer_callback=buffers.append)
        assert len(data) < 1000
        parts, _fds = there(a, b, [data, *buffers])
        loaded = pickle.loads(parts[0], buffers=parts[1:])
        same(loaded, [bytes(blob), 1])
        del parts, loaded


def check_descriptors(place: str) -> None:
    with pair() as (a, b):
        r, w = os.pipe()
        for size in (1, LARGE):
            parts, fds = there(a, b, [bytes(size)], (w, r))
            same(len(fds), 2)
            assert not any(os.get_inheritable(fd) for fd in fds)
            os.write(fds[0], b"x")
            same(os.read(r, 1), b"x")
            for fd in fds:
                os.close(fd)
            del parts
        with socket.socket() as s:  # fileno() will do
            (fd,) = there(a, b, [], [s])[1]
            os.close(fd)
        raises(OSError, a.send, 1, 1, [], (w, 999))
        raises(TypeError, a.send, 1, 1, [], ("x",))
        raises(ValueError, a.send, 1, 1, [], (w,) * 253)
        os.close(r)
        os.close(w)
        same(b.receive(), None)


def check_no_descriptor_is_left_for_it(place: str) -> None:
    """The message is lost, so that the channel is; and the reason is said."""
    import resource

    with pair() as (a, b):
        assert a.send(1, 1, [], (0, 1, 2))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            b.receive()
        except OSError as e:
            same(e.errno, errno.EMFILE)
            assert "RLIMIT_NOFILE" in str(e)
        else:
            raise AssertionError("no error")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert b.closed


# ---- views ---------------------------------------------------------------------------


def check_views(place: str) -> None:
    with no_mapping_is_left(), pair() as (a, b):
        (view,), _ = there(a, b, [b"v" * LARGE])
        same(len(view), LARGE)
        with memoryview(view) as m:
            assert m.readonly and m.format == "B" and m.contiguous
            raises(TypeError, m.__setitem__, 0, 1)
            part = m[5:10]
            part = part[1:]
        del m, view
        for i in range(3 * SEGMENT_SLOTS):  # whatever comes after it
            there(a, b, [bytes([i % 256]) * LARGE])
        same(bytes(part), b"vvvv")
        a.close()
        b.close()
        same(bytes(part), b"vvvv")
        raises(TypeError, View)
        del part


def check_memory_of_kept_views(place: str) -> None:
    """A user who keeps all that he gets: it is right, and mappings are bounded."""
    with no_mapping_is_left(), pair() as (a, b):
        kept = [there(a, b, [bytes([i % 256]) * LARGE])[0][0] for i in range(1000)]
        assert mappings() < 5 * SEGMENT_SLOTS, mappings()
        assert all(bytes(part) == bytes([i % 256]) * LARGE for i, part in enumerate(kept))
        same(sum(isinstance(part, View) for part in kept), SEGMENT_SLOTS // 2 + 1)
        small = [there(a, b, [bytes([i % 256]) * 30_000])[0][0] for i in range(1000)]
        assert all(part == bytes([i % 256]) * 30_000 for i, part in enumerate(small))
        del kept, small


def check_memory_is_used_again(place: str) -> None:
    with no_mapping_is_left(), pair() as (a, b):
        for i in range(500):
            parts, _ = there(a, b, [bytes([i % 256]) * (LARGE + 100 * (i % 7))])
            same(bytes(memoryview(parts[0])[-3:]), bytes([i % 256]) * 3)
            del parts
        same(a.statistics()["segments"], 1)
        a.trim()
        same(a.statistics()["segments"], 0)
        (part,), _ = there(a, b, [b"x" * 5_000_000])
        same(len(part), 5_000_000)
        del part
        same(b.statistics()["segments"], 1)


# ---- room, waiting, the end ------------------------------------------------------------


def check_back_pressure(place: str) -> None:
    with no_mapping_is_left(), pair() as (a, b):
        for size in (0, 100, 15_000, LARGE, 5_000_000):
            data, sent = bytes(size), 0
            while a.send(1, sent, [data]):
                sent += 1
                assert sent * max(size, 700) < 300_000_000, "it is never full"
            same(a.wait_writable(0), False)
            begun = time.monotonic()
            same(a.wait_writable(0.05), False)
            assert time.monotonic() - begun >= 0.05
            for i in range(sent):
                message = b.receive()
                assert message is not None and message[1] == i
            del message
            same(b.receive(), None)
            same(a.wait_writable(LIMIT), True)


def check_waiting(place: str) -> None:
    with pair() as (a, b):
        same(b.wait(0), 0)
        same(b.wait(0, 1.0), 0)
        for spin in (0.0, 0.001, 10.0):
            begun = time.monotonic()
            same(b.wait(0.03, spin), 0)
            assert 0.03 <= time.monotonic() - begun < LIMIT / 2
        r, w = os.pipe()
        os.write(w, b"x")
        same(b.wait(None, also=r), 2)
        same(b.wait(None, 0.01, r), 2)
        a.send(1, 1, [])
        same(b.wait(None, also=r), 3)
        same(b.wait(), 1)
        os.close(r)
        os.close(w)


def check_close_wakes_a_waiter(place: str) -> None:
    with pair() as (a, b):
        for end, close in ((a, a.close), (b, b.shutdown)):
            got: list[Any] = []

            def wait(end: Channel = end, got: list[Any] = got) -> None:
                try:
                    got.append(end.wait())
                except ValueError:
                    got.append("closed")

            threads = [threading.Thread(target=wait) for _ in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.01)
            close()
            for thread in threads:
                thread.join(LIMIT)
            assert set(got) <= {1, "closed"} and len(got) == 3, got
        assert a.closed and not b.closed
        raises(EOFError, b.receive)


def check_closed(place: str) -> None:
    with pair() as (a, b):
        fd = a.fileno()
        a.close()
        a.close()
        a.shutdown()
        a.trim()
        assert a.closed
        raises(OSError, os.fstat, fd)
        for call in (a.fileno, a.receive, a.wait, lambda: a.send(1, 1, []), a.wait_writable):
            raises(ValueError, call)
        same(a.statistics()["sent"], 0)
        same(b.wait(LIMIT), 1)
        raises(EOFError, b.receive)
        raises(EOFError, b.receive)
        raises(BrokenPipeError, b.send, 1, 1, [b"x"])
        raises(BrokenPipeError, b.send, 1, 1, [b"x" * LARGE])
        same(b.wait_writable(LIMIT), True)


def check_what_is_no_socket(place: str) -> None:
    r, w = os.pipe()
    stream = socket.socketpair()
    for fd in (r, w, stream[0].fileno()):
        raises(ValueError, Channel, fd)
        os.fstat(fd)  # still the caller's
    raises(OSError, Channel, -1)
    raises(ValueError, Channel, stream[0].fileno(), -1)
    raises(TypeError, Channel, "x")
    raises(TypeError, Channel)
    os.close(r)
    os.close(w)
    for s in stream:
        s.close()


def check_message_max(place: str) -> None:
    fds = ends()
    small, large = Channel(fds[0], message_max=100_000), Channel(fds[1], message_max=200_000)
    raises(ValueError, small.send, 1, 1, [bytes(60_000), bytes(60_000)])
    same(len(there(small, large, [bytes(100_000)])[0][0]), 100_000)
    assert large.send(1, 1, [bytes(100_001)])
    try:
        small.receive()
    except ConnectionAbortedError as e:
        assert "message_max" in str(e), e
    assert small.closed
    raises(EOFError, large.receive)
    large.close()


# ---- signals -----------------------------------------------------------------------------


@places("main")
def check_a_handler_runs_while_it_waits(place: str) -> None:
    class Stop(Exception):
        pass

    def handler(*_args: object) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Stop

    for spin in (0.0, 3600.0):
        seen: list[int] = []
        old = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        try:
            with pair() as (_a, b):
                raises(Stop, b.wait, None, spin)
                same(len(seen), 3)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


@places("main")
def check_signals_do_not_cut_what_is_sent(place: str) -> None:
    """Large messages beside a timer: fallocate(2) gives up, and begins anew, at each signal."""
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with no_mapping_is_left():
            for _ in range(3):
                with pair() as (a, b):
                    (part,), _fds = there(a, b, [b"s" * 30_000_000])
                    same(len(part), 30_000_000)
                    del part
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# ---- forks and deaths ----------------------------------------------------------------------


def check_in_a_forked_child_it_is_closed(place: str) -> None:
    if not can_fork(place):
        return
    with pair() as (a, b):
        (view,), _ = there(a, b, [b"f" * LARGE])
        fd = a.fileno()

        def body() -> None:
            assert a.closed and b.closed
            raises(OSError, os.fstat, fd)
            for call in (a.fileno, a.receive, a.wait, lambda: a.send(1, 1, [])):
                raises(ValueError, call)
            a.close()
            a.trim()
            a.statistics()
            same(bytes(view), b"f" * LARGE)

        same(status_of(child(body)), 0)
        same(there(a, b, [b"x"]), ((b"x",), ()))  # the parent's are as before


def check_views_of_a_forked_child(place: str) -> None:
    """It keeps them, whatever the parent does; and what it lets go of is still the parent's."""
    if not can_fork(place):
        return
    with no_mapping_is_left(), pair() as (a, b):
        kept = [there(a, b, [b"f" * LARGE])[0][0]]
        r, w = os.pipe()

        def body() -> None:
            os.close(w)
            os.read(r, 1)  # until all of them were used again
            same(bytes(kept[0]), b"f" * LARGE)

        pid = child(body)
        kept.clear()
        for _ in range(2 * SEGMENT_SLOTS):
            there(a, b, [b"x" * LARGE])
        os.close(r)
        os.close(w)
        same(status_of(pid), 0)

        kept.append(there(a, b, [b"g" * LARGE])[0][0])
        same(status_of(child(kept.clear)), 0)
        for _ in range(2 * SEGMENT_SLOTS):
            there(a, b, [b"x" * LARGE])
        same(bytes(kept[0]), b"g" * LARGE)
        kept.clear()


def check_a_peer_that_is_killed(place: str) -> None:
    """What it had sent is received; then comes the end, also where it had not read all."""
    if not can_fork(place):
        return
    for unread in (0, 3):
        fds = ends()
        r, w = os.pipe()

        def body(fds: tuple[int, int] = fds, w: int = w) -> None:
            os.close(fds[0])
            b = Channel(fds[1])
            for i in range(5):
                assert b.send(1, i, [bytes([i]) * LARGE])
            os.write(w, b"x")
            time.sleep(LIMIT)

        pid = child(body)
        os.close(fds[1])
        a = Channel(fds[0])
        os.read(r, 1)
        for i in range(unread):
            a.send(1, i, [b"unread"])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for i in range(5):
            message = a.receive()
            assert message is not None and message[1] == i
            same(bytes(message[2][0]), bytes([i]) * LARGE)
        raises(EOFError, a.receive)
        raises(EOFError, a.receive)
        raises((BrokenPipeError, ConnectionResetError), a.send, 1, 1, [b"x"])
        a.close()
        os.close(r)
        os.close(w)


# ---- threads ---------------------------------------------------------------------------------


def check_many_threads(place: str) -> None:
    """Senders and receivers of one channel, both directions, views dropped anywhere."""
    n_threads, each = 3, 60
    failed: list[BaseException] = []
    got: list[tuple[int, int]] = []

    def data_of(i: int) -> bytes:
        return bytes([i % 256]) * (0, 20, 10_000, 40_000, LARGE)[i % 5]

    def send(channel: Channel, base: int) -> None:
        for i in range(base, base + each):
            while not channel.send(i % 5, i, [data_of(i), b"end"]):
                channel.wait_writable(LIMIT)

    def receive(channel: Channel, which: int) -> None:
        kept: list[Any] = []
        while True:
            channel.wait(LIMIT)
            try:
                message = channel.receive()
            except EOFError:
                return
            if message is None:
                continue
            kind, i, parts, _fds = message
            assert kind == i % 5 and bytes(parts[0]) == data_of(i) and bytes(parts[1]) == b"end"
            got.append((which, i))
            kept = [*kept[-5:], parts]

    def run(function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except BaseException as e:
            failed.append(e)

    with no_mapping_is_left(), pair() as (a, b):
        receivers = [
            threading.Thread(target=run, args=(receive, end, which))
            for which, end in enumerate((a, b))
            for _ in range(2)
        ]
        senders = [
            threading.Thread(target=run, args=(send, end, base * each))
            for end in (a, b)
            for base in range(n_threads)
        ]
        for thread in receivers + senders:
            thread.start()
        for thread in senders:
            thread.join(LIMIT)
            assert not thread.is_alive()
        begun = time.monotonic()
        while len(got) < 2 * n_threads * each and not failed and time.monotonic() < begun + LIMIT:
            time.sleep(0.005)
        a.shutdown()
        for thread in receivers:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert not failed, failed
        same(sorted(got), [(which, i) for which in (0, 1) for i in range(n_threads * each)])


def check_close_beside_calls(place: str) -> None:
    """Whatever other threads do with it: an error of theirs, and no other file is touched."""
    for _ in range(20):
        a, b = (Channel(fd) for fd in ends())
        wrong: list[BaseException] = []

        def use(end: Channel, wrong: list[BaseException] = wrong) -> None:
            try:
                for i in range(100_000):
                    end.send(1, i, [bytes(30_000 if i % 2 else 10)])
                    end.receive()
                    end.wait(0)
            except (ValueError, EOFError, BrokenPipeError, ConnectionResetError):
                pass
            except BaseException as e:
                wrong.append(e)

        threads = [threading.Thread(target=use, args=(end,)) for end in (a, b, a, b)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        a.close()
        held = [os.open("/dev/null", os.O_RDWR) for _ in range(5)]  # its number, maybe
        b.close()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert not wrong, wrong
        for fd in held:
            os.close(fd)
