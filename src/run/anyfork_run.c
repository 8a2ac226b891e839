/*
 * anyfork-run: a Python program in a warm interpreter. `anyfork serve` has loaded its modules
 * and starts it; this process stands for it: what it is sent is passed on, how the worker
 * ends it ends.
 *
 * Rules: all signals that can be passed on are blocked and read from a descriptor, so that no
 * way out leaves the terminal raw. They wait for the worker: by the time that we hear of it
 * the program may have run for a while.
 */
#include "run.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef PIDFD_SIGNAL_PROCESS_GROUP
#define PIDFD_SIGNAL_PROCESS_GROUP (1u << 2) /* linux/pidfd.h, 6.9 */
#endif
#define UNANSWERED_MS 1000 /* a signal waits for the server, but not for ever */
#define BACKGROUND_MS 200 /* nobody tells when a job that runs comes to the foreground */

static const char help[] =
    "usage: anyfork-run [--name NAME] SCRIPT [ARG...]\n"
    "       anyfork-run [--name NAME] -m MODULE [ARG...]\n"
    "       anyfork-run [--name NAME] -c CODE [ARG...]\n"
    "       anyfork-run [--name NAME] - [ARG...]\n"
    "\n"
    "Run a Python program as `python` does, in an interpreter that `anyfork serve` has\n"
    "warmed up: what it preloads is imported already. Environment, directory, limits,\n"
    "streams, signals and exit status are as if the program was run directly.\n"
    "\n"
    "options, before the program:\n"
    "  --name NAME  the server (default: default)\n"
    "  --help       this text\n"
    "  --version    the version\n"
    "  --           the end of options: what follows is a script, or -\n"
    "\n"
    "Exit status: the program's; if it was killed, the same signal kills this command.\n"
    "             2 on wrong usage, or if no server of that name runs; 125 if the\n"
    "             server refused the start, or has gone.\n"
    "Example:     anyfork serve --detach --preload numpy\n"
    "             anyfork-run -c 'import numpy; print(numpy.__version__)'\n"
    "See also:    anyfork serve --help\n";

struct run {
    int server, signals, pidfd;
    pid_t pid;
    bool started, ended; /* the worker, of whose end the server has not told yet */
    bool signalled;      /* and nobody there to pass it on to */
    int passed_on;       /* the last signal that the worker was sent; 0: none of late */
    int64_t passed_on_ms;
    struct terminal terminal;
};

static struct run run = {.server = -1, .signals = -1, .pidfd = -1, .terminal = {.master = -1}};
static struct run_stock stock;

_Noreturn void
run_die(int status, const char *format, ...)
{
    va_list args;
    terminal_restore(&run.terminal);
    (void)fputs("anyfork-run: ", stderr);
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    (void)fputc('\n', stderr);
    exit(status);
}

/* ---- the command line ------------------------------------------------------------- */

struct command {
    const char *name;
    char kind;
    char **words; /* what of the program: its file, module or code; then its arguments */
    unsigned n_words;
};

