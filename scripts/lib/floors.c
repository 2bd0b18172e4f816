/* The floors of bench_kernels.py: memory moved, filled and read as fast as one x86-64 thread can.

   kernel_floors.py compiles this when the benchmark runs. Streaming stores bypass the caches: no
   line is read just to be overwritten. SSE2's 16 bytes at a time are enough, the memory is slower.
   "Two streams" takes turns at two places half a megabyte apart and asks for lines ahead of their
   turn: one stream of reads does not keep the memory busy. All addresses are aligned to 64. */

#include <emmintrin.h>
#include <stddef.h>
#include <string.h>

enum { LINE = 64, APART = 512 << 10, AHEAD = 1024 };

static inline void copy_line(char *to, const char *from) {
    for (int i = 0; i < LINE; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_load_si128((const __m128i *)(from + i)));
}

static inline __m128i read_line(const char *from, __m128i sum) {
    for (int i = 0; i < LINE; i += 16)
        sum = _mm_xor_si128(sum, _mm_load_si128((const __m128i *)(from + i)));
    return sum;
}

static inline void ask_for(const char *address) { _mm_prefetch(address, _MM_HINT_T0); }

void copy_plain(char *to, const char *from, size_t bytes) {
    size_t lines = bytes / LINE * LINE;
    for (size_t i = 0; i < lines; i += LINE) copy_line(to + i, from + i);
    memcpy(to + lines, from + lines, bytes - lines);
    _mm_sfence();
}

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

/* Returns something that depends on every byte of whole lines, so that all are read. */
int read_two_streams(const char *from, size_t bytes) {
    size_t pairs = bytes / (2 * APART) * (2 * APART), lines = bytes / LINE * LINE;
    __m128i first = _mm_setzero_si128(), second = first;
    for (size_t start = 0; start < pairs; start += 2 * APART)
        for (size_t i = start, j = start + APART; i < start + APART; i += LINE, j += LINE) {
            ask_for(from + i + AHEAD);
            ask_for(from + j + AHEAD);
            first = read_line(from + i, first);
            second = read_line(from + j, second);
        }
    for (size_t i = pairs; i < lines; i += LINE) first = read_line(from + i, first);
    return _mm_cvtsi128_si32(_mm_xor_si128(first, second));
}

void fill_zero(char *to, size_t bytes) {
    size_t lines = bytes / LINE * LINE;
    for (size_t i = 0; i < lines; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_setzero_si128());
    memset(to + lines, 0, bytes - lines);
    _mm_sfence();
}
