/* Channels: frame and body, segments, sockets. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/channel.h"

#define MESSAGE_MAX ((uint64_t)1 << 32)
#define LARGE 200000u /* through a segment, and not copied */

static struct afk_channel *ours, *theirs;

/* Mappings of segments, of this process. */
static unsigned
count_mappings(void)
{
    char line[512];
    unsigned n = 0;
    FILE *f = fopen("/proc/self/maps", "re");
    assert_non_null(f);
    while (fgets(line, sizeof line, f) != NULL)
        n += strstr(line, "anyfork-channel") != NULL;
    (void)fclose(f);
    return n;
}

static void
make_pair(void)
{
    int fds[2];
    assert_int_equal(afk_os_socketpair(fds, SOCK_SEQPACKET), 0);
    assert_int_equal(afk_channel_new(&ours, fds[0], MESSAGE_MAX), 0);
    assert_int_equal(afk_channel_new(&theirs, fds[1], MESSAGE_MAX), 0);
}

static int
open_pair(void **state)
{
    int r = harness_begin(state);
    make_pair();
    return r;
}

static int
close_pair(void **state)
{
    afk_channel_free(ours);
    afk_channel_free(theirs);
    unsigned left = count_mappings();
    if (left != 0) {
        (void)fprintf(stderr, "leak: %u mappings\n", left);
        return -1;
    }
    return harness_end(state);
}

#define PAIR(test) cmocka_unit_test_setup_teardown(test, open_pair, close_pair)

static unsigned char
byte_at(uint64_t id, unsigned part, size_t at)
{
    return (unsigned char)(id * 31 + part * 7 + at * 13 + at / 251);
}

static char *
made_part(uint64_t id, unsigned part, size_t size)
{
    char *bytes = malloc(size + 1);
    assert_non_null(bytes);
    for (size_t i = 0; i < size; i++)
        bytes[i] = (char)byte_at(id, part, i);
    return bytes;
}

static int
send_sizes(struct afk_channel *channel, uint64_t id, const size_t *sizes, unsigned n)
{
    struct iovec *parts = calloc(n + 1, sizeof *parts);
    assert_non_null(parts);
    for (unsigned i = 0; i < n; i++)
        parts[i] = (struct iovec){made_part(id, i, sizes[i]), sizes[i]};
    const struct afk_message message = {.kind = 7, .id = id, .parts = parts, .n_parts = n};
    int r = afk_channel_send(channel, &message);
    for (unsigned i = 0; i < n; i++)
        free(parts[i].iov_base);
    free(parts);
    return r;
}

static void
check_parts(const struct afk_received *r, uint64_t id, const size_t *sizes, unsigned n)
{
    assert_int_equal(r->kind, 7);
    assert_true(r->id == id);
    assert_int_equal(r->n_parts, n);
    for (unsigned i = 0; i < n; i++) {
        const unsigned char *bytes = r->parts[i].iov_base;
        assert_int_equal(r->parts[i].iov_len, sizes[i]);
        if (r->mapping != NULL)
            assert_int_equal((uintptr_t)bytes % AFK_SEGMENT_ALIGN, 0);
        for (size_t at = 0; at < sizes[i]; at++)
            if (bytes[at] != byte_at(id, i, at))
                fail_msg("part %u of %u differs at %zu", i, n, at);
    }
}

/* One message, which is there. */
static void
receive(struct afk_channel *channel, struct afk_received *r)
{
    const char *why = "nothing is there";
    int code = afk_channel_receive(channel, r, &why);
    if (code != 1)
        fail_msg("%d: %s", code, why);
}

static void
there(uint64_t id, const size_t *sizes, unsigned n)
{
    static struct afk_received r;
    assert_int_equal(send_sizes(ours, id, sizes, n), 1);
    receive(theirs, &r);
    check_parts(&r, id, sizes, n);
    afk_received_drop(&r, 0);
}

