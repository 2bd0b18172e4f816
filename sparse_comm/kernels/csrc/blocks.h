/* Select one or two blocks and scatter one, from the word functions of an instruction set.

   Zen 3 wants two blocks far apart read at once: one stream of reads fills at most the line buffers
   of its first-level cache (14 GB/s), two keep the prefetcher of the second level busy as well
   (20 GB/s). Zen 5 wants one (44 GB/s, with two 33), Zen 4 does not mind (28 GB/s with either). So
   processors with AVX-512 are given one.
   Lines are asked for some bytes before their turn, as the processor looks no farther ahead than
   it has room for instructions: 36 to 42 GB/s on Zen 5.

   Included once per instruction set: see convert.h. */

#ifndef SPARSE_COMM_BLOCKS
#define SPARSE_COMM_BLOCKS

enum { AHEAD_ONE = 4096, AHEAD_TWO = 1024 };

/* From `dense` to `packed`, whole words; returns the numbers selected. */
typedef size_t select_block(void *restrict packed, const void *restrict dense,
                            const unsigned char *bits, size_t words);
typedef struct {
    size_t count[2];
} counts;
typedef counts select_blocks(void *const packed[2], const void *const dense[2],
                             const unsigned char *const bits[2], size_t words);
typedef size_t scatter_block(void *restrict dense, const void *restrict packed,
                             const unsigned char *bits, size_t words, int stream);

#endif

#define ASK_FOR(ADDRESS, AHEAD)                                                                    \
    for (size_t line = AHEAD; line < AHEAD + WORD * sizeof *(ADDRESS); line += 64)                 \
    __builtin_prefetch((const void *)((uintptr_t)(ADDRESS) + line))

#define SELECT_ONE(BITS)                                                                           \
    static TARGET size_t LEVEL(select_one_##BITS)(void *restrict packed,                           \
                                                  const void *restrict dense,                      \
                                                  const unsigned char *bits, size_t words) {       \
        uint##BITS##_t *out = packed;                                                              \
        const uint##BITS##_t *in = dense;                                                          \
        for (size_t i = 0; i < words; i++) {                                                       \
            ASK_FOR(in + i * WORD, AHEAD_ONE);                                                     \
            out = LEVEL(select_word_##BITS)(out, in + i * WORD, load_word(bits, i));               \
        }                                                                                          \
        return (size_t)(out - (uint##BITS##_t *)packed);                                           \
    }

#define SELECT_TWO(BITS)                                                                           \
    static TARGET counts LEVEL(select_two_##BITS)(void *const packed[2],                           \
                                                  const void *const dense[2],                      \
                                                  const unsigned char *const bits[2],              \
                                                  size_t words) {                                  \
        uint##BITS##_t *out0 = packed[0], *out1 = packed[1];                                       \
        const uint##BITS##_t *in0 = dense[0], *in1 = dense[1];                                     \
        for (size_t i = 0; i < words; i++) {                                                       \
            ASK_FOR(in0 + i * WORD, AHEAD_TWO);                                                    \
            ASK_FOR(in1 + i * WORD, AHEAD_TWO);                                                    \
            out0 = LEVEL(select_word_##BITS)(out0, in0 + i * WORD, load_word(bits[0], i));         \
            out1 = LEVEL(select_word_##BITS)(out1, in1 + i * WORD, load_word(bits[1], i));         \
        }                                                                                          \
        return (counts){{(size_t)(out0 - (uint##BITS##_t *)packed[0]),                             \
                         (size_t)(out1 - (uint##BITS##_t *)packed[1])}};                           \
    }

SELECT_ONE(16)
SELECT_ONE(32)
SELECT_ONE(64)

#undef SELECT_ONE

#define SCATTER(NAME, BITS)                                                                        \
    static TARGET size_t LEVEL(scatter_##BITS)(void *restrict dense, const void *restrict packed,  \
                                               const unsigned char *bits, size_t words,            \
                                               int stream) {                                       \
        const uint##BITS##_t *in = packed;                                                         \
        uint##BITS##_t *out = dense;                                                               \
        if (stream)                                                                                \
            for (size_t i = 0; i < words; i++)                                                     \
                in = scatter_word_##NAME##_##BITS(out + i * WORD, in, load_word(bits, i), 1);      \
        else                                                                                       \
            for (size_t i = 0; i < words; i++)                                                     \
                in = scatter_word_##NAME##_##BITS(out + i * WORD, in, load_word(bits, i), 0);      \
        return (size_t)(in - (const uint##BITS##_t *)packed);                                      \
    }
