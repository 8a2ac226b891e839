/*
 * What the fuzz targets share: an input that is read piece by piece, descriptors to be sent,
 * and the check that each input leaves the process as it was.
 *
 * The input says what is done to messages that our own senders have made, so that it stays
 * good when a message gets another member; and now and then it is the message itself.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include "anyfork/anyfork.h"
#include "core/core.h"
#include "core/zygote.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define FUZZ_FDS_MAX (AFK_ZYGOTE_FDS_MAX + 8) /* sendmsg(2) refuses the last of them */

/* Unlike assert(3) in every build. */
#define CHECK(condition) \
    do { \
        if (!(condition)) \
            fuzz_fail(__FILE__, __LINE__, #condition); \
    } while (0)
_Noreturn void fuzz_fail(const char *file, int line, const char *what);

/* Each program has one; 0, or -1 for an input that is not worth keeping. */
int fuzz_one(const uint8_t *data, size_t size);

struct fuzz_input {
    const uint8_t *at;
    size_t left;
};
uint8_t fuzz_byte(struct fuzz_input *in); /* 0 at the end of the input */
uint32_t fuzz_number(struct fuzz_input *in);
/* At most `size` bytes; how many. */
size_t fuzz_bytes(struct fuzz_input *in, void *to, size_t size);

/* A message to be: of ours, then as the input changes it. */
struct fuzz_message {
    uint8_t data[4096];
    size_t size;
    int fds[FUZZ_FDS_MAX];
    unsigned n_fds;
};
/* Overwrites some of its bytes; cuts it, or makes it longer; changes its descriptors. */
void fuzz_change(struct fuzz_input *in, struct fuzz_message *message);
/* Any bytes, with any descriptors. */
void fuzz_any(struct fuzz_input *in, struct fuzz_message *message);
/* 0 or a negative errno. */
int fuzz_send(int socket, const struct fuzz_message *message);

/* A descriptor to send, which stays ours. None of them looks like a process that lives. */
int fuzz_fd(uint8_t which);

/* A child that sleeps until it is killed, or we end; it has none of our descriptors. Not by
 * fork(2), which takes long with a sanitizer's memory. */
pid_t fuzz_sleeper(void);
void fuzz_end(pid_t pid); /* kills and reaps it, if it is there */

#endif
