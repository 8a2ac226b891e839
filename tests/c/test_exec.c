/* Programs by the public API alone: options, failures, standard streams, lifeline. */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})

static struct anyfork_child *
start(const struct anyfork_options *options)
{
    struct anyfork_error error = {0};
    struct anyfork_child *child = NULL;
    int r = anyfork_spawn_argv(options, &child, &error);
    if (r < 0)
        fail_msg("%s: %s: errno %d", anyfork_stage_name(error.stage), error.detail, error.sys_errno);
    assert_non_null(child);
    return child;
}

static void
prepare(struct anyfork_options *options, const char *const *argv)
{
    anyfork_options_init(options);
    options->argv = argv;
}

static int
status_of(struct anyfork_child *child)
{
    int status = -1;
    assert_int_equal(anyfork_child_wait(child, WAIT_NS, &status), 0);
    anyfork_child_close(child);
    return status;
}

/* What sh(1) says, and its exit code. */
static int
shell(struct anyfork_options *options, const char *script, char *ret_text, size_t size)
{
    const char *const argv[] = {"sh", "-c", script, NULL};
    options->argv = argv;
    options->stdio[1].kind = ANYFORK_STDIO_PIPE;
    struct anyfork_child *child = start(options);
    int fd = anyfork_child_take_stdio(child, 1);
    assert_true(fd >= 0);
    assert_int_equal(anyfork_child_take_stdio(child, 1), -1);
    size_t have = 0;
    ssize_t n;
    while (have + 1 < size && (n = read(fd, ret_text + have, size - 1 - have)) > 0)
        have += (size_t)n;
    ret_text[have] = '\0';
    (void)close(fd);
    return status_of(child);
}

static void
test_runs_and_ends(void **state)
{
    struct anyfork_options options;
    char text[4096];
    (void)state;
    prepare(&options, WORDS("true"));
    assert_int_equal(status_of(start(&options)), 0);
    prepare(&options, WORDS("/bin/sh", "-c", "exit 7"));
    assert_int_equal(WEXITSTATUS(status_of(start(&options))), 7);
    anyfork_options_init(&options);
    assert_int_equal(shell(&options, "kill -KILL $$", text, sizeof text), SIGKILL);
}

static void
test_options_arrive(void **state)
{
    struct anyfork_options options;
    const struct anyfork_rlimit core = {RLIMIT_CORE, 0, 512};
    const uint32_t cpu = 0;
    char text[4096];
    (void)state;
    anyfork_options_init(&options);
    options.cwd = "/usr";
    options.umask = 0123;
    options.env = WORDS("PATH=/bin:/usr/bin", "A=b");
    options.rlimits = &core;
    options.n_rlimits = 1;
    options.cpus = &cpu;
    options.n_cpus = 1;
    options.nice = 1;
    options.oom_score_adj = 7;
    options.name = "called";
    options.session = ANYFORK_SESSION_NEW;
    int status = shell(&options,
                       "pwd; umask; echo $A $0; ulimit -Hc; cat /proc/self/oom_score_adj;"
                       "[ $$ = $(cut -d' ' -f6 /proc/$$/stat) ] && echo leader",
                       text, sizeof text);
    assert_int_equal(status, 0);
    assert_string_equal(text, "/usr\n0123\nb called\n1\n7\nleader\n");
}

static void
test_nothing_is_inherited_but_what_is_listed(void **state)
{
    struct anyfork_options options;
    char text[4096];
    (void)state;
    int pipes[2];
    assert_int_equal(pipe(pipes), 0); /* without O_CLOEXEC */
    anyfork_options_init(&options);
    assert_int_equal(shell(&options, "echo /proc/self/fd/*", text, sizeof text), 0);
    assert_string_equal(text, "/proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 /proc/self/fd/3\n");

    const struct anyfork_fd fds[] = {{pipes[0], pipes[1]}, {pipes[1], pipes[0]}, {pipes[0], 60}};
    anyfork_options_init(&options);
    options.fds = fds;
    options.n_fds = 3;
    char script[200];
    assert_true(pipes[0] < 10 && pipes[1] < 10); /* of sh(1), more than a digit is a word */
    (void)snprintf(script, sizeof script, "echo x >&%d; read a <&%d; echo $a", pipes[0], pipes[1]);
    assert_int_equal(shell(&options, script, text, sizeof text), 0);
    assert_string_equal(text, "x\n");

    anyfork_options_init(&options);
    options.fd_policy = ANYFORK_FDS_INHERIT;
    (void)snprintf(script, sizeof script, "[ -e /proc/self/fd/%d ] && echo there", pipes[0]);
    assert_int_equal(shell(&options, script, text, sizeof text), 0);
    assert_string_equal(text, "there\n");
    (void)close(pipes[0]);
    (void)close(pipes[1]);
}

