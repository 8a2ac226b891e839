/*
 * A channel: one end of a socket, the segments of both directions, and what it has counted.
 *
 * Rules: no call waits for the peer but afk_channel_wait(). No lock is held over a system call
 * that takes long, nor while bytes are copied. What the peer sends is checked before it is
 * used; one message that is wrong ends the channel.
 */
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* The socket's buffer is what holds a sender back. A message in a segment takes room there for
 * what it stands for, by zeros behind its frame: AT_ONCE_BYTES of them, or AT_ONCE messages, fill
 * the buffer, and poll(2) tells when there is room again as for any socket. */
#define SEND_BUFFER 106496 /* the kernel doubles it, socket(7): its own default */
#define AT_ONCE_BYTES ((uint64_t)64 << 20)
#define AT_ONCE 48

#define CLOSED (1u << 31)

struct afk_channel {
    atomic_uint users; /* calls under way; and CLOSED */
    atomic_int fd;
    unsigned generation;
    uint64_t message_max;
    size_t send_buffer, inline_max;
    struct afk_ring *ring;
    struct afk_mappings *mappings;
    atomic_uint_fast64_t sent, received, bytes_sent, bytes_received, shared_sent, shared_received;
};

static const char zeros[AFK_INLINE_MAX];

/* ---- its life ------------------------------------------------------------------- */

static int
check_socket(int fd, size_t *ret_send_buffer)
{
    int value = 0;
    socklen_t size = sizeof value;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &value, &size) < 0)
        return errno == ENOTSOCK ? -EPROTOTYPE : -errno;
    if (value != AF_UNIX || getsockopt(fd, SOL_SOCKET, SO_TYPE, &value, &size) < 0 ||
        value != SOCK_SEQPACKET)
        return -EPROTOTYPE;
    value = SEND_BUFFER;
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, sizeof value);
    if (getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, &size) < 0 || value <= 0)
        return -errno;
    *ret_send_buffer = (size_t)value; /* less where net.core.wmem_max says so */
    return 0;
}

static int
prepare(struct afk_channel *channel, int fd)
{
    int r = check_socket(fd, &channel->send_buffer);
    if (r < 0)
        return r;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
        fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return -errno;
    size_t quarter = channel->send_buffer / 4; /* poll(2) calls a socket writable from there on */
    channel->inline_max = quarter < AFK_INLINE_MAX ? quarter : AFK_INLINE_MAX;
    channel->ring = afk_ring_new();
    channel->mappings = afk_mappings_new();
    if (channel->ring == NULL || channel->mappings == NULL)
        return -ENOMEM;
    return afk_lifeline_register(fd, false);
}

static void
free_all(struct afk_channel *channel)
{
    if (channel->ring != NULL)
        afk_ring_free(channel->ring);
    if (channel->mappings != NULL)
        afk_mappings_free(channel->mappings);
    free(channel);
}

int
afk_channel_new(struct afk_channel **ret_channel, int fd, uint64_t message_max)
{
    struct afk_channel *channel = AFK_ALLOC("calloc(channel)", calloc(1, sizeof *channel));
    if (channel == NULL)
        return -ENOMEM;
    channel->message_max = message_max < AFK_MESSAGE_MAX ? message_max : AFK_MESSAGE_MAX;
    channel->generation = afk_generation();
    atomic_init(&channel->fd, fd);
    int r = prepare(channel, fd);
    if (r < 0)
        free_all(channel);
    else
        *ret_channel = channel;
    return r;
}

/* False once it is closed, or in a forked child, which has another file by that number. */
static bool
enter(struct afk_channel *channel)
{
    if (channel->generation != afk_generation())
        return false;
    return (atomic_fetch_add(&channel->users, 1) & CLOSED) == 0;
}

/* Who leaves last closes the descriptor: nobody uses its number any more, nor a segment. */
static void
leave(struct afk_channel *channel)
{
    if (atomic_fetch_sub(&channel->users, 1) != (CLOSED | 1u))
        return;
    int fd = atomic_exchange(&channel->fd, -1);
    afk_lifeline_close(&fd);
    afk_ring_clear(channel->ring);
    afk_mappings_clear(channel->mappings);
}

