/*
 * A channel receives: afk_channel_receive(), from a peer whose every byte, descriptor and segment
 * is the input's. What is changed are frames and bodies as our own sender makes them.
 */
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/channel.h"

#define STEPS_MAX 16
#define PARTS_MAX 12
#define KEPT_MAX 4
#define BODY_MAX 3072

/* What one step of the input makes. */
struct step {
    struct afk_frame frame;
    char body[BODY_MAX];
    size_t sent;  /* bytes of the datagram */
    int memfd;    /* or -1 */
    unsigned n_fds;
};

static volatile unsigned char sink;

static void
make_body(struct fuzz_input *in, struct step *step, size_t align)
{
    static const char bytes[150];
    struct iovec parts[PARTS_MAX];
    unsigned n = fuzz_byte(in) % (PARTS_MAX + 1);
    for (unsigned i = 0; i < n; i++)
        parts[i] = (struct iovec){(void *)(uintptr_t)bytes, fuzz_byte(in) % sizeof bytes};
    step->frame.n_parts = n;
    step->frame.body_bytes = afk_body_bytes(parts, n, sizeof step->body, align);
    CHECK(step->frame.body_bytes > 0 && step->frame.body_bytes <= sizeof step->body);
    afk_body_write(step->body, parts, n, align);
}

/* Some bytes of the frame, or of the body, where they matter: near the start. */
static void
change(struct fuzz_input *in, void *to, size_t size)
{
    for (unsigned n = fuzz_byte(in) % 4; n > 0; n--) {
        size_t at = fuzz_byte(in) % size, most = size - at, some = 1 + fuzz_byte(in) % 8u;
        (void)fuzz_bytes(in, (char *)to + at, most < some ? most : some);
    }
}

static void
make_segment(struct fuzz_input *in, struct step *step, uint8_t how)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size = page * (1 + (how & 3)) + ((how & 4) != 0 ? fuzz_byte(in) : 0);
    unsigned seals = (how & 8) != 0 ? fuzz_byte(in) & 0xf : F_SEAL_SHRINK | F_SEAL_GROW;
    step->memfd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(step->memfd >= 0 && ftruncate(step->memfd, (off_t)size) == 0);
    if (size >= page + sizeof step->body)
        CHECK(pwrite(step->memfd, step->body, sizeof step->body, (off_t)page) ==
              (ssize_t)sizeof step->body);
    CHECK(fcntl(step->memfd, F_ADD_SEALS, seals) == 0);
    step->frame.segment_bytes = size;
}

static void
make_step(struct fuzz_input *in, struct step *step)
{
    uint8_t how = fuzz_byte(in);
    bool shared = (how & 0x80) != 0, is_new = (how & 0x40) != 0;
    memset(step, 0, sizeof *step);
    step->memfd = -1;
    step->frame = (struct afk_frame){.magic = AFK_FRAME_MAGIC,
                                     .version = AFK_FRAME_VERSION,
                                     .kind = how,
                                     .slot = shared ? fuzz_byte(in) % 3 : 0};
    make_body(in, step, shared ? AFK_SEGMENT_ALIGN : AFK_INLINE_ALIGN);
    step->n_fds = fuzz_byte(in) % 4;
    step->frame.n_fds = (uint16_t)step->n_fds;
    change(in, step->body, 128);
    if (shared)
        step->frame.flags = AFK_FRAME_SHARED;
    if (shared && is_new) {
        step->frame.flags |= AFK_FRAME_NEW;
        make_segment(in, step, how);
        if ((how & 0x20) != 0) {
            step->frame.flags |= AFK_FRAME_TEMPORARY;
            step->frame.slot = 0;
        }
    }
    step->sent = sizeof step->frame + (shared ? 64 : (size_t)step->frame.body_bytes);
    if ((how & 0x10) != 0) {
        change(in, &step->frame, sizeof step->frame);
        step->n_fds = fuzz_byte(in) % 4;
        step->sent = fuzz_number(in) % (sizeof step->frame + sizeof step->body);
    }
}

static int
send_step(int socket, const struct step *step)
{
    static struct fuzz_message message; /* not of each call: it is large */
    memcpy(message.data, &step->frame, sizeof step->frame);
    memcpy(message.data + sizeof step->frame, step->body, sizeof step->body);
    message.size = step->sent;
    message.n_fds = 0;
    if (step->memfd >= 0)
        message.fds[message.n_fds++] = step->memfd;
    for (unsigned i = 0; i < step->n_fds; i++)
        message.fds[message.n_fds++] = fuzz_fd((uint8_t)i);
    return fuzz_send(socket, &message);
}

/* All of it is memory that is ours to read, and all descriptors are ours to close. */
static void
use(const struct afk_received *r, const struct step *step)
{
    CHECK(r->n_parts == step->frame.n_parts);
    for (unsigned i = 0; i < r->n_parts; i++) {
        const unsigned char *bytes = r->parts[i].iov_base;
        CHECK(r->mapping == NULL || (uintptr_t)bytes % AFK_SEGMENT_ALIGN == 0);
        for (size_t at = 0; at < r->parts[i].iov_len; at++)
            sink = bytes[at];
    }
    CHECK(r->n_fds == step->n_fds);
    for (unsigned i = 0; i < r->n_fds; i++)
        CHECK(fcntl(r->fds[i], F_GETFD) == FD_CLOEXEC);
}

int
fuzz_one(const uint8_t *data, size_t size)
{
    static struct afk_received kept[KEPT_MAX];
    static struct step step;
    struct fuzz_input in = {data, size};
    struct afk_channel *channel;
    const char *why = NULL;
    unsigned n_kept = 0;
    int ends[2], r = 0;

    CHECK(afk_os_socketpair(ends, SOCK_SEQPACKET) == 0);
    CHECK(afk_channel_new(&channel, ends[1], 64 + fuzz_byte(&in) * 8) == 0);
    for (unsigned i = 0; i < STEPS_MAX && in.left > 0 && r >= 0; i++) {
        make_step(&in, &step);
        int sent = send_step(ends[0], &step);
        if (step.memfd >= 0)
            (void)close(step.memfd);
        if (sent < 0)
            break;
        struct afk_received *received = &kept[n_kept];
        r = afk_channel_receive(channel, received, &why);
        CHECK(r == 1 || (r == -EBADMSG && why != NULL));
        if (r == 1)
            use(received, &step);
        if (r == 1 && ((fuzz_byte(&in) & 1) == 0 || ++n_kept == KEPT_MAX)) {
            n_kept -= n_kept == KEPT_MAX;
            afk_received_drop(received, 0);
        }
    }
    if (r < 0)
        CHECK(afk_channel_receive(channel, &kept[n_kept], &why) == -EPIPE);
    if ((fuzz_byte(&in) & 1) != 0)
        afk_channel_close(channel);
    afk_channel_free(channel);
    for (unsigned i = 0; i < n_kept; i++)
        afk_received_drop(&kept[i], 0);
    (void)close(ends[0]);
    return 0;
}
