/*
 * anyfork-run: what it is itself, told to the server.
 *
 * Rule: what is taken is what a program that is executed now would have: it is taken before
 * anything of it is changed.
 */
#include "run.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

extern char **environ;

/* ---- what this process is ---------------------------------------------------------- */

static void
take_signals(struct run_stock *stock)
{
    struct sigaction now;
    (void)sigprocmask(SIG_SETMASK, NULL, &stock->mask);
    for (int sig = 1; sig <= 64; sig++) {
        if (sigismember(&stock->mask, sig) == 1)
            stock->mask_bits |= 1ull << (sig - 1);
        if (sigaction(sig, NULL, &now) == 0 && now.sa_handler == SIG_IGN)
            stock->ignored_bits |= 1ull << (sig - 1);
    }
}

/* A file that we open must not get the number of a stream that is closed. */
static void
take_streams(struct run_stock *stock)
{
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) >= 0) {
            stock->open_streams |= (uint8_t)(1 << fd);
            if (isatty(fd))
                stock->terminals |= (uint8_t)(1 << fd);
        }
        else if (open("/dev/null", O_RDWR | O_CLOEXEC) < 0) {
            _exit(RUN_FAILED); /* and nowhere to say why */
        }
    }
}

/* Those of bash's <(...), say. */
static void
take_descriptors(struct run_stock *stock)
{
    DIR *dir = opendir("/proc/self/fd");
    if (dir == NULL)
        run_die(RUN_FAILED, "/proc/self/fd: %s; mount /proc", strerror(errno));
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL) {
        char *end;
        long fd = strtol(entry->d_name, &end, 10);
        if (*end != '\0' || end == entry->d_name || fd < 3 || fd == dirfd(dir))
            continue;
        int flags = fcntl((int)fd, F_GETFD);
        if (flags < 0 || (flags & FD_CLOEXEC) != 0)
            continue;
        if (stock->n_fds == RUN_FDS_MAX)
            run_die(RUN_FAILED, "more than %d descriptors are open here: close some, or run python",
                    RUN_FDS_MAX);
        stock->number[stock->n_fds++] = (int32_t)fd;
    }
    (void)closedir(dir);
}

void
run_take_stock(struct run_stock *ret)
{
    memset(ret, 0, sizeof *ret);
    take_signals(ret);
    take_streams(ret);
    take_descriptors(ret);
}

/* ---- the server ---------------------------------------------------------------------- */

/* As folder() of _serve.py. */
static void
find_folder(char *to, size_t size)
{
    const char *base = getenv("XDG_RUNTIME_DIR");
    unsigned uid = (unsigned)geteuid();
    struct stat st;
    if (base != NULL && base[0] == '/') {
        if ((size_t)snprintf(to, size, "%s/anyfork", base) >= size)
            run_die(RUN_FAILED, "XDG_RUNTIME_DIR is too long");
        return;
    }
    (void)snprintf(to, size, "/run/user/%u", uid);
    if (lstat(to, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid())
        (void)snprintf(to, size, "/run/user/%u/anyfork", uid);
    else
        (void)snprintf(to, size, "/tmp/anyfork-%u", uid);
}

static _Noreturn void
no_server(const char *folder, const char *name, bool has_socket)
{
    bool other = strcmp(name, "default") != 0;
    run_die(RUN_WRONG_USAGE,
            "no server listens at %s/%s.sock.%s Start one:\n"
            "    anyfork serve --detach%s%s --preload MODULE,MODULE",
            folder, name,
            has_socket ? " If one is just starting, it listens once it has loaded its modules: wait "
                         "for `anyfork serve --detach` to return. Else it was killed."
                       : "",
            other ? " --name " : "", other ? name : "");
}

static void
check_server(int fd)
{
    struct ucred from;
    socklen_t size = sizeof from;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &from, &size) < 0)
        run_die(RUN_FAILED, "SO_PEERCRED: %s", strerror(errno));
    if (from.uid != geteuid())
        run_die(RUN_FAILED, "the server is of user %u, not yours: it is not asked", from.uid);
}

int
run_connect(const char *name)
{
    char folder[PATH_MAX];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    find_folder(folder, sizeof folder);
    int dir = open(folder, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0 && errno == ENOENT)
        no_server(folder, name, false);
    if (dir < 0)
        run_die(RUN_FAILED, "%s: %s", folder, strerror(errno));
    if (fstat(dir, &st) < 0 || st.st_uid != geteuid() || (st.st_mode & 077) != 0)
        run_die(RUN_FAILED,
                "%s must be yours alone, a folder of mode 0700: remove it, and start the server again",
                folder);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        run_die(RUN_FAILED, "socket: %s", strerror(errno));
    /* By the descriptor: of any length, and in the very folder that was looked at. */
    (void)snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s.sock", dir, name);
    int r;
    do
        r = connect(fd, (const struct sockaddr *)&address, sizeof address);
    while (r < 0 && errno == EINTR);
    if (r < 0 && (errno == ENOENT || errno == ECONNREFUSED))
        no_server(folder, name, errno == ECONNREFUSED);
    if (r < 0)
        run_die(RUN_FAILED, "%s/%s.sock: %s", folder, name, strerror(errno));
    (void)close(dir);
    check_server(fd);
    return fd;
}

/* ---- messages ---------------------------------------------------------------------------- */

static void
write_all(int fd, const char *data, size_t size)
{
    while (size > 0) {
        ssize_t n = write(fd, data, size);
        if (n < 0 && errno != EINTR)
            run_die(RUN_FAILED, "memfd: %s", strerror(errno));
        if (n > 0) {
            data += n;
            size -= (size_t)n;
        }
    }
}