static void
test_every_size_arrives(void **state)
{
    (void)state;
    const size_t limit = AFK_INLINE_MAX - sizeof(uint64_t);
    const size_t around[] = {0,     1,     7,      8,      9,        limit,   limit + 1, 65000,
                             65536, 65537, 262144, 300000, 1u << 20, 5u << 20};
    there(0, NULL, 0);
    for (unsigned i = 0; i < sizeof around / sizeof *around; i++) {
        there(i, &around[i], 1);
        const size_t three[] = {around[i], 0, around[sizeof around / sizeof *around - 1 - i]};
        there(UINT64_MAX - i, three, 3);
    }
    size_t many[3000];
    for (unsigned n = 0; n < 3000; n++)
        many[n] = n % 101;
    there(1, many, AFK_FEW_PARTS);
    there(1, many, AFK_FEW_PARTS + 1);
    there(1, many, 200);
    there(1, many, 3000);
}

static void
test_what_was_sent_is_counted(void **state)
{
    struct afk_channel_counts a, b;
    const size_t small = 100, large = LARGE;
    (void)state;
    there(1, &small, 1);
    there(2, &large, 1);
    afk_channel_counts(ours, &a);
    afk_channel_counts(theirs, &b);
    assert_int_equal(a.sent, 2);
    assert_int_equal(a.bytes_sent, small + large);
    assert_int_equal(a.shared_sent, large);
    assert_int_equal(a.received, 0);
    assert_int_equal(b.received, 2);
    assert_int_equal(b.bytes_received, small + large);
    assert_int_equal(b.shared_received, large);
    assert_int_equal(a.segments, 1);
    assert_int_equal(b.segments, 1);
    assert_true(a.segment_bytes >= large && a.segment_bytes == b.segment_bytes);
}

static void
test_a_segment_is_used_again_once_no_view_is_left(void **state)
{
    static struct afk_received first, second;
    struct afk_channel_counts counts;
    const size_t size = LARGE;
    (void)state;
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    receive(theirs, &first);
    afk_mapping_ref(first.mapping); /* a view that outlives the message */
    struct afk_mapping *kept = first.mapping;
    const void *bytes = first.parts[0].iov_base;
    afk_received_drop(&first, 0);

    assert_int_equal(send_sizes(ours, 2, &size, 1), 1);
    receive(theirs, &second);
    assert_ptr_not_equal(second.parts[0].iov_base, bytes);
    assert_int_equal(*(const unsigned char *)bytes, byte_at(1, 0, 0));
    afk_received_drop(&second, 0);
    afk_mapping_unref(kept);
    for (uint64_t id = 3; id < 100; id++)
        there(id, &size, 1);
    afk_channel_counts(ours, &counts);
    assert_int_equal(counts.segments, 2);
}

static void
test_views_outlive_both_channels(void **state)
{
    static struct afk_received r;
    const size_t size = LARGE;
    (void)state;
    assert_int_equal(send_sizes(ours, 5, &size, 1), 1);
    receive(theirs, &r);
    afk_channel_close(ours);
    afk_channel_close(theirs);
    check_parts(&r, 5, &size, 1);
    afk_received_drop(&r, 0);
}

/* A user who keeps what he receives: bounded slots, bounded mappings, and nothing is lost. */
static void
test_many_messages_are_kept(void **state)
{
    enum { N = 400 };
    static struct afk_received kept[N];
    struct afk_channel_counts counts;
    const size_t size = LARGE;
    unsigned viewed = 0;
    (void)state;
    for (unsigned i = 0; i < N; i++) {
        assert_int_equal(send_sizes(ours, i, &size, 1), 1);
        receive(theirs, &kept[i]);
        viewed += !kept[i].copy;
        if (kept[i].copy) { /* as the layer above does */
            check_parts(&kept[i], i, &size, 1);
            afk_received_drop(&kept[i], 0);
        }
    }
    assert_true(viewed >= AFK_SLOTS / 2 && viewed <= AFK_SLOTS / 2 + 1);
    afk_channel_counts(theirs, &counts);
    assert_true(counts.segments <= AFK_SLOTS / 2 + 2);
    for (unsigned i = 0; i < N; i++) {
        if (kept[i].copy)
            continue;
        check_parts(&kept[i], i, &size, 1);
        afk_received_drop(&kept[i], 0);
    }
}

