/* Select and scatter with AVX2: eight entries at a time, shuffled by a table of 256 rows.

   Nothing depends on how many bits are set: where the values of each byte start follows from one
   multiplication, which adds up the counts of the bytes below it. Half the time of portable C at
   density 0.1 (bf16), and at no density slower; fp64 stays portable. */

#include <immintrin.h>

static unsigned char SELECT_ROWS[256][8];  /* the positions of a byte's ones */
static unsigned char SCATTER_ROWS[256][8]; /* the number of ones below each one, 0x80 at zeros */
static __m128i SELECT_BYTES[256], SCATTER_BYTES[256]; /* the same, of pairs of bytes */

static void make_rows(void) {
    for (int byte = 0; byte < 256; byte++) {
        int ones = 0;
        for (int bit = 0; bit < 8; bit++) {
            int is_one = byte >> bit & 1;
            SCATTER_ROWS[byte][bit] = is_one ? (unsigned char)ones : 0x80;
            if (is_one) SELECT_ROWS[byte][ones++] = (unsigned char)bit;
        }
        unsigned char select[16], scatter[16];
        for (int i = 0; i < 16; i++) {
            int position = SELECT_ROWS[byte][i / 2], rank = SCATTER_ROWS[byte][i / 2];
            select[i] = (unsigned char)(2 * position + i % 2);
            scatter[i] = rank == 0x80 ? 0x80 : (unsigned char)(2 * rank + i % 2);
        }
        memcpy(&SELECT_BYTES[byte], select, 16);
        memcpy(&SCATTER_BYTES[byte], scatter, 16);
    }
}

/* Byte i holds the number of ones in bytes 0 to i. */
static inline TARGET uint64_t running_counts(uint64_t word) {
    word -= (word >> 1) & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
    return ((word + (word >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u;
}

/* Row number `byte b of word` of a table of 16-byte rows: shifted in place, not scaled after. */
static inline TARGET __m128i row_of_bytes(const __m128i *table, uint64_t word, int b) {
    uint64_t offset = (b ? word >> (8 * b - 4) : word << 4) & 0xFF0;
    return _mm_load_si128((const __m128i *)((const char *)table + offset));
}

static inline TARGET __m256i row_of_lanes(const unsigned char *row) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)row));
}

static inline TARGET uint16_t *LEVEL(select_word_16)(uint16_t *restrict packed,
                                                     const uint16_t *restrict dense,
                                                     uint64_t word) {
    uint64_t counts = running_counts(word), before = counts << 8;
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        __m128i x = _mm_loadu_si128((const __m128i *)(dense + 8 * b));
        x = _mm_shuffle_epi8(x, row_of_bytes(SELECT_BYTES, word, b));
        _mm_storeu_si128((__m128i *)(packed + (before >> 8 * b & 255)), x);
    }
    return packed + (counts >> 56);
}

static inline TARGET uint32_t *LEVEL(select_word_32)(uint32_t *restrict packed,
                                                     const uint32_t *restrict dense,
                                                     uint64_t word) {
    uint64_t counts = running_counts(word), before = counts << 8;
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(dense + 8 * b));
        x = _mm256_permutevar8x32_epi32(x, row_of_lanes(SELECT_ROWS[word >> 8 * b & 255]));
        _mm256_storeu_si256((__m256i *)(packed + (before >> 8 * b & 255)), x);
    }
    return packed + (counts >> 56);
}

static inline TARGET const uint16_t *scatter_word_avx2_16(uint16_t *restrict dense,
                                                          const uint16_t *restrict packed,
                                                          uint64_t word, int stream) {
    uint64_t counts = running_counts(word), before = counts << 8;
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        __m128i x = _mm_loadu_si128((const __m128i *)(packed + (before >> 8 * b & 255)));
        x = _mm_shuffle_epi8(x, row_of_bytes(SCATTER_BYTES, word, b));
        if (stream)
            _mm_stream_si128((__m128i *)(dense + 8 * b), x);
        else
            _mm_storeu_si128((__m128i *)(dense + 8 * b), x);
    }
    return packed + (counts >> 56);
}

static inline TARGET const uint32_t *scatter_word_avx2_32(uint32_t *restrict dense,
                                                          const uint32_t *restrict packed,
                                                          uint64_t word, int stream) {
    uint64_t counts = running_counts(word), before = counts << 8;
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(packed + (before >> 8 * b & 255)));
        __m256i row = row_of_lanes(SCATTER_ROWS[word >> 8 * b & 255]);
        x = _mm256_permutevar8x32_epi32(x, row);
        x = _mm256_andnot_si256(_mm256_srai_epi32(row, 31), x); /* 0x80 marks a zero */
        if (stream)
            _mm256_stream_si256((__m256i *)(dense + 8 * b), x);
        else
            _mm256_storeu_si256((__m256i *)(dense + 8 * b), x);
    }
    return packed + (counts >> 56);
}

/* Entries that are zero become bytes of ones, of whose highest bits a word is made. */
static inline TARGET uint64_t LEVEL(nonzero_word_16)(const uint16_t *entries) {
    const __m256i zero = _mm256_setzero_si256();
    uint64_t word = 0;
    for (int i = 0; i < 64; i += 32) {
        __m256i low = _mm256_loadu_si256((const __m256i *)(entries + i));
        __m256i high = _mm256_loadu_si256((const __m256i *)(entries + i + 16));
        __m256i bytes = _mm256_packs_epi16(_mm256_cmpeq_epi16(low, zero),
                                           _mm256_cmpeq_epi16(high, zero));
        bytes = _mm256_permute4x64_epi64(bytes, 0xD8); /* packs works by halves */
        word |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(bytes) << i;
    }
    return word;
}

static inline TARGET uint64_t LEVEL(nonzero_word_32)(const uint32_t *entries) {
    const __m256i zero = _mm256_setzero_si256();
    uint64_t word = 0;
    for (int i = 0; i < 64; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(entries + i));
        int zeros = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, zero)));
        word |= (uint64_t)(~zeros & 0xFF) << i;
    }
    return word;
}
