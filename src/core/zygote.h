/*
 * Between an owner, its template and the template's standbys. One build makes all three
 * ends; the version is checked all the same, for an upgrade may replace the files beneath
 * a running owner.
 *
 * Control socket (SOCK_SEQPACKET), owner and template:
 *
 *     template -> owner   HELLO   it serves from now on
 *     template -> owner   OFFER   one standby: its pid, and four descriptors: the owner's end
 *                                 of its report socket, both ends of its lifeline, a pidfd
 *     template -> owner   FAILED  a fork that was asked for was refused: errno
 *     owner -> template   WANT    n standbys, at once
 *
 * The door (SOCK_SEQPACKET) of a template that is shared, which all its workers have:
 *
 *     worker -> template  ATTACH  with the end of a control socket: the worker is an owner too
 *
 * Report socket (SOCK_STREAM), owner and standby: one START down, with the descriptors that
 * the worker needs, and a byte that confirms it, which the worker reads once it has armed its
 * lifeline, for which a detach waits, and before it runs anything of the user's; then the records
 * of report.c come up, and from the template, last of all, STATUS.
 */
#ifndef AFK_ZYGOTE_H
#define AFK_ZYGOTE_H

#include "core.h"

#define AFK_ZYGOTE_MAGIC 0x5a4b4641u /* "AFKZ" */
#define AFK_ZYGOTE_VERSION 2
#define AFK_ZYGOTE_BODY_IN_MESSAGE 65536 /* a larger one goes through a memfd(2) */
#define AFK_ZYGOTE_FDS_MAX AFK_FDS_MAX

enum afk_zygote_op {
    AFK_ZYGOTE_HELLO = 1,
    AFK_ZYGOTE_OFFER,
    AFK_ZYGOTE_FAILED,
    AFK_ZYGOTE_WANT,
    AFK_ZYGOTE_ATTACH
};

struct afk_zygote_message {
    uint32_t magic;
    uint16_t version;
    uint16_t op;
    int32_t pid;     /* OFFER */
    uint32_t number; /* WANT: how many; FAILED: errno */
    uint32_t ids[4]; /* HELLO: real and effective user, group; and what it has around it */
    struct afk_surroundings around;
    struct afk_identity identity; /* HELLO: for an owner that is a worker of the template */
};

enum { AFK_OFFER_REPORT, AFK_OFFER_LIFE_READ, AFK_OFFER_LIFE_WRITE, AFK_OFFER_PIDFD, AFK_OFFER_FDS };

/* The head of START. Its descriptors come in this order: standard streams that are open,
 * moves, then those whose has_ is set. Its body: limits, CPUs, numbers of the moves, groups,
 * cwd, name, environment, pickle. */
struct afk_start_message {
    uint32_t magic;
    uint16_t version;
    uint8_t has_memfd, has_cwd, has_cgroup, has_cgroup_kill, has_guard;
    uint8_t has_stream[3];
    uint8_t lifeline_group, guarded, has_env;
    int32_t session, process_group, fd_policy, sigint, lifeline_signal, umask, oom_score_adj, nice;
    int32_t n_groups; /* -1: keep */
    uint32_t n_moves, n_rlimits, cpus_bytes, cwd_bytes, name_bytes, n_env;
    int64_t user, group;
    uint64_t mask, ignored, defaults, guard_token;
    uint64_t env_bytes, pickle_bytes, body_bytes;
};

#endif
