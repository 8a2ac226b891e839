/*
 * Segments: memfds that sender and receiver of one direction have both mapped.
 *
 * Rules: a segment holds one message at a time. Its first page has one word that both write:
 * the sender makes it IN_USE, the receiver FREE when the last view of the message has gone; or
 * LEFT where a forked child may have views too, who then has that memory for itself. The sender
 * makes it RETIRED when it drops the segment, at which the receiver looks whenever a new one
 * comes. Nothing waits for the other side: where all segments are in use, the next message gets
 * a temporary one.
 *
 * Memory is faulted in once: a segment is kept for the next message that fits.
 */
#include "channel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of a part: from there on a system call takes less than the faults of memory that is mapped for
 * one message alone. */
#define WRITTEN_MIN 65536

enum { FREE, IN_USE, LEFT, RETIRED };
struct head {
    _Atomic(uint32_t) state;
};

/* What lies in front of the data. */
static size_t
head_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static struct head *
head_of(void *base)
{
    return base;
}

/* Sizes grow by a quarter of a power of two, so that few of them serve all messages. */
static size_t
segment_bytes_for(uint64_t body_bytes)
{
    size_t size = AFK_SEGMENT_MIN;
    while (size < body_bytes)
        size += size & (size - 1) ? (size_t)1 << (61 - __builtin_clzl(size)) : size / 4;
    size_t page = head_bytes();
    return ((size + page - 1) & ~(page - 1)) + page;
}

/* ---- the sender ----------------------------------------------------------------- */

struct segment {
    void *base;   /* NULL: the slot is empty */
    size_t bytes;
    bool filling; /* by a thread of ours, or being made */
    uint64_t used; /* when, in messages */
};

struct afk_ring {
    pthread_mutex_t lock;
    unsigned generation;
    struct segment slot[AFK_SLOTS];
    size_t bytes; /* of all slots */
    uint64_t clock;
};

struct afk_ring *
afk_ring_new(void)
{
    struct afk_ring *ring = AFK_ALLOC("calloc(ring)", calloc(1, sizeof *ring));
    if (ring == NULL)
        return NULL;
    (void)pthread_mutex_init(&ring->lock, NULL);
    ring->generation = afk_generation();
    return ring;
}

static bool
is_in_state(const struct segment *s, uint32_t state)
{
    return s->base != NULL && !s->filling &&
           atomic_load_explicit(&head_of(s->base)->state, memory_order_acquire) == state;
}

static bool
is_free(const struct segment *s)
{
    return is_in_state(s, FREE);
}

static void
retire(struct afk_ring *ring, struct segment *s)
{
    size_t head = head_bytes();
    if (is_free(s)) /* at once, though the receiver has it mapped until it looks */
        afk_os_discard((char *)s->base + head, s->bytes - head);
    atomic_store_explicit(&head_of(s->base)->state, RETIRED, memory_order_release);
    afk_os_unmap(s->base, s->bytes);
    ring->bytes -= s->bytes;
    *s = (struct segment){.base = NULL};
}

/* The smallest that is free and fits, or NULL. */
static struct segment *
find_free(struct afk_ring *ring, size_t bytes)
{
    struct segment *best = NULL;
    for (unsigned i = 0; i < AFK_SLOTS; i++) {
        struct segment *s = &ring->slot[i];
        if (s->bytes >= bytes && (best == NULL || s->bytes < best->bytes) && is_free(s))
            best = s;
    }
    return best;
}

static struct segment *
find_empty(struct afk_ring *ring)
{
    for (unsigned i = 0; i < AFK_SLOTS; i++)
        if (ring->slot[i].base == NULL && !ring->slot[i].filling)
            return &ring->slot[i];
    return NULL;
}

static void
retire_left(struct afk_ring *ring)
{
    for (unsigned i = 0; i < AFK_SLOTS; i++)
        if (is_in_state(&ring->slot[i], LEFT))
            retire(ring, &ring->slot[i]);
}

static bool
retire_oldest(struct afk_ring *ring)
{
    struct segment *oldest = NULL;
    for (unsigned i = 0; i < AFK_SLOTS; i++)
        if (is_free(&ring->slot[i]) && (oldest == NULL || ring->slot[i].used < oldest->used))
            oldest = &ring->slot[i];
    if (oldest != NULL)
        retire(ring, oldest);
    return oldest != NULL;
}