static bool
is_name(const char *text)
{
    size_t n = strspn(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
    return n > 0 && n <= RUN_NAME_MAX && text[n] == '\0' && text[0] != '.' && text[0] != '-';
}

static _Noreturn void
wrong_usage(const char *what, const char *which)
{
    run_die(RUN_WRONG_USAGE, "%s%s; see anyfork-run --help", what, which);
}

static _Noreturn void
print_and_exit(const char *text)
{
    bool ok = fputs(text, stdout) >= 0 && fflush(stdout) == 0;
    exit(ok ? 0 : 1);
}

static void
take_program(struct command *command, char **argv)
{
    static char empty[] = "", *nothing[] = {empty, NULL};
    bool is_script = argv[0] != NULL && strcmp(argv[0], "--") == 0;
    argv += is_script;
    if (argv[0] == NULL) {
        command->kind = '-';
        command->words = nothing;
    }
    else if (strcmp(argv[0], "-") == 0) {
        command->kind = '-';
        command->words = argv;
    }
    else if (is_script || argv[0][0] != '-') {
        command->kind = 's';
        command->words = argv;
    }
    else if (strncmp(argv[0], "-c", 2) == 0 || strncmp(argv[0], "-m", 2) == 0) {
        command->kind = argv[0][1];
        command->words = argv;
        if (argv[0][2] != '\0') /* -cCODE */
            argv[0] += 2;
        else
            command->words++;
        if (command->words[0] == NULL)
            wrong_usage(command->kind == 'c' ? "-c wants the code" : "-m wants a module", "");
    }
    else {
        wrong_usage("unknown option ", argv[0]);
    }
    while (command->words[command->n_words] != NULL)
        command->n_words++;
}

static void
take_arguments(struct command *command, char **argv)
{
    *command = (struct command){.name = "default"};
    for (; *argv != NULL; argv++) {
        if (strcmp(*argv, "--help") == 0 || strcmp(*argv, "-h") == 0)
            print_and_exit(help);
        if (strcmp(*argv, "--version") == 0)
            print_and_exit("anyfork-run " ANYFORK_VERSION "\n");
        if (strcmp(*argv, "--name") == 0) {
            if (*++argv == NULL)
                wrong_usage("--name wants a name", "");
            command->name = *argv;
        }
        else if (strncmp(*argv, "--name=", 7) == 0)
            command->name = *argv + 7;
        else
            break;
    }
    if (!is_name(command->name))
        wrong_usage("a name has letters, digits, '.', '_' and '-' only, at most 64: not ",
                    command->name);
    take_program(command, argv);
    if (command->kind == '-' && (stock.terminals & 1) != 0)
        wrong_usage("there is no interactive mode: give a script, -m MODULE or -c CODE", "");
}

/* ---- signals ------------------------------------------------------------------------ */

/* The kernel's own of this thread's faults stay; and those of background jobs. */
static void
block_signals(void)
{
    static const int apart[] = {SIGKILL, SIGSTOP, SIGSEGV, SIGBUS,  SIGFPE, SIGILL,
                                SIGTRAP, SIGSYS,  SIGCHLD, SIGTTIN, SIGTTOU};
    sigset_t mine;
    (void)sigfillset(&mine);
    for (size_t i = 0; i < sizeof apart / sizeof *apart; i++)
        (void)sigdelset(&mine, apart[i]);
    (void)signal(SIGPIPE, SIG_IGN); /* of our own writes, once it is known how it was */
    (void)sigprocmask(SIG_BLOCK, &mine, NULL);
    run.signals = signalfd(-1, &mine, SFD_CLOEXEC | SFD_NONBLOCK);
    if (run.signals < 0)
        run_die(RUN_FAILED, "signalfd: %s", strerror(errno));
}

static void
take_default(int sig)
{
    sigset_t one;
    (void)sigemptyset(&one);
    (void)sigaddset(&one, sig);
    (void)signal(sig, SIG_DFL);
    (void)raise(sig);
    (void)sigprocmask(SIG_UNBLOCK, &one, NULL); /* here it acts */
    (void)sigprocmask(SIG_BLOCK, &one, NULL);
}

/* As the worker did, but without a second core file. */
static _Noreturn void
die_of(int sig)
{
    const struct rlimit none = {0, 0};
    terminal_restore(&run.terminal);
    (void)setrlimit(RLIMIT_CORE, &none);
    (void)prctl(PR_SET_DUMPABLE, 0); /* a pipe as core_pattern does not ask the limit */
    take_default(sig);
    _exit(128 + sig);
}

static int64_t
now_ms(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Nobody to whom a signal could be passed on: not yet, or not any more. */
static bool
is_alone(void)
{
    return !run.started || run.ended;
}

static void
signal_group(int sig)
{
    if (syscall(SYS_pidfd_send_signal, run.pidfd, sig, NULL, PIDFD_SIGNAL_PROCESS_GROUP) == 0 ||
        errno != EINVAL)
        return;
    /* Linux before 6.9. While the worker is there the number is its own. */
    if (syscall(SYS_pidfd_send_signal, run.pidfd, 0, NULL, 0) == 0)
        (void)kill(-run.pid, sig);
}

static void
resume(void)
{
    if (run.terminal.master >= 0) {
        terminal_make_raw(&run.terminal);
        terminal_follow_size(&run.terminal);
    }
    signal_group(SIGCONT);
}

/* The worker's group has nobody who watches it: SIGTSTP would do nothing to it. */
static void
suspend(void)
{
    signal_group(SIGSTOP);
    terminal_restore(&run.terminal);
    take_default(SIGTSTP); /* returns when we are continued, or at once if nobody watches us */
    resume();
}

static void
pass_on(const struct signalfd_siginfo *info)
{
    int sig = (int)info->ssi_signo;
    bool from_terminal = info->ssi_code == SI_KERNEL;
    if (sig != SIGTSTP && sig != SIGCONT && sig != SIGWINCH) {
        run.passed_on = sig;
        run.passed_on_ms = now_ms();
    }
    if (sig == SIGTSTP)
        suspend();
    else if (sig == SIGCONT)
        resume();
    else if (sig == SIGWINCH && run.terminal.master >= 0)
        terminal_follow_size(&run.terminal);
    else if (from_terminal && sig != SIGPIPE) /* it would have reached all of its group */
        signal_group(sig);
    else
        (void)syscall(SYS_pidfd_send_signal, run.pidfd, sig, NULL, 0);
}

static void
act_on(int sig)
{
    if (sig == SIGCONT || sig == SIGWINCH || sig == SIGURG)
        return;
    if (sig == SIGTSTP)
        take_default(sig);
    else
        die_of(sig);
}

static void
pass_on_signals(void)
{
    struct signalfd_siginfo info;
    run.signalled = false;
    while (read(run.signals, &info, sizeof info) == (ssize_t)sizeof info)
        pass_on(&info);
}

/* ---- the worker ------------------------------------------------------------------------ */

static _Noreturn void
end_as(int status)
{
    terminal_drain(&run.terminal);
    if (WIFSIGNALED(status))
        die_of(WTERMSIG(status));
    terminal_restore(&run.terminal);
    exit(WEXITSTATUS(status));
}

/* struct pidfd_info of linux/pidfd.h, as in Linux 6.15, which older headers lack. */
struct exit_info {
    uint64_t mask, cgroup;
    uint32_t ids[11];
    int32_t status;
};
#define EXIT_INFO _IOWR(0xff, 11, struct exit_info) /* PIDFD_GET_INFO */
#define EXIT_INFO_KNOWN (1u << 3)                   /* PIDFD_INFO_EXIT */

/* The server has not answered: of a worker that has ended the kernel may tell. */
static void
act_unanswered(void)
{
    struct exit_info end = {.mask = EXIT_INFO_KNOWN};
    struct signalfd_siginfo info;
    run.signalled = false;
    if (run.ended && ioctl(run.pidfd, EXIT_INFO, &end) == 0 && (end.mask & EXIT_INFO_KNOWN) != 0)
        end_as(end.status);
    while (read(run.signals, &info, sizeof info) == (ssize_t)sizeof info)
        act_on((int)info.ssi_signo);
    if (run.passed_on != 0)
        act_on(run.passed_on);
}

/* What came as it ended it may not have seen. The keyboard sends signals to us from now on. */
static void
note_end(void)
{
    run.ended = true;
    terminal_restore(&run.terminal);
    if (run.passed_on != 0 && now_ms() - run.passed_on_ms < UNANSWERED_MS)
        run.signalled = true;
    else
        run.passed_on = 0;
}

static void
read_answer(void)
{
    static struct run_answer answer;
    int pidfd;
    if (!run_receive(run.server, &answer, &pidfd)) {
        terminal_drain(&run.terminal);
        run_die(RUN_FAILED, "the server has gone, and the program, if it ran, was killed with it");
    }
    switch (answer.op) {
    case RUN_OP_STARTED:
        run.pid = answer.value;
        run.pidfd = pidfd;
        run.started = true;
        terminal_make_raw(&run.terminal);
        break;
    case RUN_OP_ENDED:
        end_as(answer.value);
    case RUN_OP_REFUSED:
        terminal_drain(&run.terminal);
        run_die(RUN_FAILED, "%s", answer.text);
    default:
        run_die(RUN_FAILED, "the server says %u, which means nothing here", answer.op);
    }
}

static void
type(void)
{
    struct terminal *t = &run.terminal;
    bool stop = terminal_read_input(t, run.pid);
    if (t->input_gone)
        signal_group(SIGHUP); /* as the kernel does when a terminal hangs up */
    terminal_write_input(t);
    if (stop)
        suspend();
}

enum { SERVER, WORKER, SIGNALS, KEYBOARD, SCREEN, MASTER, N_WATCHED };

static void
watch(struct pollfd *watched, int fd, int events)
{
    if (events != 0) /* else a hang-up would be told again and again */
        *watched = (struct pollfd){.fd = fd, .events = (short)events};
}

/* What to wait for; returns how long, in ms. */
static int
choose(struct pollfd fds[N_WATCHED])
{
    struct terminal *t = &run.terminal;
    for (int i = 0; i < N_WATCHED; i++)
        fds[i].fd = -1;
    watch(&fds[SERVER], run.server, POLLIN);
    if (is_alone() && run.signalled)
        return UNANSWERED_MS;
    watch(&fds[SIGNALS], run.signals, POLLIN);
    if (!is_alone())
        watch(&fds[WORKER], run.pidfd, POLLIN);
    if (t->master < 0 || !run.started)
        return -1;
    if (!t->raw && !run.ended)
        terminal_make_raw(t);
    if (t->raw && !t->input_gone)
        watch(&fds[KEYBOARD], STDIN_FILENO, t->in_size == 0 ? POLLIN : 0);
    watch(&fds[SCREEN], STDOUT_FILENO, t->out_size > 0 ? POLLOUT : 0);
    if (!t->output_gone)
        watch(&fds[MASTER], t->master,
              (t->out_size == 0 ? POLLIN : 0) | (t->in_size > 0 ? POLLOUT : 0));
    return t->raw || t->input_gone || run.ended ? -1 : BACKGROUND_MS;
}

/* One round: what can be done now. */
static void
relay(void)
{
    struct terminal *t = &run.terminal;
    struct pollfd fds[N_WATCHED];
    memset(fds, 0, sizeof fds);
    int n = poll(fds, N_WATCHED, choose(fds));
    if (n < 0)
        return;
    if (fds[WORKER].revents != 0)
        note_end();
    if (is_alone() && run.signalled && n == 0)
        act_unanswered();
    else if (is_alone() && fds[SIGNALS].revents != 0)
        run.signalled = true;
    else if (fds[SIGNALS].revents != 0)
        pass_on_signals();
    if (fds[SCREEN].revents != 0)
        terminal_write_output(t);
    if ((fds[MASTER].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && t->out_size == 0)
        terminal_read_output(t);
    if ((fds[MASTER].revents & POLLOUT) != 0 && t->in_size > 0)
        terminal_write_input(t);
    if (fds[KEYBOARD].revents != 0)
        type();
    if (fds[SERVER].revents != 0)
        read_answer();
}

int
main(int argc, char **argv)
{
    static struct run_message message;
    struct command command;
    (void)argc;
    run_take_stock(&stock);
    take_arguments(&command, argv + 1);
    run.server = run_connect(command.name); /* it looks at its own side meanwhile */
    block_signals();
    int slave = -1;
    if ((stock.terminals & 3) == 3)
        slave = terminal_open(&run.terminal);
    run_prepare(&message, &stock, command.kind, command.words, command.n_words, slave);
    run_send(run.server, &message);
    /* Our own copy of the slave stays open: a program that closes all of its own, and opens
     * /dev/tty, is not at its end. */
    for (;;)
        relay();
}
