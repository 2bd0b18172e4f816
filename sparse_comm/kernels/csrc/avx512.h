/* Select and scatter with AVX-512 (F, BW, VL and VBMI2: Ice Lake, Zen 4 and later).

   VPCOMPRESS and VPEXPAND do the work. The whole register is stored, not the set lanes only: the
   masked form that writes to memory is microcode on Zen 4. And they merge into a register of zeros
   that the compiler cannot see through: in the form that zeroes the rest by itself Zen 5 waits for
   what stood in the register before, five cycles a vector instead of one and a quarter. */

#include <immintrin.h>

static inline TARGET __m512i zeros_avx512(void) {
    __m512i zeros = _mm512_setzero_si512();
    __asm__("" : "+v"(zeros));
    return zeros;
}

#define AVX512_WORDS(BITS, MASK)                                                                   \
    static inline TARGET uint##BITS##_t *LEVEL(select_word_##BITS)(                                \
        uint##BITS##_t *restrict packed, const uint##BITS##_t *restrict dense, uint64_t word) {    \
        enum { LANES = 512 / BITS };                                                               \
        for (int i = 0; i < WORD; i += LANES) {                                                    \
            MASK mask = (MASK)(word >> i);                                                         \
            __m512i x = _mm512_loadu_si512(dense + i);                                             \
            _mm512_storeu_si512(packed,                                                            \
                                _mm512_mask_compress_epi##BITS(zeros_avx512(), mask, x));          \
            packed += LEVEL(count_ones)(mask);                                                     \
        }                                                                                          \
        return packed;                                                                             \
    }                                                                                              \
    static inline TARGET const uint##BITS##_t *scatter_word_avx512_##BITS(                         \
        uint##BITS##_t *restrict dense, const uint##BITS##_t *restrict packed, uint64_t word,      \
        int stream) {                                                                              \
        enum { LANES = 512 / BITS };                                                               \
        for (int i = 0; i < WORD; i += LANES) {                                                    \
            MASK mask = (MASK)(word >> i);                                                         \
            __m512i x = _mm512_mask_expand_epi##BITS(zeros_avx512(), mask,                         \
                                                     _mm512_loadu_si512(packed));                  \
            if (stream)                                                                            \
                _mm512_stream_si512((__m512i *)(dense + i), x);                                    \
            else                                                                                   \
                _mm512_storeu_si512(dense + i, x);                                                 \
            packed += LEVEL(count_ones)(mask);                                                     \
        }                                                                                          \
        return packed;                                                                             \
    }

AVX512_WORDS(16, __mmask32)
AVX512_WORDS(32, __mmask16)
AVX512_WORDS(64, __mmask8)

#undef AVX512_WORDS

#define AVX512_NONZERO(BITS)                                                                       \
    static inline TARGET uint64_t LEVEL(nonzero_word_##BITS)(const uint##BITS##_t *entries) {      \
        enum { LANES = 512 / BITS };                                                               \
        uint64_t word = 0;                                                                         \
        for (int i = 0; i < WORD; i += LANES) {                                                    \
            __m512i x = _mm512_loadu_si512(entries + i);                                           \
            word |= (uint64_t)_mm512_test_epi##BITS##_mask(x, x) << i;                             \
        }                                                                                          \
        return word;                                                                               \
    }

AVX512_NONZERO(16)
AVX512_NONZERO(32)
AVX512_NONZERO(64)

#undef AVX512_NONZERO