/* A slot for a segment to be made, which counts from now on; or NULL. */
static struct segment *
reserve(struct afk_ring *ring, size_t bytes)
{
    struct segment *s;
    retire_left(ring);
    if (bytes > AFK_KEEP_BYTES)
        return NULL;
    while ((s = find_empty(ring)) == NULL || ring->bytes + bytes > AFK_KEEP_BYTES)
        if (!retire_oldest(ring))
            return NULL;
    s->filling = true;
    s->bytes = bytes;
    ring->bytes += bytes;
    return s;
}

static int
make(struct afk_lease *lease, bool mapped)
{
    lease->fd = afk_os_memfd("anyfork-channel", lease->segment_bytes);
    if (lease->fd < 0)
        return lease->fd;
    int r = mapped ? afk_os_allocate(lease->fd, lease->segment_bytes) : 0;
    if (r == 0 && mapped)
        r = afk_os_map(lease->fd, lease->segment_bytes, lease->segment_bytes, &lease->base);
    if (r == 0)
        return 0;
    afk_os_close(lease->fd);
    lease->fd = -1;
    return r;
}

static void
cancel(struct afk_ring *ring, struct segment *s)
{
    (void)pthread_mutex_lock(&ring->lock);
    ring->bytes -= s->bytes;
    *s = (struct segment){.base = NULL};
    (void)pthread_mutex_unlock(&ring->lock);
}

int
afk_ring_take(struct afk_ring *ring, uint64_t body_bytes, unsigned n_parts,
              struct afk_lease *lease)
{
    size_t bytes = segment_bytes_for(body_bytes);
    *lease = (struct afk_lease){.segment_bytes = bytes, .slot = AFK_SLOTS, .fd = -1};
    (void)pthread_mutex_lock(&ring->lock);
    struct segment *s = find_free(ring, bytes);
    if (s != NULL) {
        s->filling = true;
        lease->base = s->base;
        lease->segment_bytes = s->bytes;
    }
    else {
        s = reserve(ring, bytes);
    }
    if (s != NULL) {
        s->used = ++ring->clock;
        lease->slot = (unsigned)(s - ring->slot);
    }
    (void)pthread_mutex_unlock(&ring->lock);
    if (lease->base == NULL) {
        /* Outside of the lock: it may take long. */
        int r = make(lease, s != NULL || body_bytes / WRITTEN_MIN < n_parts);
        if (r < 0) {
            if (s != NULL)
                cancel(ring, s);
            return r;
        }
    }
    if (s != NULL)
        atomic_store_explicit(&head_of(lease->base)->state, IN_USE, memory_order_relaxed);
    return 0;
}

int
afk_lease_write(const struct afk_lease *lease, const struct iovec *parts, unsigned n_parts)
{
    size_t head = head_bytes();
    if (lease->base != NULL) {
        afk_body_write((char *)lease->base + head, parts, n_parts, AFK_SEGMENT_ALIGN);
        return 0;
    }
    /* What lies between the parts is zero, and in pages that are written to. */
    int r = 0;
    uint64_t at = (uint64_t)n_parts * sizeof(uint64_t);
    for (unsigned i = 0; r == 0 && i < n_parts; i++) {
        uint64_t size = parts[i].iov_len;
        at = afk_align_up(at, AFK_SEGMENT_ALIGN);
        r = afk_os_pwrite_all(lease->fd, &size, sizeof size, head + i * sizeof size);
        if (r == 0)
            r = afk_os_pwrite_all(lease->fd, parts[i].iov_base, size, head + at);
        at += size;
    }
    return r;
}

void
afk_ring_give(struct afk_ring *ring, struct afk_lease *lease, bool was_sent)
{
    bool is_new = lease->fd >= 0;
    afk_os_close(lease->fd);
    if (lease->slot == AFK_SLOTS) {
        if (lease->base != NULL)
            afk_os_unmap(lease->base, lease->segment_bytes);
        return;
    }
    struct segment *s = &ring->slot[lease->slot];
    if (!was_sent && is_new) { /* the receiver does not know it */
        afk_os_unmap(lease->base, lease->segment_bytes);
        cancel(ring, s);
        return;
    }
    if (!was_sent)
        atomic_store_explicit(&head_of(lease->base)->state, FREE, memory_order_release);
    (void)pthread_mutex_lock(&ring->lock);
    s->base = lease->base;
    s->filling = false;
    (void)pthread_mutex_unlock(&ring->lock);
}

