/*
 * A plain supervisor: keeps one program running, and takes it along when it goes.
 *
 *   cc supervisor.c $(pkg-config --cflags --libs anyfork) -o supervisor
 *   ./supervisor 3 sh -c 'echo working; sleep 1; exit 1'
 *
 * The program is started again, at most so many times, until it exits with 0. Its
 * standard input is /dev/null; what it writes to standard error is shown with its pid.
 * Kill the supervisor with -9: the program goes too.
 */
#include <anyfork/anyfork.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int
once(const char *const *argv, int *ret_status)
{
    struct anyfork_options options;
    struct anyfork_error error;
    struct anyfork_child *child;

    anyfork_options_init(&options);
    options.argv = argv;
    options.stdio[0].kind = ANYFORK_STDIO_NULL;
    options.stdio[2].kind = ANYFORK_STDIO_PIPE;
    options.session = ANYFORK_SESSION_NEW;
    options.lifeline_scope = ANYFORK_SCOPE_GROUP; /* and all that it starts */
    if (anyfork_spawn_argv(&options, &child, &error) < 0) {
        fprintf(stderr, "supervisor: %s: %s: %s\n", anyfork_stage_text(error.stage), error.detail,
                strerror(error.sys_errno));
        return -1;
    }
    FILE *complaints = fdopen(anyfork_child_take_stdio(child, 2), "r");
    char line[1024];
    while (complaints != NULL && fgets(line, sizeof line, complaints) != NULL)
        fprintf(stderr, "[%d] %s", (int)anyfork_child_pid(child), line);
    if (complaints != NULL)
        fclose(complaints);
    int r = anyfork_child_wait(child, -1, ret_status);
    anyfork_child_close(child);
    return r;
}

int
main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: supervisor TIMES PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    for (int left = atoi(argv[1]); left > 0; left--) {
        int status;
        if (once((const char *const *)argv + 2, &status) < 0)
            return 1;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            return 0;
        fprintf(stderr, "supervisor: it %s %d; %d left\n",
                WIFSIGNALED(status) ? "was killed by signal" : "exited with",
                WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), left - 1);
    }
    return 1;
}
