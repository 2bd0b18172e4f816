/* The floors of bench_kernels.py: memory copied, filled and read as fast as one x86-64 thread can.

   kernel_floors.py compiles this when the benchmark runs, and takes the fastest of each kind that
   the processor has. Streaming stores bypass the caches: no line is read just to be overwritten.
   "Two streams" takes turns at two places half a megabyte apart and asks for lines ahead of their
   turn: Zen 3 wants that, on Zen 5 one stream is faster, and 64 bytes at a time faster than 16.
   "Asked for ahead" is one such stream whose lines are asked for further ahead.
   All addresses are aligned to 64. */

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

enum { LINE = 64, APART = 512 << 10, AHEAD = 1024, FAR_AHEAD = 4096 };

#define WIDE __attribute__((target("avx512f")))

int has_wide(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f");
}

static inline void copy_line(char *to, const char *from) {
    for (int i = 0; i < LINE; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_load_si128((const __m128i *)(from + i)));
}

static inline void ask_for(const char *address) { _mm_prefetch(address, _MM_HINT_T0); }

static inline WIDE void copy_line_wide(char *to, const char *from) {
    _mm512_stream_si512((void *)to, _mm512_load_si512(from));
}

static inline WIDE void copy_line_ahead(char *to, const char *from) {
    ask_for(from + FAR_AHEAD);
    copy_line_wide(to, from);
}

static inline __m128i read_line(const char *from, __m128i sum) {
    for (int i = 0; i < LINE; i += 16)
        sum = _mm_xor_si128(sum, _mm_load_si128((const __m128i *)(from + i)));
    return sum;
}

/* --- copies ---------------------------------------------------------------------------------- */

#define COPY(NAME, ATTRIBUTE, COPY_LINE)                                                           \
    ATTRIBUTE void NAME(char *to, const char *from, size_t bytes) {                                \
        size_t lines = bytes / LINE * LINE;                                                        \
        for (size_t i = 0; i < lines; i += LINE) COPY_LINE(to + i, from + i);                      \
        memcpy(to + lines, from + lines, bytes - lines);                                           \
        _mm_sfence();                                                                              \
    }

COPY(copy_plain, , copy_line)
COPY(copy_wide, WIDE, copy_line_wide)
COPY(copy_ahead, WIDE, copy_line_ahead)

void copy_two_streams(char *to, const char *from, size_t bytes) {
    size_t pairs = bytes / (2 * APART) * (2 * APART);
    for (size_t start = 0; start < pairs; start += 2 * APART)
        for (size_t i = start, j = start + APART; i < start + APART; i += LINE, j += LINE) {
            ask_for(from + i + AHEAD);
            ask_for(from + j + AHEAD);
            copy_line(to + i, from + i);
            copy_line(to + j, from + j);
        }
    copy_plain(to + pairs, from + pairs, bytes - pairs);
}

/* --- fills ----------------------------------------------------------------------------------- */

/* Over and over with the same `period` bytes, a multiple of LINE, from the first-level cache. */
#define FILL(NAME, ATTRIBUTE, COPY_LINE)                                                           \
    ATTRIBUTE void NAME(char *to, size_t bytes, const char *with, size_t period) {                 \
        size_t lines = bytes / LINE * LINE, at = 0;                                                \
        for (size_t i = 0; i < lines; i += LINE) {                                                 \
            COPY_LINE(to + i, with + at);                                                          \
            at = at + LINE == period ? 0 : at + LINE;                                              \
        }                                                                                          \
        memcpy(to + lines, with + at, bytes - lines);                                              \
        _mm_sfence();                                                                              \
    }

FILL(fill_plain, , copy_line)
FILL(fill_wide, WIDE, copy_line_wide)

/* --- reads: something that depends on every byte of whole lines, so that all are read -------- */

int read_plain(const char *from, size_t bytes) {
    size_t lines = bytes / LINE * LINE;
    __m128i sum = _mm_setzero_si128();
    for (size_t i = 0; i < lines; i += LINE) sum = read_line(from + i, sum);
    return _mm_cvtsi128_si32(sum);
}

WIDE int read_wide(const char *from, size_t bytes) {
    size_t lines = bytes / LINE * LINE;
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < lines; i += LINE)
        sum = _mm512_xor_si512(sum, _mm512_load_si512(from + i));
    return _mm512_reduce_or_epi32(sum);
}

WIDE int read_ahead(const char *from, size_t bytes) {
    size_t lines = bytes / LINE * LINE;
    __m512i sum = _mm512_setzero_si512();
    for (size_t i = 0; i < lines; i += LINE) {
        ask_for(from + i + FAR_AHEAD);
        sum = _mm512_xor_si512(sum, _mm512_load_si512(from + i));
    }
    return _mm512_reduce_or_epi32(sum);
}

int read_two_streams(const char *from, size_t bytes) {
    size_t pairs = bytes / (2 * APART) * (2 * APART);
    __m128i first = _mm_setzero_si128(), second = first;
    for (size_t start = 0; start < pairs; start += 2 * APART)
        for (size_t i = start, j = start + APART; i < start + APART; i += LINE, j += LINE) {
            ask_for(from + i + AHEAD);
            ask_for(from + j + AHEAD);
            first = read_line(from + i, first);
            second = read_line(from + j, second);
        }
    return _mm_cvtsi128_si32(_mm_xor_si128(first, second)) ^
           read_plain(from + pairs, bytes - pairs);
}