/* In pieces, for there are many and they are short; `text` NULL: the last one. */
static void
put(int fd, const char *text, uint64_t *ret_size)
{
    static char piece[16384];
    static size_t at;
    size_t size = text != NULL ? strlen(text) + 1 : 0;
    if (text == NULL || size > sizeof piece - at) {
        write_all(fd, piece, at);
        at = 0;
    }
    *ret_size += size;
    if (size > sizeof piece)
        write_all(fd, text, size);
    else if (size > 0) {
        memcpy(piece + at, text, size);
        at += size;
    }
}

/* Sealed, so that the server can read it without waiting for anybody. */
static int
make_body(struct run_request *request, char *const *words, unsigned n_words)
{
    int fd = memfd_create("anyfork-run", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        run_die(RUN_FAILED, "memfd_create: %s", strerror(errno));
    for (unsigned i = 0; i < n_words; i++)
        put(fd, words[i], &request->body_bytes);
    for (; environ[request->n_env] != NULL; request->n_env++)
        put(fd, environ[request->n_env], &request->body_bytes);
    put(fd, NULL, &request->body_bytes);
    request->n_words = n_words;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0)
        run_die(RUN_FAILED, "F_ADD_SEALS: %s", strerror(errno));
    return fd;
}

static void
put_numbers(struct run_request *request, const struct run_stock *stock)
{
    mode_t mask = umask(0);
    (void)umask(mask);
    request->umask = mask;
    errno = 0;
    request->nice = getpriority(PRIO_PROCESS, 0);
    request->mask = stock->mask_bits;
    request->ignored = stock->ignored_bits;
    for (int i = 0; i < RUN_LIMITS; i++) {
        struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
        if (getrlimit((__rlimit_resource_t)i, &limit) < 0)
            run_die(RUN_FAILED, "getrlimit: %s", strerror(errno));
        request->limit[i][0] = limit.rlim_cur;
        request->limit[i][1] = limit.rlim_max;
    }
}

static void
send_all(int server, const struct run_request *request, const int *fds, unsigned n_fds)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE((RUN_FDS_MAX + 5) * sizeof(int))];
    } control;
    struct iovec vec = {(void *)(uintptr_t)request, sizeof *request};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = CMSG_SPACE(n_fds * sizeof(int))};
    memset(&control, 0, sizeof control);
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(n_fds * sizeof(int));
    memcpy(CMSG_DATA(&control.header), fds, n_fds * sizeof(int));
    /* It bounds all that its user has in flight, of which standbys are a part, unix(7). */
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    ssize_t n;
    do
        n = sendmsg(server, &msg, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
        return; /* it has refused us unheard, and we hear why */
    if (n < 0 && errno == ETOOMANYREFS)
        run_die(RUN_FAILED, "more descriptors of yours are on their way between processes than the "
                            "hard limit of open files allows: raise it (ulimit -Hn)");
    if (n < 0)
        run_die(RUN_FAILED, "the server cannot be told what to run: %s", strerror(errno));
}

void
run_prepare(struct run_message *ret, const struct run_stock *stock, char kind, char *const *words,
            unsigned n_words, int terminal)
{
    struct run_request *request = &ret->request;
    *request = (struct run_request){
        .magic = RUN_MAGIC, .version = RUN_VERSION, .op = RUN_OP_RUN, .kind = kind};
    put_numbers(request, stock);
    request->streams = stock->open_streams;
    if (terminal >= 0)
        request->terminal = stock->terminals;
    ret->n_fds = 0;
    ret->fds[ret->n_fds++] = make_body(request, words, n_words);
    ret->fds[ret->n_fds++] = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (ret->fds[1] < 0)
        run_die(RUN_FAILED, "the working directory: %s", strerror(errno));
    for (int fd = 0; fd < 3; fd++)
        if ((request->streams >> fd & 1) != 0)
            ret->fds[ret->n_fds++] = (request->terminal >> fd & 1) != 0 ? terminal : fd;
    for (unsigned i = 0; i < stock->n_fds; i++) {
        request->number[i] = stock->number[i];
        ret->fds[ret->n_fds++] = stock->number[i];
    }
    request->n_fds = stock->n_fds;
}

void
run_send(int server, const struct run_message *message)
{
    send_all(server, &message->request, message->fds, message->n_fds);
    (void)close(message->fds[0]);
    (void)close(message->fds[1]);
}

static int
take_descriptor(struct msghdr *msg)
{
    int found = -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL; c = CMSG_NXTHDR(msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS &&
            c->cmsg_len == CMSG_LEN(sizeof found))
            memcpy(&found, CMSG_DATA(c), sizeof found);
    return found;
}

bool
run_receive(int server, struct run_answer *ret, int *ret_pidfd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))]; /* no room for more than one */
    } control;
    struct iovec vec = {ret, sizeof *ret - 1};
    struct msghdr msg = {.msg_iov = &vec,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof control};
    ssize_t n;
    int resets = 0;
    /* A reset, by a server that closes what it has not read, comes before what it said. */
    do
        n = recvmsg(server, &msg, MSG_CMSG_CLOEXEC);
    while (n < 0 && (errno == EINTR || (errno == ECONNRESET && resets++ == 0)));
    if (n <= 0)
        return false;
    *ret_pidfd = take_descriptor(&msg);
    if (n < (ssize_t)offsetof(struct run_answer, text) || ret->magic != RUN_MAGIC)
        run_die(RUN_FAILED, "the server does not speak as one does: is it of another version?");
    if (ret->version != RUN_VERSION)
        run_die(RUN_FAILED, "the server is of another version: anyfork serve --stop, and start it");
    ((char *)ret)[n] = '\0';
    return true;
}
