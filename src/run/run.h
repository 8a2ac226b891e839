/*
 * anyfork-run: the client of `anyfork serve`. Shared by its files; no Python, and nothing of
 * libanyfork, for the loading of a library is a good part of what a start takes.
 *
 * Between it and the server (python/anyfork/_serve.py): a SOCK_SEQPACKET socket, one request
 * up, with descriptors; then down STARTED, with a pidfd of the worker, and ENDED, or REFUSED.
 * The server takes the end of the connection for the end of the client, and kills the worker.
 */
#ifndef AFK_RUN_H
#define AFK_RUN_H

#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>

#define RUN_MAGIC 0x524b4641u /* "AFKR" */
#define RUN_VERSION 1
#define RUN_LIMITS 16     /* RLIM_NLIMITS of the kernel */
#define RUN_FDS_MAX 240   /* beside the streams; 253 go through a socket at once */
#define RUN_TEXT_MAX 16384
#define RUN_NAME_MAX 64

enum run_status { RUN_WRONG_USAGE = 2, RUN_FAILED = 125 }; /* of our own; 125 as env(1) has it */

enum run_op { RUN_OP_RUN = 1, RUN_OP_STARTED = 4, RUN_OP_ENDED, RUN_OP_REFUSED };

/* What follows it in the memfd: the words, then the environment, each with its NUL. The
 * descriptors come in this order: memfd, working directory, the streams that are open, then
 * those of `number`. */
struct run_request {
    uint32_t magic;
    uint16_t version;
    uint16_t op;
    char kind;        /* 'c', 'm', 's': a script, '-': standard input */
    uint8_t streams;  /* bits 0 to 2: those that are open */
    uint8_t terminal; /* those that are the pseudo-terminal that we relay */
    uint8_t padding;
    uint32_t umask;
    int32_t nice;
    uint32_t n_words, n_env, n_fds;
    uint64_t mask, ignored; /* bit n - 1: signal n */
    uint64_t limit[RUN_LIMITS][2];
    uint64_t body_bytes;
    int32_t number[RUN_FDS_MAX];
};

struct run_message {
    struct run_request request;
    int fds[RUN_FDS_MAX + 5];
    unsigned n_fds;
};

struct run_answer {
    uint32_t magic;
    uint16_t version;
    uint16_t op;
    int32_t value; /* STARTED: the pid; ENDED: the wait status */
    char text[RUN_TEXT_MAX]; /* REFUSED */
};

/* How this program was started, taken before it changes anything. */
struct run_stock {
    sigset_t mask;
    uint64_t mask_bits, ignored_bits;
    uint8_t open_streams, terminals;
    int32_t number[RUN_FDS_MAX];
    unsigned n_fds;
};

/* ---- anyfork_run.c -------------------------------------------------------------- */

/* "anyfork-run: ", the text, a newline; ends with that status, the terminal as it was. */
_Noreturn void run_die(int status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- request.c ------------------------------------------------------------------ */

void run_take_stock(struct run_stock *ret);
int run_connect(const char *name);
/* `terminal`: the descriptor of
 * the worker's end of the pseudo-terminal, or -1. */
void run_prepare(struct run_message *ret, const struct run_stock *stock, char kind,
                 char *const *words, unsigned n_words, int terminal);
void run_send(int server, const struct run_message *message);
/* false: the server has gone. *ret_pidfd: -1 where none came. */
bool run_receive(int server, struct run_answer *ret, int *ret_pidfd);

/* ---- terminal.c ------------------------------------------------------------------- */

struct terminal {
    int master; /* -1: there is none */
    bool raw, input_gone, output_gone;
    char in[4096], out[4096]; /* on their way to the worker, and from it */
    size_t in_size, in_at, out_size, out_at;
};

/* Opens a pseudo-terminal like ours; returns the worker's end. */
int terminal_open(struct terminal *t);
void terminal_follow_size(const struct terminal *t);
bool terminal_is_foreground(void);
/* Raw where we are in the foreground, and may touch it. */
void terminal_make_raw(struct terminal *t);
void terminal_restore(struct terminal *t);
/* What came from the keyboard. true: the suspend character was among it, and is for the
 * worker `pid`; what follows it is dropped, as a terminal does. */
bool terminal_read_input(struct terminal *t, pid_t pid);
void terminal_write_input(struct terminal *t);
void terminal_read_output(struct terminal *t);
void terminal_write_output(struct terminal *t);
/* All that the worker has written, once it has ended. */
void terminal_drain(struct terminal *t);

#endif