/* Of a call that enter() has refused. */
static int
refuse(struct afk_channel *channel)
{
    if (channel->generation == afk_generation())
        leave(channel);
    return -ESHUTDOWN; /* no call of a socket says so: EBADF may be of a descriptor to send */
}

void
afk_channel_close(struct afk_channel *channel)
{
    if (!enter(channel)) {
        (void)refuse(channel);
        return;
    }
    if ((atomic_fetch_or(&channel->users, CLOSED) & CLOSED) == 0)
        (void)shutdown(atomic_load(&channel->fd), SHUT_RDWR); /* whoever waits wakes */
    leave(channel);
}

void
afk_channel_free(struct afk_channel *channel)
{
    afk_channel_close(channel);
    free_all(channel);
}

int
afk_channel_fd(struct afk_channel *channel)
{
    bool is_ours = channel->generation == afk_generation();
    return is_ours && (atomic_load(&channel->users) & CLOSED) == 0 ? atomic_load(&channel->fd) : -1;
}

int
afk_channel_shutdown(struct afk_channel *channel)
{
    if (!enter(channel))
        return refuse(channel);
    (void)shutdown(atomic_load(&channel->fd), SHUT_RDWR);
    leave(channel);
    return 0;
}

/* ---- sending ---------------------------------------------------------------------- */

static int
send_inline(struct afk_channel *channel, const struct afk_message *message, struct afk_frame *frame)
{
    char datagram[sizeof *frame + AFK_INLINE_MAX];
    size_t bytes = sizeof *frame + (size_t)frame->body_bytes;
    memcpy(datagram, frame, sizeof *frame);
    afk_body_write(datagram + sizeof *frame, message->parts, message->n_parts, AFK_INLINE_ALIGN);
    const struct iovec vec = {datagram, bytes};
    return afk_os_send_with_fds(atomic_load(&channel->fd), &vec, 1, message->fds, message->n_fds,
                                MSG_DONTWAIT);
}

/* Zeros for what stands in a segment. */
static size_t
charge(const struct afk_channel *channel, uint64_t body_bytes)
{
    size_t most = channel->inline_max, least = channel->send_buffer / AT_ONCE;
    if (body_bytes >= AT_ONCE_BYTES)
        return most;
    size_t share = (size_t)(body_bytes * channel->send_buffer / AT_ONCE_BYTES);
    return share > most ? most : share < least ? least : share;
}

static int
send_frame(struct afk_channel *channel, const struct afk_message *message, struct afk_frame *frame,
           const struct afk_lease *lease)
{
    int fds[AFK_FDS_MAX];
    unsigned n_fds = 0;
    frame->flags = AFK_FRAME_SHARED;
    frame->slot = (uint16_t)lease->slot;
    if (lease->fd >= 0) {
        frame->flags |= AFK_FRAME_NEW;
        frame->segment_bytes = lease->segment_bytes;
        fds[n_fds++] = lease->fd;
    }
    if (lease->slot == AFK_SLOTS) {
        frame->flags |= AFK_FRAME_TEMPORARY;
        frame->slot = 0;
    }
    if (message->n_fds > 0)
        memcpy(fds + n_fds, message->fds, message->n_fds * sizeof *fds);
    const struct iovec vec[] = {{frame, sizeof *frame},
                                {(void *)(uintptr_t)zeros, charge(channel, frame->body_bytes)}};
    return afk_os_send_with_fds(atomic_load(&channel->fd), vec, 2, fds, n_fds + message->n_fds,
                                MSG_DONTWAIT);
}

/* Before much is copied in vain: sock_alloc_send_pskb() of the kernel asks the same. */
static bool
has_room(struct afk_channel *channel)
{
    int unread = afk_os_unread_by_peer(atomic_load(&channel->fd));
    return unread < 0 || (size_t)unread < channel->send_buffer;
}

/* mmap(2) says so of locked memory, mlockall(2). Nothing tells when to try it again. */
static int
not_again(int r)
{
    return r == -EAGAIN ? -ENOMEM : r;
}

static int
send_shared(struct afk_channel *channel, const struct afk_message *message, struct afk_frame *frame)
{
    struct afk_lease lease;
    if (!has_room(channel))
        return -EAGAIN;
    int r = afk_ring_take(channel->ring, frame->body_bytes, message->n_parts, &lease);
    if (r < 0)
        return not_again(r);
    r = not_again(afk_lease_write(&lease, message->parts, message->n_parts));
    if (r == 0)
        r = send_frame(channel, message, frame, &lease);
    afk_ring_give(channel->ring, &lease, r == 0);
    return r;
}

