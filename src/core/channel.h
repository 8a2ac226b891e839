/*
 * Messages between two processes, over a socket pair: a kind, an id, parts that are bytes, and
 * descriptors. See docs/internals.md.
 *
 * A message is one datagram (SOCK_SEQPACKET), so that nothing is ever half read: a frame, and
 * behind it the body, if that is small. A larger body stands in a *segment*, a memfd that both
 * have mapped: the sender's to write to while nobody reads it. It is sent once, with the first
 * message that stands in it, and used again when the receiver has let go of all parts.
 *
 * Body: the sizes of the parts (u64), then the parts, each at the next multiple of the
 * alignment; inside a datagram of 8, in a segment of 64.
 */
#ifndef AFK_CHANNEL_H
#define AFK_CHANNEL_H

#include "core.h"

#include <stdatomic.h>
#include <sys/uio.h>

#define AFK_FRAME_MAGIC 0x434b4641u /* "AFKC" */
#define AFK_FRAME_VERSION 1
#define AFK_INLINE_MAX 16384 /* bytes of a body that goes in the datagram: measured */
#define AFK_INLINE_ALIGN 8
#define AFK_SEGMENT_ALIGN 64
#define AFK_PARTS_MAX (1u << 20)
#define AFK_MESSAGE_MAX ((uint64_t)1 << 46) /* what one address space can hold, and more */
#define AFK_CHANNEL_FDS_MAX (AFK_FDS_MAX - 1) /* the other one is a segment's */
#define AFK_SLOTS 64                       /* segments of one direction that are kept */
#define AFK_KEEP_BYTES ((size_t)256 << 20) /* the same, in bytes */
#define AFK_SEGMENT_MIN 65536
/* A receiver has views of what is larger; and of what is larger than this, where its views take
 * half of the slots, or the segment is temporary: else it copies, so that many small messages
 * which are kept take neither all slots, nor a mapping of the process each. */
#define AFK_COPY_MAX 65536
#define AFK_COPY_MORE (1u << 20)

enum afk_frame_flag {
    AFK_FRAME_SHARED = 1u << 0,    /* the body is in the segment of `slot` */
    AFK_FRAME_NEW = 1u << 1,       /* which comes with this message, as its first descriptor */
    AFK_FRAME_TEMPORARY = 1u << 2, /* and has no slot: it goes with the message */
    AFK_FRAME_FLAGS = (1u << 3) - 1
};

struct afk_frame {
    uint32_t magic;
    uint16_t version;
    uint16_t kind;
    uint64_t id;
    uint64_t body_bytes;
    uint64_t segment_bytes; /* of the memfd, if NEW */
    uint32_t n_parts;
    uint16_t n_fds; /* the message's own */
    uint16_t flags;
    uint16_t slot;
    uint16_t reserved[3];
};

/* ---- wire.c: frame and body, no system calls --------------------------------- */

uint64_t afk_align_up(uint64_t n, size_t align);
/* Of the body, or 0: more parts, or more bytes, than a message may have. */
uint64_t afk_body_bytes(const struct iovec *parts, unsigned n_parts, uint64_t message_max,
                        size_t align);
void afk_body_write(void *to, const struct iovec *parts, unsigned n_parts, size_t align);
/* Reads each size once, for the peer may write there; parts[i] are then inside of the body,
 * which has nothing else. NULL, or what is wrong: "a message ...", a static string. */
const char *afk_body_parse(const void *body, uint64_t body_bytes, uint64_t message_max,
                           size_t align, struct iovec *ret_parts, unsigned n_parts);
/* Of a datagram of `bytes`, of which the frame is the start, with n_fds descriptors. The same. */
const char *afk_frame_check(const struct afk_frame *frame, size_t bytes, unsigned n_fds,
                            uint64_t message_max);

/* ---- ring.c: segments ---------------------------------------------------------- */

/* The sender's ends. Any thread. */
struct afk_ring;
/* What one message stands in, until it is sent. */
struct afk_lease {
    size_t segment_bytes;
    unsigned slot; /* AFK_SLOTS: temporary */
    int fd;        /* of one that is new; else -1 */
    void *base;    /* NULL: temporary, and to be written to */
};
struct afk_ring *afk_ring_new(void); /* or NULL */
/* 0, and then afk_ring_give(); or a negative errno. */
int afk_ring_take(struct afk_ring *ring, uint64_t body_bytes, unsigned n_parts,
                  struct afk_lease *ret_lease);
/* The body. 0 or a negative errno. */
int afk_lease_write(const struct afk_lease *lease, const struct iovec *parts, unsigned n_parts);
void afk_ring_give(struct afk_ring *ring, struct afk_lease *lease, bool was_sent);
/* Frees what is not in use. */
void afk_ring_trim(struct afk_ring *ring);
void afk_ring_count(struct afk_ring *ring, unsigned *ret_n, uint64_t *ret_bytes);
/* All of them, while nobody has a lease. */
void afk_ring_clear(struct afk_ring *ring);
void afk_ring_free(struct afk_ring *ring);

