/* Element types, and the conversion between runs of values of any two of them.

   Conversions round to nearest even. They go through fp32, or stay in fp64 between fp64 and fp32:
   fp64 to a 16-bit type rounds twice, as in torch. Every NaN that is converted or added becomes
   the one quiet NaN of its type, so that all back-ends agree to the bit whatever their hardware
   does with payloads. Values of one type are copied as bits.

   Included once per instruction set, with TARGET (a function attribute) and LEVEL(name) defined;
   the loops are plain C that compilers vectorise. They run over whole chunks, the last of which
   overlaps the one before: a block has some hundred values, and the rest of them one by one took
   as long as all others. */

#ifndef SPARSE_COMM_CONVERT_TYPES
#define SPARSE_COMM_CONVERT_TYPES

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { F64, F32, F16, BF16, DTYPES };
enum { SIZE_F64 = 8, SIZE_F32 = 4, SIZE_F16 = 2, SIZE_BF16 = 2 };

static const size_t ITEMSIZE[DTYPES] = {SIZE_F64, SIZE_F32, SIZE_F16, SIZE_BF16};

enum { CHUNK = 32 };

typedef void convert_run(void *restrict to, const void *restrict from, size_t count);

#endif

static inline TARGET float LEVEL(float_of)(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline TARGET uint32_t LEVEL(bits_of)(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Loads: an element as a float (a double for F64). */

static inline TARGET double LEVEL(load_F64)(const void *p, size_t i) {
    double x;
    memcpy(&x, (const char *)p + 8 * i, sizeof x);
    return x;
}

static inline TARGET float LEVEL(load_F32)(const void *p, size_t i) {
    float x;
    memcpy(&x, (const char *)p + 4 * i, sizeof x);
    return x;
}

static inline TARGET float LEVEL(load_BF16)(const void *p, size_t i) {
    uint16_t half;
    memcpy(&half, (const char *)p + 2 * i, sizeof half);
    return LEVEL(float_of)((uint32_t)half << 16);
}

/* Without branches, after M. Dukhan's FP16 library: subnormals by a subtraction that is exact. */
static inline TARGET float LEVEL(load_F16)(const void *p, size_t i) {
    uint16_t half;
    memcpy(&half, (const char *)p + 2 * i, sizeof half);
    uint32_t w = (uint32_t)half << 16, sign = w & 0x80000000u, magnitude = w + w;
    float normal = LEVEL(float_of)((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    float subnormal = LEVEL(float_of)((magnitude >> 17) | (126u << 23)) - 0.5f;
    uint32_t bits =
        magnitude < (1u << 27) ? LEVEL(bits_of)(subnormal) : LEVEL(bits_of)(normal);
    return LEVEL(float_of)(sign | bits);
}

/* Stores: round a float (a double for F64) to an element. */

static inline TARGET void LEVEL(store_F64)(void *p, size_t i, double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = x != x ? 0x7FF8000000000000u : bits;
    memcpy((char *)p + 8 * i, &bits, sizeof bits);
}

static inline TARGET void LEVEL(store_F32)(void *p, size_t i, float x) {
    uint32_t bits = x != x ? 0x7FC00000u : LEVEL(bits_of)(x);
    memcpy((char *)p + 4 * i, &bits, sizeof bits);
}

static inline TARGET void LEVEL(store_BF16)(void *p, size_t i, float x) {
    uint32_t bits = LEVEL(bits_of)(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
    uint16_t half = (uint16_t)(x != x ? 0x7FC0u : rounded);
    memcpy((char *)p + 2 * i, &half, sizeof half);
}

/* After M. Dukhan's FP16 library: an addition whose exponent makes the hardware round for us. */
static inline TARGET void LEVEL(store_F16)(void *p, size_t i, float x) {
    uint32_t w = LEVEL(bits_of)(x), magnitude = w + w, bias = magnitude & 0xFF000000u;
    float scaled = LEVEL(float_of)(w & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    uint32_t bits = LEVEL(bits_of)(LEVEL(float_of)((bias >> 1) + 0x07800000u) + scaled);
    uint32_t half = ((w >> 16) & 0x8000u) | (((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu));
    uint16_t stored = (uint16_t)(x != x ? 0x7E00u : half);
    memcpy((char *)p + 2 * i, &stored, sizeof stored);
}

/* convert: to = from. accumulate: to += from, added in fp32, or in fp64 where one is F64. */

#define RUN(FROM, TO, SUM)                                                                         \
    static inline TARGET void LEVEL(some_##FROM##_##TO)(                                           \
        void *restrict to, const void *restrict from, size_t start, size_t end) {                  \
        for (size_t i = start; i < end; i++)                                                       \
            LEVEL(store_##TO)(to, i, (SUM)LEVEL(load_##FROM)(from, i));                            \
    }                                                                                              \
    CONVERT(FROM, TO)                                                                              \
    ACCUMULATE(FROM, TO, SUM)

/* Not by one memcpy: the C library may do that with REP MOVSB, which is slow for a block. */
#define COPY(TYPE, SUM)                                                                            \
    static inline TARGET void LEVEL(some_##TYPE##_##TYPE)(                                         \
        void *restrict to, const void *restrict from, size_t start, size_t end) {                  \
        memcpy((char *)to + start * SIZE_##TYPE, (const char *)from + start * SIZE_##TYPE,     \
               (end - start) * SIZE_##TYPE);                                                     \
    }                                                                                              \
    CONVERT(TYPE, TYPE)                                                                            \
    ACCUMULATE(TYPE, TYPE, SUM)

#define CONVERT(FROM, TO)                                                                          \
    static TARGET void LEVEL(convert_##FROM##_##TO)(void *restrict to, const void *restrict from,  \
                                                    size_t count) {                                \
        if (count < CHUNK) {                                                                       \
            LEVEL(some_##FROM##_##TO)(to, from, 0, count);                                         \
            return;                                                                                \
        }                                                                                          \
        for (size_t i = 0; i + CHUNK <= count; i += CHUNK)                                         \
            LEVEL(some_##FROM##_##TO)(to, from, i, i + CHUNK);                                     \
        LEVEL(some_##FROM##_##TO)(to, from, count - CHUNK, count);                                 \
    }

#define ACCUMULATE(FROM, TO, SUM)                                                                  \
    static TARGET void LEVEL(accumulate_##FROM##_##TO)(                                            \
        void *restrict to, const void *restrict from, size_t count) {                              \
        for (size_t i = 0; i < count; i++)                                                         \
            LEVEL(store_##TO)(to, i, (SUM)LEVEL(load_##TO)(to, i) + (SUM)LEVEL(load_##FROM)(from, i)); \
    }

COPY(F64, double)
RUN(F64, F32, double)
RUN(F64, F16, double)
RUN(F64, BF16, double)
RUN(F32, F64, double)
COPY(F32, float)
RUN(F32, F16, float)
RUN(F32, BF16, float)
RUN(F16, F64, double)
RUN(F16, F32, float)
COPY(F16, float)
RUN(F16, BF16, float)
RUN(BF16, F64, double)
RUN(BF16, F32, float)
RUN(BF16, F16, float)
COPY(BF16, float)

#undef RUN
#undef COPY
#undef CONVERT
#undef ACCUMULATE

#define ROW(NAME, FROM)                                                                            \
    {LEVEL(NAME##_##FROM##_F64), LEVEL(NAME##_##FROM##_F32), LEVEL(NAME##_##FROM##_F16),           \
     LEVEL(NAME##_##FROM##_BF16)}

static convert_run *const LEVEL(CONVERT)[DTYPES][DTYPES] = {
    ROW(convert, F64), ROW(convert, F32), ROW(convert, F16), ROW(convert, BF16)};
static convert_run *const LEVEL(ACCUMULATE)[DTYPES][DTYPES] = {
    ROW(accumulate, F64), ROW(accumulate, F32), ROW(accumulate, F16), ROW(accumulate, BF16)};

#undef ROW
