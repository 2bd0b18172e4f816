/* Select and scatter with AVX-512 (F, BW, VL and VBMI2: Ice Lake, Zen 4 and later).

   VPCOMPRESS and VPEXPAND do the work. The whole register is stored, not the set lanes only: the
   masked form that writes to memory is microcode on Zen 4. */

#include <immintrin.h>

#define AVX512_WORDS(BITS, MASK)                                                                   \
    static inline TARGET uint##BITS##_t *LEVEL(select_word_##BITS)(                                \
        uint##BITS##_t *restrict packed, const uint##BITS##_t *restrict dense, uint64_t word) {    \
        enum { LANES = 512 / BITS };                                                               \
        for (int i = 0; i < WORD; i += LANES) {                                                    \
            MASK mask = (MASK)(word >> i);                                                         \
            __m512i x = _mm512_loadu_si512(dense + i);                                             \
            _mm512_storeu_si512(packed, _mm512_maskz_compress_epi##BITS(mask, x));                 \
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
            __m512i x = _mm512_maskz_expand_epi##BITS(mask, _mm512_loadu_si512(packed));           \
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
