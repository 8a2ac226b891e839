/* Texts of the stages, and how an error is filled where it is seen. */
#include "core.h"
#include "anyfork/anyfork.h"

#include <string.h>

static const char *const names[ANYFORK_STAGE_COUNT] = {
#define X(id, name, text) [ANYFORK_STAGE_##id] = name,
    ANYFORK_STAGE_MAP(X)
#undef X
};
static const char *const texts[ANYFORK_STAGE_COUNT] = {
#define X(id, name, text) [ANYFORK_STAGE_##id] = text,
    ANYFORK_STAGE_MAP(X)
#undef X
};

const char *
anyfork_stage_name(int stage)
{
    return stage >= 0 && stage < ANYFORK_STAGE_COUNT ? names[stage] : "unknown";
}

const char *
anyfork_stage_text(int stage)
{
    return stage >= 0 && stage < ANYFORK_STAGE_COUNT ? texts[stage] : "unknown";
}

int
afk_fail(struct anyfork_error *reterr, int code, int stage, int sys_errno, int line,
         const char *detail)
{
    if (reterr != NULL) {
        memset(reterr, 0, sizeof *reterr);
        reterr->code = code;
        reterr->stage = stage;
        reterr->sys_errno = sys_errno;
        reterr->line = line;
        if (detail != NULL) {
            size_t n = strnlen(detail, sizeof reterr->detail - 1);
            memcpy(reterr->detail, detail, n);
        }
    }
    return code;
}
