/* Select one or two blocks and scatter one, from the word functions of an instruction set.

   Two blocks far apart are read at once: one stream of reads fills at most the line buffers of the
   first-level cache (14 GB/s measured on Zen 3), two keep the prefetcher of the second level busy
   as well (20 GB/s). For the same reason lines are asked for AHEAD bytes before their turn.

   Included once per instruction set: see convert.h. */

#ifndef SPARSE_COMM_BLOCKS
#define SPARSE_COMM_BLOCKS

enum { AHEAD = 1024 };

/* From `dense` (two blocks) to `packed` (two places), whole words; returns the numbers selected. */
typedef struct {
    size_t count[2];
} counts;
typedef counts select_blocks(void *const packed[2], const void *const dense[2],
                             const unsigned char *const bits[2], size_t words);
typedef size_t scatter_block(void *restrict dense, const void *restrict packed,
                             const unsigned char *bits, size_t words, int stream);

#endif

#define SELECT(BITS)                                                                               \
    static TARGET counts LEVEL(select_one_##BITS)(void *const packed[2],                           \
                                                  const void *const dense[2],                      \
                                                  const unsigned char *const bits[2],              \
                                                  size_t words) {                                  \
        uint##BITS##_t *out = packed[0];                                                           \
        const uint##BITS##_t *in = dense[0];                                                       \
        for (size_t i = 0; i < words; i++)                                                         \
            out = LEVEL(select_word_##BITS)(out, in + i * WORD, load_word(bits[0], i));            \
        return (counts){{(size_t)(out - (uint##BITS##_t *)packed[0]), 0}};                         \
    }                                                                                              \
    static TARGET counts LEVEL(select_two_##BITS)(void *const packed[2],                           \
                                                  const void *const dense[2],                      \
                                                  const unsigned char *const bits[2],              \
                                                  size_t words) {                                  \
        uint##BITS##_t *out0 = packed[0], *out1 = packed[1];                                       \
        const uint##BITS##_t *in0 = dense[0], *in1 = dense[1];                                     \
        for (size_t i = 0; i < words; i++) {                                                       \
            uintptr_t at0 = (uintptr_t)(in0 + i * WORD), at1 = (uintptr_t)(in1 + i * WORD);        \
            for (size_t line = AHEAD; line < AHEAD + WORD * sizeof *in0; line += 64) {             \
                __builtin_prefetch((const void *)(at0 + line));                                    \
                __builtin_prefetch((const void *)(at1 + line));                                    \
            }                                                                                      \
            out0 = LEVEL(select_word_##BITS)(out0, in0 + i * WORD, load_word(bits[0], i));         \
            out1 = LEVEL(select_word_##BITS)(out1, in1 + i * WORD, load_word(bits[1], i));         \
        }                                                                                          \
        return (counts){{(size_t)(out0 - (uint##BITS##_t *)packed[0]),                             \
                         (size_t)(out1 - (uint##BITS##_t *)packed[1])}};                           \
    }

SELECT(16)
SELECT(32)
SELECT(64)

#undef SELECT

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
