/*
 * Frame and body of a channel's message: written, and read as what an enemy may have sent.
 * No system calls, no memory of its own.
 */
#include "channel.h"

#include <string.h>

_Static_assert(sizeof(struct afk_frame) == 48, "no padding, and the same in every build");

/* Beside the bytes of the parts: their sizes, and what alignment takes. */
static uint64_t
overhead_max(unsigned n_parts, size_t align)
{
    return (uint64_t)n_parts * (sizeof(uint64_t) + align) + align;
}

uint64_t
afk_align_up(uint64_t n, size_t align)
{
    return (n + align - 1) & ~(uint64_t)(align - 1);
}

uint64_t
afk_body_bytes(const struct iovec *parts, unsigned n_parts, uint64_t message_max, size_t align)
{
    uint64_t at = (uint64_t)n_parts * sizeof(uint64_t), total = 0;
    if (n_parts > AFK_PARTS_MAX)
        return 0;
    for (unsigned i = 0; i < n_parts; i++) {
        if (parts[i].iov_len > message_max - total)
            return 0;
        total += parts[i].iov_len;
        at = afk_align_up(at, align) + parts[i].iov_len;
    }
    return afk_align_up(at, align) + (n_parts == 0 ? align : 0); /* never 0 */
}

void
afk_body_write(void *to, const struct iovec *parts, unsigned n_parts, size_t align)
{
    char *body = to;
    uint64_t at = (uint64_t)n_parts * sizeof(uint64_t);
    for (unsigned i = 0; i < n_parts; i++) {
        uint64_t size = parts[i].iov_len, begin = afk_align_up(at, align);
        memcpy(body + i * sizeof size, &size, sizeof size);
        memset(body + at, 0, begin - at); /* nothing of ours, nor of an earlier message */
        if (size > 0)
            memcpy(body + begin, parts[i].iov_base, size);
        at = begin + size;
    }
    memset(body + at, 0, afk_align_up(at, align) + (n_parts == 0 ? align : 0) - at);
}

const char *
afk_body_parse(const void *body, uint64_t body_bytes, uint64_t message_max, size_t align,
               struct iovec *ret_parts, unsigned n_parts)
{
    const char *bytes = body;
    uint64_t at = (uint64_t)n_parts * sizeof(uint64_t), total = 0;
    if (at > body_bytes)
        return "a message whose body is too short";
    for (unsigned i = 0; i < n_parts; i++) {
        uint64_t size, begin = afk_align_up(at, align);
        memcpy(&size, bytes + i * sizeof size, sizeof size);
        if (begin > body_bytes || size > body_bytes - begin)
            return "a message whose parts are not inside of its body";
        total += size;
        ret_parts[i] = (struct iovec){(void *)(uintptr_t)(bytes + begin), (size_t)size};
        at = begin + size;
    }
    if (afk_align_up(at, align) + (n_parts == 0 ? align : 0) != body_bytes)
        return "a message whose parts are not all of its body";
    return total <= message_max ? NULL : "a message larger than this end takes (message_max)";
}

static const char *
check_segment(const struct afk_frame *f, unsigned n_fds)
{
    bool is_new = (f->flags & AFK_FRAME_NEW) != 0;
    if (n_fds != (unsigned)f->n_fds + is_new)
        return "a message without the descriptors that it names";
    if (f->slot >= AFK_SLOTS)
        return "a message in a segment that cannot be";
    if (!is_new)
        return f->segment_bytes == 0 ? NULL : "a message in a segment of two sizes";
    return f->segment_bytes > f->body_bytes ? NULL : "a message larger than its segment";
}

const char *
afk_frame_check(const struct afk_frame *f, size_t bytes, unsigned n_fds, uint64_t message_max)
{
    if (bytes < sizeof *f || f->magic != AFK_FRAME_MAGIC)
        return "what is no message of anyfork's";
    if (f->version != AFK_FRAME_VERSION)
        return "a message of another version of anyfork";
    bool shared = (f->flags & AFK_FRAME_SHARED) != 0;
    unsigned odd = f->flags & ~(unsigned)AFK_FRAME_FLAGS;
    if ((f->flags & AFK_FRAME_NEW) != 0 && !shared)
        odd = 1;
    if ((f->flags & AFK_FRAME_TEMPORARY) != 0 && ((f->flags & AFK_FRAME_NEW) == 0 || f->slot != 0))
        odd = 1;
    if (odd != 0 || f->reserved[0] != 0 || f->reserved[1] != 0 || f->reserved[2] != 0)
        return "a message with unknown flags";
    if (f->n_parts > AFK_PARTS_MAX)
        return "a message of more parts than there can be";
    if (f->body_bytes > message_max + overhead_max(f->n_parts, AFK_SEGMENT_ALIGN))
        return "a message larger than this end takes (message_max)";
    if (shared)
        return check_segment(f, n_fds);
    if (f->body_bytes > AFK_INLINE_MAX || bytes != sizeof *f + f->body_bytes)
        return "a message that is longer or shorter than it says";
    if (f->slot != 0 || f->segment_bytes != 0)
        return "a message in a segment that cannot be";
    return n_fds == f->n_fds ? NULL : "a message without the descriptors that it names";
}