static void
count(atomic_uint_fast64_t *counter, uint64_t n)
{
    (void)atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static uint64_t
bytes_of(const struct iovec *parts, unsigned n)
{
    uint64_t bytes = 0;
    for (unsigned i = 0; i < n; i++)
        bytes += parts[i].iov_len;
    return bytes;
}

static int
send_message(struct afk_channel *channel, const struct afk_message *message)
{
    const struct iovec *parts = message->parts;
    unsigned n = message->n_parts;
    struct afk_frame frame = {.magic = AFK_FRAME_MAGIC,
                              .version = AFK_FRAME_VERSION,
                              .kind = message->kind,
                              .id = message->id,
                              .n_parts = n,
                              .n_fds = (uint16_t)message->n_fds};
    frame.body_bytes = afk_body_bytes(parts, n, channel->message_max, AFK_INLINE_ALIGN);
    if (frame.body_bytes == 0 || message->n_fds > AFK_CHANNEL_FDS_MAX)
        return -EMSGSIZE;
    bool shared = frame.body_bytes > channel->inline_max;
    if (shared)
        frame.body_bytes = afk_body_bytes(parts, n, channel->message_max, AFK_SEGMENT_ALIGN);
    int r = shared ? send_shared(channel, message, &frame) : send_inline(channel, message, &frame);
    if (r < 0)
        return r == -EAGAIN ? 0 : r;
    uint64_t bytes = bytes_of(parts, n);
    count(&channel->sent, 1);
    count(&channel->bytes_sent, bytes);
    if (shared)
        count(&channel->shared_sent, bytes);
    return 1;
}

int
afk_channel_send(struct afk_channel *channel, const struct afk_message *message)
{
    if (!enter(channel))
        return refuse(channel);
    int r = send_message(channel, message);
    leave(channel);
    return r;
}

/* ---- receiving -------------------------------------------------------------------- */

static bool
peer_has_gone(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

/* What the frame says has been checked; where its parts are is next. */
static int
find_parts(struct afk_channel *channel, struct afk_received *r, int fd, const char **ret_why)
{
    const void *body = r->datagram + sizeof r->frame;
    struct afk_frame *f = &r->frame;
    bool shared = (f->flags & AFK_FRAME_SHARED) != 0;
    int code = shared ? afk_mappings_take(channel->mappings, f, fd, &r->mapping, &body,
                                           &r->copy, ret_why)
                      : 0;
    if (code < 0)
        return not_again(code);
    *ret_why = "a message whose body is too short";
    if (f->body_bytes / sizeof(uint64_t) < f->n_parts)
        return -EBADMSG; /* before memory is asked for */
    if (f->n_parts > AFK_FEW_PARTS) {
        r->parts = AFK_ALLOC("malloc(parts)", malloc(f->n_parts * sizeof *r->parts));
        if (r->parts == NULL)
            return -ENOMEM;
    }
    *ret_why = afk_body_parse(body, f->body_bytes, channel->message_max,
                              shared ? AFK_SEGMENT_ALIGN : AFK_INLINE_ALIGN, r->parts, f->n_parts);
    return *ret_why == NULL ? 0 : -EBADMSG;
}

static int
take_message(struct afk_channel *channel, struct afk_received *r, size_t bytes,
             const char **ret_why)
{
    struct afk_frame *f = &r->frame;
    *ret_why = afk_frame_check(f, bytes, r->n_fds, channel->message_max);
    if (*ret_why != NULL)
        return -EBADMSG;
    int code = find_parts(channel, r, r->fds[0], ret_why);
    if (code < 0)
        return code;
    if (r->n_fds > f->n_fds) { /* the segment's, which is mapped */
        afk_os_close(r->fds[0]);
        r->n_fds--;
        memmove(r->fds, r->fds + 1, r->n_fds * sizeof *r->fds);
    }
    r->kind = f->kind;
    r->id = f->id;
    r->n_parts = f->n_parts;
    return 0;
}

static int
receive_message(struct afk_channel *channel, struct afk_received *r, const char **ret_why)
{
    int fd = atomic_load(&channel->fd);
    ssize_t n = -ECONNRESET;
    /* That is said once of a peer that has gone, ahead of what it had sent. */
    for (int i = 0; n == -ECONNRESET && i < 2; i++)
        n = afk_os_receive_with_fds(fd, r->datagram, sizeof r->datagram, r->fds, AFK_FDS_MAX,
                                    &r->n_fds, NULL, MSG_DONTWAIT | MSG_TRUNC);
    if (n == -EAGAIN)
        return 0;
    *ret_why = "an empty message";
    if (n == 0) {
        afk_received_drop(r, 0); /* it may have had descriptors */
        return peer_has_gone(fd) ? -EPIPE : -EBADMSG;
    }
    if (n < 0)
        return n == -ECONNRESET ? -EPIPE : (int)n;
    int code = take_message(channel, r, (size_t)n, ret_why);
    if (code == 0) {
        uint64_t bytes = bytes_of(r->parts, r->n_parts);
        count(&channel->received, 1);
        count(&channel->bytes_received, bytes);
        if (r->mapping != NULL)
            count(&channel->shared_received, bytes);
        return 1;
    }
    afk_received_drop(r, 0);
    return code;
}

int
afk_channel_receive(struct afk_channel *channel, struct afk_received *r, const char **ret_why)
{
    r->parts = r->few;
    r->mapping = NULL;
    r->copy = true;
    r->n_parts = r->n_fds = 0;
    if (!enter(channel))
        return refuse(channel);
    int code = receive_message(channel, r, ret_why);
    if (code < 0 && code != -EPIPE)
        (void)shutdown(atomic_load(&channel->fd), SHUT_RDWR);
    leave(channel);
    return code;
}

void
afk_received_drop(struct afk_received *r, unsigned taken)
{
    for (unsigned i = taken; i < r->n_fds; i++)
        afk_os_close(r->fds[i]);
    if (r->mapping != NULL)
        afk_mapping_unref(r->mapping);
    if (r->parts != r->few)
        free(r->parts);
    r->mapping = NULL;
    r->parts = r->few;
    r->n_fds = 0;
}

/* ---- waiting ---------------------------------------------------------------------- */

int
afk_channel_wait(struct afk_channel *channel, bool for_writing, int also, int64_t timeout_ns)
{
    if (!enter(channel))
        return refuse(channel);
    short events = for_writing ? POLLOUT : POLLIN;
    struct pollfd p[] = {{.fd = atomic_load(&channel->fd), .events = events},
                         {.fd = also, .events = POLLIN}};
    int r = afk_os_poll(p, also >= 0 ? 2 : 1, timeout_ns);
    leave(channel);
    if (r <= 0)
        return r;
    int what = for_writing ? AFK_WAIT_WRITABLE : AFK_WAIT_READABLE;
    return (p[0].revents != 0 ? what : 0) | (p[1].revents != 0 ? AFK_WAIT_ALSO : 0);
}

/* ---- what is known of it ------------------------------------------------------------ */

void
afk_channel_trim(struct afk_channel *channel)
{
    if (channel->generation == afk_generation())
        afk_ring_trim(channel->ring);
}

void
afk_channel_counts(struct afk_channel *channel, struct afk_channel_counts *ret)
{
    unsigned n = 0;
    uint64_t bytes = 0;
    if (channel->generation == afk_generation()) { /* else a lock may be held by nobody */
        afk_ring_count(channel->ring, &n, &bytes);
        afk_mappings_count(channel->mappings, &n, &bytes);
    }
    *ret = (struct afk_channel_counts){
        .sent = atomic_load_explicit(&channel->sent, memory_order_relaxed),
        .received = atomic_load_explicit(&channel->received, memory_order_relaxed),
        .bytes_sent = atomic_load_explicit(&channel->bytes_sent, memory_order_relaxed),
        .bytes_received = atomic_load_explicit(&channel->bytes_received, memory_order_relaxed),
        .shared_sent = atomic_load_explicit(&channel->shared_sent, memory_order_relaxed),
        .shared_received = atomic_load_explicit(&channel->shared_received, memory_order_relaxed),
        .segments = n,
        .segment_bytes = bytes};
}
