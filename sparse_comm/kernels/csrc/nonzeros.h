/* Which entries of a tensor have any bit set: a pattern's bitmap and offsets, from the entries.

   Bits count, not values: -0.0 is an entry like any other, so that nothing is lost. One word of the
   bitmap at a time; a block's ones are counted while its words are at hand.

   Included once per instruction set: see convert.h. */

#ifndef SPARSE_COMM_NONZEROS
#define SPARSE_COMM_NONZEROS

/* Of `words` whole words of entries; returns the number of ones. */
typedef size_t nonzero_block(unsigned char *restrict bits, const void *restrict entries,
                             size_t words);

#endif

#define NONZERO_BLOCK(BITS)                                                                        \
    static TARGET size_t LEVEL(nonzero_block_##BITS)(unsigned char *restrict bits,                 \
                                                     const void *restrict entries,                 \
                                                     size_t words) {                               \
        const uint##BITS##_t *in = entries;                                                        \
        size_t ones = 0;                                                                           \
        for (size_t i = 0; i < words; i++) {                                                       \
            ASK_FOR(in + i * WORD, AHEAD_ONE);                                                     \
            uint64_t word = LEVEL(nonzero_word_##BITS)(in + i * WORD);                             \
            store_word(bits, i, word);                                                             \
            ones += LEVEL(count_ones)(word);                                                       \
        }                                                                                          \
        return ones;                                                                               \
    }

NONZERO_BLOCK(16)
NONZERO_BLOCK(32)
NONZERO_BLOCK(64)

#undef NONZERO_BLOCK
