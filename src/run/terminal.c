/*
 * anyfork-run on a terminal: a pseudo-terminal for the worker, and its relay.
 *
 * The worker cannot be in the session of our terminal, for no process can join one. It has a
 * session of its own on a pseudo-terminal, and ours is raw meanwhile: what is typed is the
 * pseudo-terminal's to interpret, but for the suspend character. That would do nothing: the
 * kernel does not let a terminal stop a process group that nobody watches (orphaned, POSIX).
 *
 * Rule: no change of a terminal in whose background we are: it would stop us.
 */
#include "run.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#define DRAINED_MAX (1u << 20) /* the kernel holds some 70,000 bytes */
#define STUCK_MS 10000         /* of a terminal that takes nothing */

static struct termios saved;

int
terminal_open(struct terminal *t)
{
    struct winsize size;
    char name[64];
    if (tcgetattr(STDIN_FILENO, &saved) < 0)
        run_die(RUN_FAILED, "the terminal: %s", strerror(errno));
    t->master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (t->master < 0 || grantpt(t->master) < 0 || unlockpt(t->master) < 0 ||
        ptsname_r(t->master, name, sizeof name) != 0)
        run_die(RUN_FAILED, "no pseudo-terminal can be had: %s; is /dev/pts mounted?",
                strerror(errno));
    int slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (slave < 0)
        run_die(RUN_FAILED, "%s: %s", name, strerror(errno));
    (void)tcsetattr(slave, TCSANOW, &saved);
    if (ioctl(STDIN_FILENO, TIOCGWINSZ, &size) == 0)
        (void)ioctl(slave, TIOCSWINSZ, &size);
    (void)fcntl(t->master, F_SETFL, O_RDWR | O_NONBLOCK);
    return slave;
}

void
terminal_follow_size(const struct terminal *t)
{
    struct winsize size;
    if (ioctl(STDIN_FILENO, TIOCGWINSZ, &size) == 0)
        (void)ioctl(t->master, TIOCSWINSZ, &size);
}

bool
terminal_is_foreground(void)
{
    return tcgetpgrp(STDIN_FILENO) == getpgrp();
}

void
terminal_make_raw(struct terminal *t)
{
    struct termios raw;
    if (t->master < 0 || t->input_gone || !terminal_is_foreground())
        return;
    if (!t->raw && tcgetattr(STDIN_FILENO, &saved) < 0) /* stty(1) may have changed it */
        return;
    raw = saved;
    cfmakeraw(&raw);
    t->raw = tcsetattr(STDIN_FILENO, TCSADRAIN, &raw) == 0;
}

void
terminal_restore(struct terminal *t)
{
    if (t->raw && terminal_is_foreground())
        (void)tcsetattr(STDIN_FILENO, TCSADRAIN, &saved);
    t->raw = false;
}

/* ---- the keyboard ------------------------------------------------------------------ */

/* Whether that pseudo-terminal would now send the worker itself a SIGTSTP for `c`. */
static bool
suspends(const struct terminal *t, char c, pid_t pid)
{
    struct termios now; /* by the master too: those of the worker's end */
    pid_t foreground;
    return tcgetattr(t->master, &now) == 0 && (now.c_lflag & ISIG) != 0 &&
           now.c_cc[VSUSP] != _POSIX_VDISABLE && (cc_t)c == now.c_cc[VSUSP] &&
           ioctl(t->master, TIOCGPGRP, &foreground) == 0 && foreground == pid;
}

bool
terminal_read_input(struct terminal *t, pid_t pid)
{
    ssize_t n = read(STDIN_FILENO, t->in, sizeof t->in);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return false;
    if (n <= 0) {
        t->input_gone = true;
        return false;
    }
    t->in_at = 0;
    t->in_size = (size_t)n;
    for (size_t i = 0; i < t->in_size; i++) {
        if (suspends(t, t->in[i], pid)) {
            t->in_size = i;
            return true;
        }
    }
    return false;
}

void
terminal_write_input(struct terminal *t)
{
    ssize_t n = write(t->master, t->in + t->in_at, t->in_size - t->in_at);
    if (n > 0)
        t->in_at += (size_t)n;
    else if (n < 0 && errno != EINTR && errno != EAGAIN)
        t->in_at = t->in_size;
    if (t->in_at == t->in_size)
        t->in_at = t->in_size = 0;
}

/* ---- what the worker writes ------------------------------------------------------------ */

/* Both terminals end lines with a carriage return, where ours is not raw: in the background. */
static void
drop_returns(struct terminal *t)
{
    size_t to = 0;
    for (size_t i = 0; i < t->out_size; i++)
        if (t->out[i] != '\r' || i + 1 == t->out_size || t->out[i + 1] != '\n')
            t->out[to++] = t->out[i];
    t->out_size = to;
}

void
terminal_read_output(struct terminal *t)
{
    ssize_t n = read(t->master, t->out, sizeof t->out);
    if (n > 0) {
        t->out_at = 0;
        t->out_size = (size_t)n;
    }
    else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
        t->output_gone = true; /* EIO: nobody has the other end open */
    }
}

void
terminal_write_output(struct terminal *t)
{
    if (!t->raw && t->out_at == 0)
        drop_returns(t);
    ssize_t n = write(STDOUT_FILENO, t->out + t->out_at, t->out_size - t->out_at);
    if (n > 0)
        t->out_at += (size_t)n;
    else if (n < 0 && errno != EINTR && errno != EAGAIN)
        t->out_at = t->out_size; /* our terminal has gone */
    if (t->out_at == t->out_size)
        t->out_at = t->out_size = 0;
}

void
terminal_drain(struct terminal *t)
{
    struct pollfd out = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (t->master < 0)
        return;
    /* What it left running may write for ever. */
    for (size_t total = 0; total < DRAINED_MAX; total += t->out_size) {
        while (t->out_size > 0) {
            if (poll(&out, 1, STUCK_MS) == 0)
                return;
            terminal_write_output(t);
        }
        terminal_read_output(t); /* the kernel has moved all there is by then */
        if (t->out_size == 0)
            return;
    }
}
