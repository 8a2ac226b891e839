/*
 * What the C tests share: a leak check around every test, waits that end, and
 * workers started by hand as the layers above start them.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "anyfork/anyfork.h"
#include "core/core.h"

#define TEST_SECONDS 120             /* one test; then SIGALRM ends the program */
#define WAIT_NS ((int64_t)60 * 1000000000)

/* One row of the table of tests, with the leak check. */
#define CHECKED(test) cmocka_unit_test_setup_teardown(test, harness_begin, harness_end)
int harness_begin(void **state);
int harness_end(void **state); /* same fds as before, no child left */

int count_fds(void);
bool fd_is_open(int fd);
/* Waits for POLLIN or a hang-up; fails the test after a minute. */
void wait_readable(int fd);
/* A wait status of our child; fails the test if it does not come. */
int reap(pid_t pid);
_Noreturn void pause_for_ever(void); /* SIGALRM is the bound */

/* A lifeline, and no descriptors of its own. */
static const struct afk_child_wants ordinary_worker = {.lowest = 3, .lifeline = true};

/* Runs in the worker; its value is the exit code. */
typedef int (*worker_body)(const struct afk_plan *plan, void *arg);

/* afk_child_new, afk_fork, afk_child_adopt: a worker with default dispositions
 * and an empty mask. */
struct anyfork_child *start_worker(worker_body body, void *arg);
/* A body: the records of a worker that ends well. */
void send_record(int fd, int kind, int value, const void *payload, size_t size);

/* A semaphore that processes share. */
struct gate;
struct gate *gate_new(void);
void gate_open(struct gate *gate);
void gate_wait(struct gate *gate); /* ends the process by SIGALRM at the latest */
void gate_free(struct gate *gate);

#endif