/* All slots taken: messages of their own segments, which are gone with them. */
static void
test_without_a_slot_a_segment_is_temporary(void **state)
{
    enum { N = AFK_SLOTS + 20 };
    static struct afk_received kept[N];
    struct afk_channel_counts counts;
    const size_t sizes[] = {2u << 20, 0, 70000};
    (void)state;
    for (unsigned i = 0; i < N; i++) {
        assert_int_equal(send_sizes(ours, i, sizes, 3), 1);
        receive(theirs, &kept[i]);
        assert_false(kept[i].copy); /* large enough */
    }
    afk_channel_counts(ours, &counts);
    assert_int_equal(counts.segments, AFK_SLOTS);
    unsigned mappings = count_mappings();
    for (unsigned i = 0; i < N; i++) {
        check_parts(&kept[i], i, sizes, 3);
        afk_received_drop(&kept[i], 0);
    }
    assert_true(count_mappings() <= mappings - 20);
    there(1, sizes, 3);
}

static void
test_retired_segments_are_unmapped(void **state)
{
    struct afk_channel_counts counts;
    const size_t large = 4u << 20, larger = 8u << 20;
    (void)state;
    there(1, &large, 1);
    afk_channel_trim(ours);
    afk_channel_counts(ours, &counts);
    assert_int_equal(counts.segments, 0);
    there(2, &larger, 1); /* at which the receiver looks */
    afk_channel_counts(theirs, &counts);
    assert_int_equal(counts.segments, 1);
    assert_true(counts.segment_bytes > larger);

    /* What is kept is bounded: 100 and 200 MiB are not kept both. */
    const size_t huge[] = {100u << 20, 200u << 20};
    for (unsigned i = 0; i < 2; i++) {
        char *zero = mmap(NULL, huge[i], PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct iovec part = {zero, huge[i]};
        static struct afk_received r;
        const struct afk_message message = {.kind = 7, .parts = &part, .n_parts = 1};
        assert_ptr_not_equal(zero, MAP_FAILED);
        assert_int_equal(afk_channel_send(ours, &message), 1);
        receive(theirs, &r);
        assert_memory_equal(r.parts[0].iov_base, zero, huge[i]);
        afk_received_drop(&r, 0);
        (void)munmap(zero, huge[i]);
    }
    afk_channel_counts(ours, &counts);
    assert_true(counts.segment_bytes <= AFK_KEEP_BYTES);
    afk_channel_counts(theirs, &counts);
    assert_true(counts.segment_bytes <= AFK_KEEP_BYTES);
}

static void
test_a_full_socket_holds_the_sender_back(void **state)
{
    static struct afk_received r;
    const size_t sizes[] = {100, 20000, LARGE, 3u << 20};
    (void)state;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        uint64_t sent = 0, total = 0;
        while (send_sizes(ours, sent, &sizes[i], 1) == 1) {
            sent++;
            total += sizes[i];
            assert_true(sent < 10000 && total < (uint64_t)256 << 20);
        }
        assert_true(sent > 1);
        assert_int_equal(send_sizes(ours, sent, &sizes[i], 1), 0);
        assert_int_equal(afk_channel_wait(ours, true, -1, 0), 0);
        for (uint64_t id = 0; id < sent; id++) {
            receive(theirs, &r);
            check_parts(&r, id, &sizes[i], 1);
            afk_received_drop(&r, 0);
        }
        assert_int_equal(afk_channel_wait(theirs, false, -1, 0), 0);
        assert_int_equal(afk_channel_wait(ours, true, -1, WAIT_NS), AFK_WAIT_WRITABLE);
    }
}

