/* The instruction sets: the same loops compiled for each, and a table of them.

   No compiler flags by file: functions carry the `target` attribute, so that one binary holds all
   of them and the processor's best is chosen when it is loaded. */

#define TARGET
#define LEVEL(name) name##_baseline
#include "convert.h"
#include "portable.h"
PORTABLE_SELECT(16)
PORTABLE_SELECT(32)
PORTABLE_SELECT(64)
PORTABLE_SCATTER(16)
PORTABLE_SCATTER(32)
PORTABLE_SCATTER(64)
#include "blocks.h"
SELECT_TWO(16)
SELECT_TWO(32)
SELECT_TWO(64)
PORTABLE_NONZERO(16)
PORTABLE_NONZERO(32)
PORTABLE_NONZERO(64)
#include "nonzeros.h"
#undef LEVEL
#undef TARGET

#ifdef __x86_64__

#define LEVEL_HAS_POPCNT

#define TARGET __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define LEVEL(name) name##_avx2
#include "convert.h"
#include "portable.h"
#include "avx2.h"
PORTABLE_SELECT(64)
PORTABLE_SCATTER(64)
#include "blocks.h"
SELECT_TWO(16)
SELECT_TWO(32)
SELECT_TWO(64)
SCATTER(avx2, 16)
SCATTER(avx2, 32)
PORTABLE_NONZERO(64)
#include "nonzeros.h"
#undef LEVEL
#undef TARGET

#ifdef __clang__ /* which knows no such name, and then ignores the whole attribute */
#define WHOLE_REGISTERS
#else
#define WHOLE_REGISTERS ",prefer-vector-width=512"
#endif
#define TARGET                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,bmi2,popcnt"         \
                          WHOLE_REGISTERS)))
#define LEVEL(name) name##_avx512
#include "convert.h"
#include "portable.h"
#include "avx512.h"
#include "blocks.h"
SCATTER(avx512, 16)
SCATTER(avx512, 32)
SCATTER(avx512, 64)
#include "nonzeros.h"
#undef LEVEL
#undef TARGET

#endif

typedef struct {
    const char *name;
    /* by log2 of the element size, from 2 bytes on; two only where that is faster */
    select_block *select_one[3];
    select_blocks *select_two[3];
    scatter_block *scatter[3];
    nonzero_block *nonzero[3];
    convert_run *const (*convert)[DTYPES], *const (*accumulate)[DTYPES];
} level;

#define TABLE(NAME, LEVEL, ...)                                                                    \
    {NAME,                                                                                         \
     {LEVEL(select_one_16), LEVEL(select_one_32), LEVEL(select_one_64)},                           \
     {__VA_ARGS__},                                                                                \
     {LEVEL(scatter_16), LEVEL(scatter_32), LEVEL(scatter_64)},                                    \
     {LEVEL(nonzero_block_16), LEVEL(nonzero_block_32), LEVEL(nonzero_block_64)},                  \
     LEVEL(CONVERT),                                                                               \
     LEVEL(ACCUMULATE)}
#define TWO(LEVEL) LEVEL(select_two_16), LEVEL(select_two_32), LEVEL(select_two_64)
#define BASELINE(name) name##_baseline
#define AVX2(name) name##_avx2
#define AVX512(name) name##_avx512

static const level LEVELS[] = {
    TABLE("baseline", BASELINE, TWO(BASELINE)),
#ifdef __x86_64__
    TABLE("avx2", AVX2, TWO(AVX2)),
    TABLE("avx512", AVX512, NULL),
#endif
};

/* The number of LEVELS, from the first on, that this processor runs. */
static int levels_here(void) {
#ifdef __x86_64__
    make_rows();
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt"))
        return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vbmi2"))
        return 2;
    return 3;
#else
    return 1;
#endif
}