static void
test_standard_streams(void **state)
{
    struct anyfork_options options;
    char path[] = "/tmp/anyfork-test-XXXXXX", text[100] = "";
    (void)state;
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    prepare(&options, WORDS("sh", "-c", "cat; echo err >&2"));
    options.stdio[0].kind = ANYFORK_STDIO_PIPE;
    options.stdio[1] = (struct anyfork_stdio){
        .kind = ANYFORK_STDIO_FILE, .path = path, .flags = O_WRONLY | O_APPEND};
    options.stdio[2].kind = ANYFORK_STDIO_STDOUT;
    struct anyfork_child *child = start(&options);
    int in = anyfork_child_take_stdio(child, 0);
    assert_int_equal(write(in, "in\n", 3), 3);
    (void)close(in);
    assert_int_equal(status_of(child), 0);
    assert_int_equal(read(fd, text, sizeof text - 1), 7);
    assert_string_equal(text, "in\nerr\n");

    prepare(&options, WORDS("cat"));
    options.stdio[0].kind = ANYFORK_STDIO_NULL;
    options.stdio[1] = (struct anyfork_stdio){.kind = ANYFORK_STDIO_FD, .fd = fd};
    assert_int_equal(status_of(start(&options)), 0);
    (void)unlink(path);
    (void)close(fd);
    /* Not taken: closed with the handle, as the leak check sees. */
    prepare(&options, WORDS("true"));
    for (int i = 0; i < 3; i++)
        options.stdio[i].kind = ANYFORK_STDIO_PIPE;
    assert_int_equal(status_of(start(&options)), 0);
}

static void
refused(struct anyfork_options *options, int code, int stage, int errnum, const char *detail)
{
    struct anyfork_error error = {0};
    struct anyfork_child *child = NULL;
    int r = anyfork_spawn_argv(options, &child, &error);
    assert_null(child);
    if (r != code || error.stage != stage || error.sys_errno != errnum ||
        strncmp(error.detail, detail, strlen(detail)) != 0)
        fail_msg("%d, stage %s, errno %d, %s; and not %d, %s, %d, %s", r,
                 anyfork_stage_name(error.stage), error.sys_errno, error.detail, code,
                 anyfork_stage_name(stage), errnum, detail);
    assert_int_equal(error.code, code);
}

static void
test_failures_have_stage_and_errno(void **state)
{
    struct anyfork_options options;
    (void)state;
    prepare(&options, WORDS("no-such-program"));
    refused(&options, ANYFORK_ESYSTEM, ANYFORK_STAGE_EXEC, ENOENT, "no-such-program");
    prepare(&options, WORDS("/etc/passwd"));
    refused(&options, ANYFORK_ESYSTEM, ANYFORK_STAGE_EXEC, EACCES, "/etc/passwd");
    prepare(&options, WORDS("true"));
    options.cwd = "/no/such/folder";
    refused(&options, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, ENOENT, "cwd");
    prepare(&options, WORDS("true"));
    options.stdio[0] = (struct anyfork_stdio){.kind = ANYFORK_STDIO_FILE, .path = "/no/such/file"};
    refused(&options, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, ENOENT, "stdin");
    prepare(&options, WORDS("true"));
    options.guard = true; /* not beside this program */
    struct anyfork_error error;
    struct anyfork_child *child = NULL;
    assert_int_equal(anyfork_spawn_argv(&options, &child, &error), ANYFORK_ESYSTEM);
    assert_int_equal(error.stage, ANYFORK_STAGE_EXEC);
    assert_non_null(strstr(error.detail, "anyfork-guard"));
    prepare(&options, WORDS("true"));
    options.session = ANYFORK_SESSION_GROUP;
    options.process_group = 4000000;
    refused(&options, ANYFORK_ESYSTEM, ANYFORK_STAGE_OPTION, EPERM, "process_group");
}

