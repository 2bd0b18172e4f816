/* Select and scatter in portable C, by counting trailing zeros.

   select_word: packed = the entries of `dense` whose bits are set; returns where the next go.
   scatter_block: dense = the values of `packed` where bits are set, zeros elsewhere; returns how
   many. With `stream`, `dense` is aligned to 64 bytes and bypasses the caches.
   nonzero_word: the word whose bits are set where entries have any bit set.

   `packed` has room for SLACK bytes more than the values, which may be read and written. Positions
   come eight at a time with no branch between them: at density 0.1 a word of 64 bits holds six or
   seven, and a mispredicted branch costs more than two superfluous moves.

   Included once per instruction set: see convert.h. */

#ifndef SPARSE_COMM_PORTABLE
#define SPARSE_COMM_PORTABLE

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { BLOCK = 4096, WORD = 64, WORDS = BLOCK / WORD, SLACK = 64 };

static inline uint64_t load_word(const unsigned char *bits, size_t i) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    uint64_t word = 0;
    for (int b = 7; b >= 0; b--) word = word << 8 | bits[8 * i + b];
    return word;
#else
    uint64_t word;
    memcpy(&word, bits + 8 * i, sizeof word);
    return word;
#endif
}

static inline void store_word(unsigned char *bits, size_t i, uint64_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    for (int b = 0; b < 8; b++) bits[8 * i + b] = (unsigned char)(word >> 8 * b);
#else
    memcpy(bits + 8 * i, &word, sizeof word);
#endif
}

/* Copies a multiple of 64 bytes between aligned places, past the caches where that is possible. */
static inline void copy_streaming(void *restrict to, const void *restrict from, size_t bytes) {
#ifdef __SSE2__
    for (size_t i = 0; i < bytes / 16; i++)
        _mm_stream_si128((__m128i *)to + i, _mm_load_si128((const __m128i *)from + i));
#else
    memcpy(to, from, bytes);
#endif
}

#endif

static inline TARGET unsigned LEVEL(count_ones)(uint64_t word) {
#if defined(__x86_64__) && !defined(LEVEL_HAS_POPCNT)
    word -= (word >> 1) & 0x5555555555555555u; /* without the instruction the builtin is a call */
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    return (unsigned)((((word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u) >> 56);
#else
    return (unsigned)__builtin_popcountll(word);
#endif
}

/* The position of the lowest one, or `none`. */
static inline TARGET unsigned LEVEL(lowest)(uint64_t word, unsigned none) {
    return word ? (unsigned)__builtin_ctzll(word) : none;
}

#define PORTABLE_SELECT(BITS)                                                                      \
    static inline TARGET uint##BITS##_t *LEVEL(select_word_##BITS)(                                \
        uint##BITS##_t *restrict packed, const uint##BITS##_t *restrict dense, uint64_t word) {    \
        unsigned ones = LEVEL(count_ones)(word);                                                   \
        for (unsigned done = 0; done < ones; done += 8)                                            \
            for (unsigned j = 0; j < 8; j++, word &= word - 1)                                     \
                packed[done + j] = dense[LEVEL(lowest)(word, 0)];                                  \
        return packed + ones;                                                                      \
    }

/* Each word is zeroed just before its values come: what the one before spilled is gone then. */
#define PORTABLE_SCATTER(BITS)                                                                     \
    static TARGET size_t LEVEL(scatter_##BITS)(void *restrict dense, const void *restrict packed,  \
                                               const unsigned char *bits, size_t words,            \
                                               int stream) {                                       \
        _Alignas(64) uint##BITS##_t block[BLOCK + WORD];                                           \
        const uint##BITS##_t *in = packed;                                                         \
        for (size_t i = 0; i < words; i++) {                                                       \
            uint##BITS##_t *out = block + i * WORD;                                                \
            uint64_t word = load_word(bits, i);                                                    \
            unsigned ones = LEVEL(count_ones)(word);                                               \
            memset(out, 0, WORD * sizeof *out);                                                    \
            for (unsigned done = 0; done < ones; done += 8)                                        \
                for (unsigned j = 0; j < 8; j++, word &= word - 1)                                 \
                    out[LEVEL(lowest)(word, WORD)] = in[done + j];                                 \
            in += ones;                                                                            \
        }                                                                                          \
        if (stream)                                                                                \
            copy_streaming(dense, block, words * WORD * sizeof *block);                            \
        else                                                                                       \
            memcpy(dense, block, words * WORD * sizeof *block);                                    \
        return (size_t)(in - (const uint##BITS##_t *)packed);                                      \
    }

#define PORTABLE_NONZERO(BITS)                                                                     \
    static inline TARGET uint64_t LEVEL(nonzero_word_##BITS)(const uint##BITS##_t *entries) {      \
        uint64_t word = 0;                                                                         \
        for (unsigned i = 0; i < WORD; i++) word |= (uint64_t)(entries[i] != 0) << i;              \
        return word;                                                                               \
    }