void
afk_ring_trim(struct afk_ring *ring)
{
    (void)pthread_mutex_lock(&ring->lock);
    retire_left(ring);
    while (retire_oldest(ring))
        ;
    (void)pthread_mutex_unlock(&ring->lock);
}

void
afk_ring_count(struct afk_ring *ring, unsigned *ret_n, uint64_t *ret_bytes)
{
    (void)pthread_mutex_lock(&ring->lock);
    for (unsigned i = 0; i < AFK_SLOTS; i++)
        *ret_n += ring->slot[i].base != NULL;
    *ret_bytes += ring->bytes;
    (void)pthread_mutex_unlock(&ring->lock);
}

void
afk_ring_clear(struct afk_ring *ring)
{
    (void)pthread_mutex_lock(&ring->lock);
    for (unsigned i = 0; i < AFK_SLOTS; i++) {
        if (ring->slot[i].base != NULL)
            afk_os_unmap(ring->slot[i].base, ring->slot[i].bytes);
        ring->slot[i] = (struct segment){.base = NULL};
    }
    ring->bytes = 0;
    (void)pthread_mutex_unlock(&ring->lock);
}

void
afk_ring_free(struct afk_ring *ring)
{
    if (ring->generation == afk_generation()) /* a forked child does not have the segments */
        afk_ring_clear(ring);
    (void)pthread_mutex_destroy(&ring->lock);
    free(ring);
}

/* ---- the receiver ----------------------------------------------------------------- */

struct afk_mapping {
    atomic_uint refs;  /* of its slot, and of a message that is in it */
    atomic_uint views; /* 0: the sender may use it */
    unsigned generation;
    unsigned forks; /* when the message came */
    bool temporary;
    void *base;
    size_t bytes;
};

struct afk_mappings {
    pthread_mutex_t lock;
    struct afk_mapping *slot[AFK_SLOTS];
};

struct afk_mappings *
afk_mappings_new(void)
{
    struct afk_mappings *m = AFK_ALLOC("calloc(mappings)", calloc(1, sizeof *m));
    if (m != NULL)
        (void)pthread_mutex_init(&m->lock, NULL);
    return m;
}

static void
drop(struct afk_mapping *mapping)
{
    if (atomic_fetch_sub(&mapping->refs, 1) > 1)
        return;
    afk_os_unmap(mapping->base, mapping->bytes);
    free(mapping);
}

void
afk_mapping_ref(struct afk_mapping *mapping)
{
    atomic_fetch_add_explicit(&mapping->views, 1, memory_order_relaxed);
}

void
afk_mapping_unref(struct afk_mapping *mapping)
{
    if (atomic_fetch_sub_explicit(&mapping->views, 1, memory_order_acq_rel) > 1)
        return;
    /* A forked child has views of its own, of memory that its parent still reads. */
    if (!mapping->temporary && mapping->generation == afk_generation())
        atomic_store_explicit(&head_of(mapping->base)->state,
                              mapping->forks == afk_forks() ? FREE : LEFT, memory_order_release);
    drop(mapping);
}

static int
map(const struct afk_frame *frame, int fd, struct afk_mapping **ret, const char **ret_why)
{
    size_t head = head_bytes(), bytes = (size_t)frame->segment_bytes;
    *ret_why = "a message in a segment that is not sealed, or of another size";
    if (bytes < head || bytes - head < frame->body_bytes || bytes != frame->segment_bytes ||
        bytes % head != 0 || afk_os_memfd_check(fd, bytes) < 0)
        return -EBADMSG;
    struct afk_mapping *m = AFK_ALLOC("calloc(mapping)", calloc(1, sizeof *m));
    if (m == NULL)
        return -ENOMEM;
    m->bytes = bytes;
    m->generation = afk_generation();
    m->temporary = (frame->flags & AFK_FRAME_TEMPORARY) != 0;
    int r = afk_os_map(fd, bytes, m->temporary ? 0 : head, &m->base);
    if (r < 0) {
        free(m);
        return r == -EPERM || r == -EACCES ? -EBADMSG : r; /* sealed, or not open, for that */
    }
    atomic_init(&m->refs, 1);
    *ret = m;
    return 0;
}

static bool
is_in_use(struct afk_mapping *m)
{
    return atomic_load_explicit(&m->views, memory_order_acquire) != 0;
}