static void
test_bad_members_are_named(void **state)
{
    struct anyfork_options o;
    (void)state;
#define BAD(member, value, detail)                                                        \
    do {                                                                                  \
        prepare(&o, WORDS("true"));                                                       \
        o.member = value;                                                                 \
        refused(&o, ANYFORK_EINVAL, ANYFORK_STAGE_ARGUMENT, 0, detail);                    \
    } while (0)
    BAD(size, 8, "size");
    BAD(argv, NULL, "argv");
    BAD(program, "", "argv");
    BAD(umask, 01000, "umask");
    BAD(user, -2, "user");
    BAD(user, 0xffffffffll, "user");
    BAD(group, -2, "group");
    BAD(n_groups, 1, "groups");
    BAD(n_groups, 1 << 20, "n_groups");
    BAD(n_rlimits, 1, "rlimits");
    BAD(nice, 41, "nice");
    BAD(n_cpus, 1, "cpus");
    BAD(cgroup, "/tmp", "cgroup");
    BAD(oom_score_adj, 1001, "oom_score_adj");
    BAD(name, "", "name");
    BAD(cwd, "", "cwd");
    BAD(session, 9, "session");
    BAD(process_group, 7, "process_group");
    BAD(stdio[0].kind, 99, "stdin");
    BAD(stdio[1].kind, ANYFORK_STDIO_FILE, "stdout");
    BAD(stdio[1].kind, ANYFORK_STDIO_STDOUT, "stdout");
    BAD(stdio[2], ((struct anyfork_stdio){.kind = ANYFORK_STDIO_FD, .fd = 999}), "stderr");
    BAD(n_fds, 1, "fds");
    BAD(fd_policy, ANYFORK_FDS_TOMBSTONE, "fd_policy");
    BAD(fd_policy, 9, "fd_policy");
    BAD(sigint, 9, "sigint");
    BAD(lifeline_signal, 1000, "lifeline_signal");
    BAD(lifeline_scope, 9, "lifeline_scope");
    BAD(lifeline_scope, ANYFORK_SCOPE_GROUP, "lifeline_scope");
    assert_int_equal(anyfork_spawn_argv(NULL, NULL, NULL), ANYFORK_EINVAL);
}

static int fork_handlers_run;

static void
fork_handler(void)
{
    fork_handlers_run++;
}

static void
test_no_fork_handler_runs(void **state)
{
    struct anyfork_options options;
    (void)state;
    assert_int_equal(pthread_atfork(fork_handler, fork_handler, fork_handler), 0);
    prepare(&options, WORDS("true"));
    assert_int_equal(status_of(start(&options)), 0);
    assert_int_equal(fork_handlers_run, 0);
}

static volatile sig_atomic_t usr1;

static void
on_usr1(int sig)
{
    (void)sig;
    usr1++;
}

/* A handler of the owner never runs in the child, which shares its memory. */
static void
test_signals_stay_the_owners(void **state)
{
    struct anyfork_options options;
    sigset_t before, after, block;
    char text[8192];
    (void)state;
    struct sigaction action = {.sa_handler = on_usr1}, old;
    assert_int_equal(sigaction(SIGUSR1, &action, &old), 0);
    (void)sigemptyset(&block);
    (void)sigaddset(&block, SIGUSR2);
    (void)pthread_sigmask(SIG_BLOCK, &block, NULL);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &before);
    anyfork_options_init(&options);
    assert_int_equal(shell(&options, "cat /proc/self/status", text, sizeof text), 0);
    assert_non_null(strstr(text, "SigBlk:\t0000000000000000"));
    assert_non_null(strstr(text, "SigCgt:\t0000000000000000"));
    (void)pthread_sigmask(SIG_SETMASK, NULL, &after);
    assert_memory_equal(&before, &after, 8);
    for (int i = 0; i < 20; i++) {
        prepare(&options, WORDS("true"));
        (void)kill(getpid(), SIGUSR1);
        assert_int_equal(status_of(start(&options)), 0);
    }
    assert_int_equal(usr1, 20);
    (void)pthread_sigmask(SIG_UNBLOCK, &block, NULL);
    (void)sigaction(SIGUSR1, &old, NULL);
}

