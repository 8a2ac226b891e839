/* What the C tests share. */
#include "harness.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int fds_before;

int
count_fds(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while (readdir(dir) != NULL)
        n++;
    (void)closedir(dir);
    return n;
}

bool
fd_is_open(int fd)
{
    return fcntl(fd, F_GETFD) >= 0;
}

int
harness_begin(void **state)
{
    (void)state;
    (void)alarm(TEST_SECONDS);
    fds_before = count_fds();
    return 0;
}

int
harness_end(void **state)
{
    (void)state;
    (void)alarm(0);
    int after = count_fds();
    if (after != fds_before) {
        (void)fprintf(stderr, "leak: %d fds before, %d after\n", fds_before, after);
        return -1;
    }
    pid_t left = waitpid(-1, NULL, WNOHANG);
    if (left >= 0 || errno != ECHILD) {
        (void)fprintf(stderr, "leak: a child is left (waitpid: %d)\n", (int)left);
        return -1;
    }
    return 0;
}

void
wait_readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    int r;
    do
        r = poll(&p, 1, 60000);
    while (r < 0 && errno == EINTR);
    assert_int_equal(r, 1);
}

int
reap(pid_t pid)
{
    int status = -1;
    pid_t r;
    do
        r = waitpid(pid, &status, 0); /* alarm() bounds it */
    while (r < 0 && errno == EINTR);
    assert_int_equal(r, pid);
    return status;
}

void
pause_for_ever(void)
{
    for (;;)
        (void)pause();
}

struct anyfork_child *
start_worker(worker_body body, void *arg)
{
    struct anyfork_error error = {0};
    struct anyfork_child *child = NULL;
    struct afk_plan plan;

    afk_plan_init(&plan);
    assert_int_equal(afk_child_new(&child, &plan, &ordinary_worker, &error), 0);
    plan.dispositions = AFK_DISPOSITIONS_DEFAULT;
    plan.keep_mask = false;
    pid_t pid = afk_fork(&plan);
    if (pid == 0) {
        (void)alarm(TEST_SECONDS);
        _exit(body(&plan, arg));
    }
    assert_true(pid > 0);
    assert_int_equal(afk_child_adopt(child, pid, &plan, &error), 0);
    assert_int_equal(anyfork_child_pid(child), pid);
    return child;
}

void
send_record(int fd, int kind, int value, const void *payload, size_t size)
{
    struct afk_report report = {.magic = AFK_REPORT_MAGIC,
                                .kind = (uint16_t)kind,
                                .value = value,
                                .payload_bytes = size};
    if (afk_report_write(fd, &report) < 0 || (payload != NULL && afk_os_write_all(fd, payload, size) < 0))
        _exit(99);
}

struct gate {
    sem_t sem;
};

struct gate *
gate_new(void)
{
    struct gate *gate = mmap(NULL, sizeof *gate, PROT_READ | PROT_WRITE,
                             MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(gate, MAP_FAILED);
    assert_int_equal(sem_init(&gate->sem, 1, 0), 0);
    return gate;
}

void
gate_open(struct gate *gate)
{
    (void)sem_post(&gate->sem);
}

void
gate_wait(struct gate *gate)
{
    while (sem_wait(&gate->sem) < 0 && errno == EINTR)
        ;
}

void
gate_free(struct gate *gate)
{
    (void)munmap(gate, sizeof *gate);
}