/* Those that the sender has dropped, or will. Only where it keeps a new one can there be any. */
static void
drop_retired(struct afk_mappings *m)
{
    for (unsigned i = 0; i < AFK_SLOTS; i++) {
        struct afk_mapping *one = m->slot[i];
        if (one != NULL && !is_in_use(one) &&
            atomic_load_explicit(&head_of(one->base)->state, memory_order_relaxed) >= LEFT) {
            m->slot[i] = NULL;
            drop(one);
        }
    }
}

static int
place(struct afk_mappings *m, unsigned slot, struct afk_mapping *mapping, const char **ret_why)
{
    drop_retired(m);
    struct afk_mapping *old = m->slot[slot];
    if (old != NULL && is_in_use(old)) {
        *ret_why = "a message in the place of one that is still read";
        return -EBADMSG;
    }
    if (old != NULL)
        drop(old);
    m->slot[slot] = mapping;
    atomic_fetch_add(&mapping->refs, 1);
    return 0;
}

/* The mapping of an earlier message, or NULL. */
static struct afk_mapping *
find(struct afk_mappings *m, const struct afk_frame *frame, const char **ret_why)
{
    struct afk_mapping *mapping = m->slot[frame->slot];
    *ret_why = "a message in a segment that was not sent";
    if (mapping == NULL || mapping->bytes - head_bytes() < frame->body_bytes)
        return NULL;
    *ret_why = "a message in the place of one that is still read";
    if (is_in_use(mapping))
        return NULL;
    atomic_fetch_add(&mapping->refs, 1);
    return mapping;
}

static bool
is_better_copied(struct afk_mappings *m, const struct afk_mapping *mapping, uint64_t body_bytes)
{
    unsigned in_use = 0;
    if (body_bytes <= AFK_COPY_MAX || body_bytes > AFK_COPY_MORE)
        return body_bytes <= AFK_COPY_MAX;
    for (unsigned i = 0; i < AFK_SLOTS; i++)
        in_use += m->slot[i] != NULL && is_in_use(m->slot[i]);
    return mapping->temporary || in_use > AFK_SLOTS / 2;
}

int
afk_mappings_take(struct afk_mappings *m, const struct afk_frame *frame, int fd,
                  struct afk_mapping **ret_mapping, const void **ret_body, bool *ret_copy,
                  const char **ret_why)
{
    bool is_new = (frame->flags & AFK_FRAME_NEW) != 0;
    struct afk_mapping *mapping = NULL;
    int r = is_new ? map(frame, fd, &mapping, ret_why) : 0;
    if (r < 0)
        return r;
    (void)pthread_mutex_lock(&m->lock);
    if (!is_new)
        r = (mapping = find(m, frame, ret_why)) != NULL ? 0 : -EBADMSG;
    else if (!mapping->temporary)
        r = place(m, frame->slot, mapping, ret_why);
    if (r == 0) {
        *ret_copy = is_better_copied(m, mapping, frame->body_bytes);
        mapping->forks = afk_forks();
        atomic_store(&mapping->views, 1);
    }
    (void)pthread_mutex_unlock(&m->lock);
    if (r < 0) {
        if (is_new)
            drop(mapping);
        return r;
    }
    *ret_mapping = mapping;
    *ret_body = (const char *)mapping->base + head_bytes();
    return 0;
}

void
afk_mappings_count(struct afk_mappings *m, unsigned *ret_n, uint64_t *ret_bytes)
{
    (void)pthread_mutex_lock(&m->lock);
    for (unsigned i = 0; i < AFK_SLOTS; i++) {
        *ret_n += m->slot[i] != NULL;
        *ret_bytes += m->slot[i] != NULL ? m->slot[i]->bytes : 0;
    }
    (void)pthread_mutex_unlock(&m->lock);
}

static void
drop_all(struct afk_mappings *m)
{
    for (unsigned i = 0; i < AFK_SLOTS; i++) {
        if (m->slot[i] != NULL)
            drop(m->slot[i]);
        m->slot[i] = NULL;
    }
}

void
afk_mappings_clear(struct afk_mappings *m)
{
    (void)pthread_mutex_lock(&m->lock);
    drop_all(m);
    (void)pthread_mutex_unlock(&m->lock);
}

void
afk_mappings_free(struct afk_mappings *m)
{
    drop_all(m); /* in a forked child nobody may have the lock */
    (void)pthread_mutex_destroy(&m->lock);
    free(m);
}