static void
test_descriptors_go_with_their_message(void **state)
{
    static struct afk_received r;
    const size_t sizes[] = {10, LARGE};
    char byte = 'x';
    int fds[AFK_CHANNEL_FDS_MAX + 1], ends[2];
    (void)state;
    assert_int_equal(pipe(ends), 0);
    for (unsigned i = 0; i < AFK_CHANNEL_FDS_MAX + 1; i++)
        fds[i] = ends[1];
    for (unsigned i = 0; i < 2; i++) {
        char *bytes = made_part(i, 0, sizes[i]);
        const struct iovec part = {bytes, sizes[i]};
        struct afk_message message = {.kind = 7, .id = i, .parts = &part, .n_parts = 1, .fds = fds};
        for (unsigned n = 1; n <= AFK_CHANNEL_FDS_MAX; n += AFK_CHANNEL_FDS_MAX - 1) {
            message.n_fds = n;
            assert_int_equal(afk_channel_send(ours, &message), 1);
            receive(theirs, &r);
            check_parts(&r, i, &sizes[i], 1);
            assert_int_equal(r.n_fds, n);
            for (unsigned k = 0; k < n; k++) {
                assert_int_equal(fcntl(r.fds[k], F_GETFD), FD_CLOEXEC);
                assert_int_equal(write(r.fds[k], &byte, 1), 1);
                assert_int_equal(read(ends[0], &byte, 1), 1);
            }
            int first = r.fds[0];
            afk_received_drop(&r, 1);
            assert_int_equal(close(first), 0);
        }
        message.n_fds = AFK_CHANNEL_FDS_MAX + 1;
        assert_int_equal(afk_channel_send(ours, &message), -EMSGSIZE);
        free(bytes);
    }
    (void)close(ends[0]);
    (void)close(ends[1]);
}

static void
test_the_end_comes_after_what_was_sent(void **state)
{
    static struct afk_received r;
    const char *why;
    const size_t size = LARGE;
    (void)state;
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    assert_int_equal(send_sizes(ours, 2, &size, 1), 1);
    assert_int_equal(send_sizes(theirs, 1, &size, 1), 1); /* unread: ECONNRESET for them */
    afk_channel_close(ours);
    for (uint64_t id = 1; id <= 2; id++) {
        receive(theirs, &r);
        check_parts(&r, id, &size, 1);
        afk_received_drop(&r, 0);
    }
    assert_int_equal(afk_channel_receive(theirs, &r, &why), -EPIPE);
    assert_int_equal(afk_channel_wait(theirs, false, -1, -1), AFK_WAIT_READABLE);
    assert_int_equal(send_sizes(theirs, 1, &size, 1), -EPIPE);
    assert_int_equal(send_sizes(ours, 1, &size, 1), -ESHUTDOWN);
    assert_int_equal(afk_channel_receive(ours, &r, &why), -ESHUTDOWN);
    assert_int_equal(afk_channel_fd(ours), -1);
}

static void
test_shutdown_keeps_what_has_come(void **state)
{
    static struct afk_received r;
    const char *why;
    const size_t size = 10;
    (void)state;
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    assert_int_equal(afk_channel_shutdown(theirs), 0);
    receive(theirs, &r);
    afk_received_drop(&r, 0);
    assert_int_equal(afk_channel_receive(theirs, &r, &why), -EPIPE);
    assert_int_equal(afk_channel_receive(ours, &r, &why), -EPIPE);
}

static void *
wait_for_ever(void *arg)
{
    *(int *)arg = afk_channel_wait(ours, false, -1, -1);
    return NULL;
}

static void
test_close_wakes_whoever_waits(void **state)
{
    pthread_t thread;
    int got = -1;
    (void)state;
    int fd = afk_channel_fd(ours);
    assert_int_equal(pthread_create(&thread, NULL, wait_for_ever, &got), 0);
    (void)poll(NULL, 0, 20); /* it waits by now; else it finds the channel closed */
    afk_channel_close(ours);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(got == AFK_WAIT_READABLE || got == -ESHUTDOWN);
    assert_false(fd_is_open(fd)); /* the last one out has closed it */
}