/* The receiver's ends. Any thread. */
struct afk_mappings;
/* One segment. While it is in use it has a message, whose views are counted. */
struct afk_mapping;
struct afk_mappings *afk_mappings_new(void); /* or NULL */
/* The segment of a frame that has been checked, in use with one view; `fd` stays the caller's.
 * 0, with *ret_body, and whether parts are to be copied. -EBADMSG: *ret_why is what is wrong: "a
 * message ...". Or a negative errno. */
int afk_mappings_take(struct afk_mappings *mappings, const struct afk_frame *frame, int fd,
                      struct afk_mapping **ret_mapping, const void **ret_body, bool *ret_copy,
                      const char **ret_why);
void afk_mappings_count(struct afk_mappings *mappings, unsigned *ret_n, uint64_t *ret_bytes);
/* Those in use stay until their last view has gone. */
void afk_mappings_clear(struct afk_mappings *mappings);
void afk_mappings_free(struct afk_mappings *mappings);
void afk_mapping_ref(struct afk_mapping *mapping);
/* One view less. Any thread, also when the channel has gone. */
void afk_mapping_unref(struct afk_mapping *mapping);

/* ---- channel.c ------------------------------------------------------------------ */

struct afk_channel;
/* Takes `fd` over, on success: one end of a pair of SOCK_SEQPACKET sockets, AF_UNIX. It is of
 * this process: a forked child has it closed. 0 or a negative errno; -EPROTOTYPE: no such. */
int afk_channel_new(struct afk_channel **ret_channel, int fd, uint64_t message_max);
/* All calls below but free are for any thread, and may be under way when it is closed: they fail
 * with -ESHUTDOWN then, as in a forked child. */
void afk_channel_close(struct afk_channel *channel);
void afk_channel_free(struct afk_channel *channel); /* closes it too */
int afk_channel_fd(struct afk_channel *channel);    /* or -1 */

struct afk_message {
    uint16_t kind;
    uint64_t id;
    const struct iovec *parts;
    unsigned n_parts;
    const int *fds; /* stay the sender's */
    unsigned n_fds;
};
/* 1; 0: there is no room now, nothing was sent; -EMSGSIZE: more than message_max; -EPIPE,
 * -ECONNRESET: the peer has gone; another negative errno. Never waits. */
int afk_channel_send(struct afk_channel *channel, const struct afk_message *message);

#define AFK_FEW_PARTS 8
struct afk_received {
    uint16_t kind;
    uint64_t id;
    struct iovec *parts;
    unsigned n_parts;
    struct afk_mapping *mapping; /* what the parts are in; NULL: in `datagram` */
    bool copy;                   /* no views are wanted: let go of it soon */
    unsigned n_fds;
    int fds[AFK_FDS_MAX]; /* the receiver's */
    struct iovec few[AFK_FEW_PARTS];
    union {
        struct afk_frame frame;
        char datagram[sizeof(struct afk_frame) + AFK_INLINE_MAX];
    };
};
/* 1, and then afk_received_drop(); 0: nothing there now; -EPIPE: the peer has closed it. -EBADMSG:
 * *ret_why is what the peer has sent; after this and any other error the channel is shut down,
 * for what was read is lost. Never waits. */
int afk_channel_receive(struct afk_channel *channel, struct afk_received *ret_received,
                        const char **ret_why);
/* Its memory and its view; descriptors from the `taken`th on are closed. */
void afk_received_drop(struct afk_received *received, unsigned taken);

enum afk_wait { AFK_WAIT_READABLE = 1, AFK_WAIT_ALSO = 2, AFK_WAIT_WRITABLE = 4 };
/* Until the channel is readable, or writable if `for_writing`, or the descriptor `also` (-1: none)
 * is readable, or the peer has gone. Bits; 0: the time has passed; -EINTR; -ESHUTDOWN. */
int afk_channel_wait(struct afk_channel *channel, bool for_writing, int also, int64_t timeout_ns);
/* Both directions end: waiters wake, what has come can still be received. */
int afk_channel_shutdown(struct afk_channel *channel);
/* Gives idle segments of ours back to the system. */
void afk_channel_trim(struct afk_channel *channel);

struct afk_channel_counts {
    uint64_t sent, received;               /* messages */
    uint64_t bytes_sent, bytes_received;   /* of parts */
    uint64_t shared_sent, shared_received; /* of them, through segments */
    uint64_t segments, segment_bytes;      /* now, of both directions */
};
void afk_channel_counts(struct afk_channel *channel, struct afk_channel_counts *ret);

#endif