/* In an owner of its own, which ends at once. */
static int
owner_main(const struct afk_plan *plan, void *arg)
{
    const char *how = arg;
    struct anyfork_options options;
    struct anyfork_child *child = NULL;
    prepare(&options, WORDS("sleep", "1000"));
    if (strcmp(how, "off") == 0)
        options.lifeline_signal = 0;
    if (anyfork_spawn_argv(&options, &child, NULL) < 0)
        return 1;
    if (strcmp(how, "detach") == 0 && anyfork_child_detach(child) < 0)
        return 2;
    send_record(plan->status_fd, AFK_REPORT_EXIT, anyfork_child_pid(child) & 0xff, NULL, 0);
    pid_t pid = anyfork_child_pid(child);
    send_record(plan->status_fd, AFK_REPORT_RESULT, 0, &pid, sizeof pid);
    return 0;
}

/* Or a zombie of whoever is the parent of orphans here. */
static bool
is_gone(pid_t pid)
{
    char path[64], text[512];
    (void)snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return true;
    ssize_t n = read(fd, text, sizeof text - 1);
    (void)close(fd);
    text[n > 0 ? n : 0] = '\0';
    const char *end = strrchr(text, ')');
    return end == NULL || end[2] == 'Z' || end[2] == 'X';
}

static void
test_the_program_ends_with_its_owner(void **state)
{
    static const struct { const char *how; bool lives; } cases[] = {
        {"on", false}, {"off", true}, {"detach", true}};
    (void)state;
    for (unsigned i = 0; i < 3; i++) {
        for (int round = 0; round < 20; round++) {
            struct anyfork_child *owner = start_worker(owner_main, (void *)(uintptr_t)cases[i].how);
            struct afk_child_view view;
            assert_int_equal(anyfork_child_wait(owner, WAIT_NS, NULL), 0);
            afk_child_view(owner, &view);
            assert_int_equal(view.payload_size, sizeof(pid_t));
            pid_t pid;
            memcpy(&pid, view.payload, sizeof pid);
            anyfork_child_close(owner);
            bool alive = true;
            for (int tries = 0; tries < 2000 && alive; tries++) {
                (void)usleep(1000);
                alive = !is_gone(pid);
                if (cases[i].lives && tries > 5)
                    break;
            }
            assert_int_equal(alive, cases[i].lives);
            if (alive)
                (void)kill(pid, SIGKILL);
        }
    }
}

static void *
start_many(void *arg)
{
    struct anyfork_options options;
    char text[200];
    for (int i = 0; i < 25; i++) {
        anyfork_options_init(&options);
        if (shell(&options, "echo /proc/self/fd/*", text, sizeof text) != 0 ||
            strcmp(text, "/proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 /proc/self/fd/3\n") != 0)
            return arg; /* not NULL: wrong */
    }
    return NULL;
}

static void
test_from_many_threads(void **state)
{
    pthread_t threads[8];
    (void)state;
    for (int i = 0; i < 8; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, start_many, &threads), 0);
    for (int i = 0; i < 8; i++) {
        void *bad;
        assert_int_equal(pthread_join(threads[i], &bad), 0);
        assert_null(bad);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        CHECKED(test_runs_and_ends),
        CHECKED(test_options_arrive),
        CHECKED(test_nothing_is_inherited_but_what_is_listed),
        CHECKED(test_standard_streams),
        CHECKED(test_failures_have_stage_and_errno),
        CHECKED(test_bad_members_are_named),
        CHECKED(test_no_fork_handler_runs),
        CHECKED(test_signals_stay_the_owners),
        CHECKED(test_the_program_ends_with_its_owner),
        CHECKED(test_from_many_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