static void
test_another_descriptor_is_watched_too(void **state)
{
    int ends[2];
    const size_t size = 10;
    (void)state;
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(afk_channel_wait(theirs, false, ends[0], 1000000), 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    assert_int_equal(afk_channel_wait(theirs, false, ends[0], -1), AFK_WAIT_ALSO);
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    assert_int_equal(afk_channel_wait(theirs, false, ends[0], -1),
                     AFK_WAIT_READABLE | AFK_WAIT_ALSO);
    (void)close(ends[0]);
    (void)close(ends[1]);
}

/* ---- forks ---------------------------------------------------------------------- */

static void
test_a_forked_child_holds_nothing_open(void **state)
{
    static struct afk_received r;
    const char *why;
    int ends[2];
    char byte;
    (void)state;
    assert_int_equal(pipe(ends), 0);
    int fd = afk_channel_fd(ours);
    pid_t pid = fork();
    if (pid == 0) {
        (void)close(ends[1]);
        bool closed = !fd_is_open(fd) && afk_channel_fd(ours) == -1 &&
                      afk_channel_receive(ours, &r, &why) == -ESHUTDOWN &&
                      afk_channel_wait(theirs, false, -1, -1) == -ESHUTDOWN;
        afk_channel_close(ours);
        afk_channel_free(theirs);
        (void)read(ends[0], &byte, 1); /* until the parent has seen */
        _exit(closed ? 0 : 1);
    }
    (void)close(ends[0]);
    afk_channel_close(ours);
    assert_int_equal(afk_channel_wait(theirs, false, -1, WAIT_NS), AFK_WAIT_READABLE);
    assert_int_equal(afk_channel_receive(theirs, &r, &why), -EPIPE);
    (void)close(ends[1]);
    assert_int_equal(reap(pid), 0);
}

static void
test_a_forked_child_keeps_its_views(void **state)
{
    static struct afk_received r;
    struct gate *reused = gate_new();
    const size_t size = LARGE;
    (void)state;
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    receive(theirs, &r);
    pid_t pid = fork();
    if (pid == 0) {
        gate_wait(reused);
        for (size_t at = 0; at < size; at++)
            if (((unsigned char *)r.parts[0].iov_base)[at] != byte_at(1, 0, at))
                _exit(1);
        afk_received_drop(&r, 0);
        _exit(0);
    }
    afk_received_drop(&r, 0);
    for (uint64_t id = 2; id < 2 + 2 * AFK_SLOTS; id++)
        there(id, &size, 1);
    gate_open(reused);
    assert_int_equal(reap(pid), 0);
    gate_free(reused);

    /* And what the child lets go of is still its parent's. */
    assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
    receive(theirs, &r);
    pid = fork();
    if (pid == 0) {
        afk_received_drop(&r, 0);
        _exit(0);
    }
    assert_int_equal(reap(pid), 0);
    for (uint64_t id = 2; id < 2 + AFK_SLOTS; id++)
        there(id, &size, 1);
    check_parts(&r, 1, &size, 1);
    afk_received_drop(&r, 0);
}

/* ---- an enemy -------------------------------------------------------------------- */

struct enemy {
    struct afk_frame frame;
    char body[256];
};

static struct enemy
good(void)
{
    struct enemy e;
    const struct iovec parts[] = {{(void *)(uintptr_t) "abc", 3}, {(void *)(uintptr_t) "defgh", 5}};
    memset(&e, 0, sizeof e);
    e.frame = (struct afk_frame){.magic = AFK_FRAME_MAGIC,
                                 .version = AFK_FRAME_VERSION,
                                 .kind = 7,
                                 .n_parts = 2,
                                 .body_bytes = afk_body_bytes(parts, 2, 100, AFK_INLINE_ALIGN)};
    afk_body_write(e.body, parts, 2, AFK_INLINE_ALIGN);
    return e;
}

static int
send_raw(const void *bytes, size_t size, int fd)
{
    const struct iovec vec = {(void *)(uintptr_t)bytes, size};
    return afk_os_send_with_fds(afk_channel_fd(ours), &vec, 1, &fd, fd >= 0, MSG_DONTWAIT);
}

/* It is refused, with a reason that has `says` in it, and the channel is at its end. */
static void
refused(const void *bytes, size_t size, int fd, const char *says)
{
    static struct afk_received r;
    const char *why = NULL;
    make_pair();
    assert_int_equal(send_raw(bytes, size, fd), 0);
    int code = afk_channel_receive(theirs, &r, &why);
    if (code != -EBADMSG || why == NULL || strstr(why, says) == NULL)
        fail_msg("%d: %s, not %s", code, why, says);
    assert_int_equal(afk_channel_receive(theirs, &r, &why), -EPIPE);
    assert_int_equal(afk_channel_receive(ours, &r, &why), -EPIPE);
    afk_channel_free(ours);
    afk_channel_free(theirs);
    assert_int_equal(count_mappings(), 0);
}

static void
refused_enemy(const struct enemy *e, int fd, const char *says)
{
    size_t size = sizeof e->frame;
    if ((e->frame.flags & AFK_FRAME_SHARED) == 0)
        size += good().frame.body_bytes;
    refused(e, size, fd, says);
}

#define WRONG(change, says)          \
    do {                             \
        struct enemy e = good();     \
        change;                      \
        refused_enemy(&e, -1, says); \
    } while (0)

static void
set_size(struct enemy *e, unsigned part, uint64_t size)
{
    memcpy(e->body + part * sizeof size, &size, sizeof size);
}

static void
test_what_is_no_frame_is_refused(void **state)
{
    struct enemy e = good();
    (void)state;
    refused("", 0, -1, "an empty message");
    refused("", 0, 0, "an empty message"); /* with a descriptor */
    refused("x", 1, -1, "no message of anyfork's");
    refused(&e, sizeof e.frame - 1, -1, "no message of anyfork's");
    refused(&e, sizeof e.frame, -1, "longer or shorter");
    refused(&e, sizeof e, -1, "longer or shorter");
    WRONG(e.frame.magic ^= 1, "no message of anyfork's");
    WRONG(e.frame.version++, "another version");
    WRONG(e.frame.flags = 8, "unknown flags");
    WRONG(e.frame.flags = AFK_FRAME_NEW, "unknown flags");
    WRONG(e.frame.flags = AFK_FRAME_SHARED | AFK_FRAME_TEMPORARY, "unknown flags");
    WRONG(e.frame.reserved[1] = 1, "unknown flags");
    WRONG(e.frame.n_fds = 1, "without the descriptors");
    WRONG(e.frame.slot = 1, "cannot be");
    WRONG(e.frame.segment_bytes = 1, "cannot be");
    WRONG(e.frame.n_parts = 3, "not inside");
    WRONG(e.frame.n_parts = 1000, "too short");
    WRONG(e.frame.n_parts = AFK_PARTS_MAX + 1, "more parts");
    WRONG(e.frame.n_parts = UINT32_MAX, "more parts");
    WRONG(e.frame.n_parts = 1, "not all");
    WRONG(e.frame.n_parts = 0, "not all");
    WRONG(e.frame.body_bytes = UINT64_MAX, "larger than this end takes");
    WRONG(e.frame.body_bytes -= 8, "longer or shorter");
    WRONG(set_size(&e, 0, UINT64_MAX), "not inside");
    WRONG(set_size(&e, 1, UINT64_MAX - 24), "not inside");
    WRONG(set_size(&e, 1, 9), "not inside");
    WRONG(set_size(&e, 0, 9), "not inside");
    e = good();
    refused_enemy(&e, 0, "without the descriptors"); /* one that it does not name */
}

static int
memfd_of(size_t size, unsigned seals)
{
    int fd = memfd_create("anyfork-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

static void
refused_segment(int fd, uint64_t segment_bytes, const char *says)
{
    struct enemy e = good();
    e.frame.body_bytes = 128;
    e.frame.segment_bytes = segment_bytes;
    e.frame.flags = AFK_FRAME_SHARED | AFK_FRAME_NEW;
    refused_enemy(&e, fd, says);
    e.frame.flags |= AFK_FRAME_TEMPORARY;
    refused_enemy(&e, fd, says);
    (void)close(fd);
}

static void
test_what_is_no_segment_is_refused(void **state)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = 2 * page;
    (void)state;
    WRONG(e.frame.flags = AFK_FRAME_SHARED, "not sent");
    WRONG((e.frame.flags = AFK_FRAME_SHARED, e.frame.slot = AFK_SLOTS), "cannot be");
    WRONG((e.frame.flags = AFK_FRAME_SHARED, e.frame.segment_bytes = 1), "two sizes");
    WRONG(e.frame.flags = AFK_FRAME_SHARED | AFK_FRAME_NEW, "without the descriptors");
    refused_segment(memfd_of(size, 0), size, "not sealed");
    refused_segment(memfd_of(size, F_SEAL_GROW), size, "not sealed");
    refused_segment(memfd_of(size, F_SEAL_SHRINK), size + page, "not sealed");
    refused_segment(memfd_of(size, F_SEAL_SHRINK), size - 1, "not sealed");
    refused_segment(memfd_of(size, F_SEAL_SHRINK), 0, "larger than its segment");
    refused_segment(memfd_of(size, F_SEAL_SHRINK), UINT64_MAX, "not sealed");
    refused_segment(memfd_of(page, F_SEAL_SHRINK), page, "not sealed");
    refused_segment(open("/dev/zero", O_RDWR | O_CLOEXEC), size, "not sealed");
    refused_segment(memfd_of(size, F_SEAL_SHRINK), size, "not all"); /* and its body is zeros */

    struct enemy e = good(); /* the head could not be written to */
    int fd = memfd_of(size, F_SEAL_SHRINK | F_SEAL_WRITE);
    e.frame.flags = AFK_FRAME_SHARED | AFK_FRAME_NEW;
    e.frame.segment_bytes = size;
    refused_enemy(&e, fd, "not sealed");
    (void)close(fd);
}

static void
test_a_message_in_place_of_one_that_is_read_is_refused(void **state)
{
    static struct afk_received kept, r;
    const char *why = NULL;
    const size_t size = LARGE;
    (void)state;
    for (int is_new = 0; is_new < 2; is_new++) {
        make_pair();
        assert_int_equal(send_sizes(ours, 1, &size, 1), 1);
        receive(theirs, &kept);
        struct enemy e = good();
        int fd = memfd_of(2 * (size_t)sysconf(_SC_PAGESIZE), F_SEAL_SHRINK);
        e.frame.flags = AFK_FRAME_SHARED;
        if (is_new) {
            e.frame.flags |= AFK_FRAME_NEW;
            e.frame.segment_bytes = 2 * (size_t)sysconf(_SC_PAGESIZE);
        }
        assert_int_equal(send_raw(&e, sizeof e.frame, is_new ? fd : -1), 0);
        (void)close(fd);
        assert_int_equal(afk_channel_receive(theirs, &r, &why), -EBADMSG);
        assert_non_null(strstr(why, "still read"));
        check_parts(&kept, 1, &size, 1);
        afk_received_drop(&kept, 0);
        afk_channel_free(ours);
        afk_channel_free(theirs);
    }
}

static void
test_a_message_has_a_largest_size(void **state)
{
    static struct afk_received r;
    const char *why;
    int fds[2];
    (void)state;
    const size_t sizes[] = {500, 500}, more[] = {500, 501};
    assert_int_equal(afk_os_socketpair(fds, SOCK_SEQPACKET), 0);
    struct afk_channel *small, *large;
    assert_int_equal(afk_channel_new(&small, fds[0], 1000), 0);
    assert_int_equal(afk_channel_new(&large, fds[1], 1001), 0);
    assert_int_equal(send_sizes(small, 1, sizes, 2), 1);
    assert_int_equal(send_sizes(small, 1, more, 2), -EMSGSIZE);
    receive(large, &r);
    check_parts(&r, 1, sizes, 2);
    afk_received_drop(&r, 0);
    assert_int_equal(send_sizes(large, 1, more, 2), 1);
    assert_int_equal(afk_channel_receive(small, &r, &why), -EBADMSG);
    assert_non_null(strstr(why, "message_max"));
    afk_channel_free(small);
    afk_channel_free(large);
}

static void
test_only_a_seqpacket_socket_is_a_channel(void **state)
{
    struct afk_channel *channel = NULL;
    int fds[2];
    (void)state;
    assert_int_equal(afk_channel_new(&channel, -1, 1), -EBADF);
    assert_int_equal(pipe(fds), 0);
    assert_int_equal(afk_channel_new(&channel, fds[0], 1), -EPROTOTYPE);
    (void)close(fds[0]);
    (void)close(fds[1]);
    for (int type = SOCK_STREAM; type <= SOCK_DGRAM; type++) {
        assert_int_equal(afk_os_socketpair(fds, type), 0);
        assert_int_equal(afk_channel_new(&channel, fds[0], 1), -EPROTOTYPE);
        (void)close(fds[0]);
        (void)close(fds[1]);
    }
    int udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_int_equal(afk_channel_new(&channel, udp, 1), -EPROTOTYPE);
    (void)close(udp);
    assert_null(channel);
}

/* ---- threads ---------------------------------------------------------------------- */

#define SENDERS 3
#define EACH 300

static void *
send_many(void *arg)
{
    uint64_t base = *(uint64_t *)arg;
    for (uint64_t i = 0; i < EACH; i++) {
        const size_t size = i % 3 == 0 ? LARGE : i % 3 == 1 ? 20000 : 50;
        int r;
        while ((r = send_sizes(ours, base + i, &size, 1)) == 0)
            (void)afk_channel_wait(ours, true, -1, WAIT_NS);
        if (r != 1)
            return (void *)(intptr_t)r;
    }
    return NULL;
}

static void *
receive_many(void *arg)
{
    struct afk_received *r = malloc(sizeof *r);
    const char *why = NULL;
    unsigned *seen = arg;
    int code;
    while ((code = afk_channel_receive(theirs, r, &why)) >= 0) {
        if (code == 0) {
            (void)afk_channel_wait(theirs, false, -1, WAIT_NS);
            continue;
        }
        uint64_t i = r->id % 1000;
        const size_t size = i % 3 == 0 ? LARGE : i % 3 == 1 ? 20000 : 50;
        const unsigned char *bytes = r->parts[0].iov_base;
        bool right = r->parts[0].iov_len == size;
        for (size_t at = 0; right && at < size; at++)
            right = bytes[at] == byte_at(r->id, 0, at);
        afk_received_drop(r, 0);
        if (!right)
            break;
        ++*seen;
    }
    free(r);
    return (void *)(intptr_t)(code == -EPIPE ? 0 : 1);
}

static void
test_threads_share_a_channel(void **state)
{
    pthread_t sender[SENDERS], receiver[2];
    uint64_t base[SENDERS];
    unsigned seen[2] = {0, 0};
    void *failed;
    (void)state;
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&receiver[i], NULL, receive_many, &seen[i]), 0);
    for (unsigned i = 0; i < SENDERS; i++) {
        base[i] = i * 1000;
        assert_int_equal(pthread_create(&sender[i], NULL, send_many, &base[i]), 0);
    }
    for (unsigned i = 0; i < SENDERS; i++) {
        assert_int_equal(pthread_join(sender[i], &failed), 0);
        assert_null(failed);
    }
    afk_channel_close(ours);
    for (unsigned i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(receiver[i], &failed), 0);
        assert_null(failed);
    }
    assert_int_equal(seen[0] + seen[1], SENDERS * EACH);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        PAIR(test_every_size_arrives),
        PAIR(test_what_was_sent_is_counted),
        PAIR(test_a_segment_is_used_again_once_no_view_is_left),
        PAIR(test_views_outlive_both_channels),
        PAIR(test_many_messages_are_kept),
        PAIR(test_without_a_slot_a_segment_is_temporary),
        PAIR(test_retired_segments_are_unmapped),
        PAIR(test_a_full_socket_holds_the_sender_back),
        PAIR(test_descriptors_go_with_their_message),
        PAIR(test_the_end_comes_after_what_was_sent),
        PAIR(test_shutdown_keeps_what_has_come),
        PAIR(test_close_wakes_whoever_waits),
        PAIR(test_another_descriptor_is_watched_too),
        PAIR(test_a_forked_child_holds_nothing_open),
        PAIR(test_a_forked_child_keeps_its_views),
        PAIR(test_threads_share_a_channel),
        CHECKED(test_what_is_no_frame_is_refused),
        CHECKED(test_what_is_no_segment_is_refused),
        CHECKED(test_a_message_in_place_of_one_that_is_read_is_refused),
        CHECKED(test_a_message_has_a_largest_size),
        CHECKED(test_only_a_seqpacket_socket_is_a_channel),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
