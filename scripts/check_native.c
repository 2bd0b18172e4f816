/* Checks every instruction set of the native kernels against the plainest code, without Python.

   The test suite does that for the instruction sets of the machine it runs on. This program needs
   nothing but a C library, so that an emulator can run it for others:

       cc -O2 -static -pthread -I sparse_comm/kernels/csrc scripts/check_native.c -o check_native
       ./check_native

   and, for processors that are not x86, a cross compiler and qemu-user do (big-endian s390x, too).
   AVX-512 runs under Bochs, but not under its release 2.7, which compresses full masks to zeros.
   It prints the instruction sets that it checked, and ends with status 1 at the first
   difference. */

#define _GNU_SOURCE /* jobs.h counts the cores; Python.h defines it for the extension */

#include <stdio.h>
#include <stdlib.h>

#include "levels.h"

#include "jobs.h"

static uint64_t state = 88172645463325252u;

static uint64_t random64(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Random bits, among them many of the numbers that rounding finds hard. */
static void fill(unsigned char *memory, size_t bytes, int dtype) {
    static const double HARD[] = {0.0, -0.0, 1e-40, -6e-8, 65519.0, 65520.0, 3.3895e38, 1.00390625};
    for (size_t i = 0; i < bytes; i++) memory[i] = (unsigned char)(random64() >> 56);
    for (size_t i = 0; i < bytes / ITEMSIZE[dtype]; i += 1 + random64() % 5)
        CONVERT_baseline[F64][dtype](memory + i * ITEMSIZE[dtype], &HARD[random64() % 8], 1);
}

static int is_set(const unsigned char *bits, int64_t i) { return bits[i / 8] >> i % 8 & 1; }

static void fail(const char *what, const char *name, int dense, int value, int64_t numel) {
    printf("%s differs: %s, dense dtype %d, value dtype %d, %lld entries\n", what, name, dense,
           value, (long long)numel);
    exit(1);
}

static void check(const level *l, int dense_dtype, int value_dtype, int64_t numel, unsigned share,
                  int64_t start) {
    int64_t words = (numel + WORD - 1) / WORD, blocks = (numel + BLOCK - 1) / BLOCK, nnz = 0;
    size_t ds = ITEMSIZE[dense_dtype], vs = ITEMSIZE[value_dtype];
    unsigned char *bits = calloc((size_t)words * 8 + 1, 1);
    int64_t *offsets = calloc((size_t)blocks + 1, sizeof *offsets);
    for (int64_t i = 0; i < numel; i++) {
        int one = random64() % 1000 < share || i / BLOCK == 2;
        bits[i / 8] |= (unsigned char)(one << i % 8);
        nnz += one;
        offsets[i / BLOCK + 1] = nnz;
    }
    size_t dense_bytes = (size_t)(numel + start) * ds, value_bytes = (size_t)nnz * vs;
    unsigned char *dense = aligned_alloc(64, (dense_bytes + 127) / 64 * 64);
    unsigned char *expected = malloc(dense_bytes + 1), *out = malloc(value_bytes + 1);
    unsigned char *values = malloc(value_bytes + 1), *sums = malloc(value_bytes + 1);
    fill(dense, dense_bytes, dense_dtype);
    fill(values, value_bytes, value_dtype);
    memcpy(sums, values, value_bytes);
    job j = {.level = l, .out = (char *)out, .in = (char *)dense + (size_t)start * ds, .bits = bits,
             .offsets = offsets, .numel = numel, .nnz = nnz, .blocks = blocks, .dense_size = ds,
             .value_size = vs, .width = ds == 2 ? 0 : ds == 4 ? 1 : 2,
             .convert = l->convert[dense_dtype][value_dtype]};
    int64_t bad = run(&j, pack_group, 1);
    j.out = (char *)sums;
    j.convert = l->accumulate[dense_dtype][value_dtype];
    bad &= run(&j, pack_group, 3);
    for (int64_t i = 0, k = 0; i < numel; i++) {
        if (!is_set(bits, i)) continue;
        unsigned char one[8], sum[8];
        memcpy(sum, values + (size_t)k * vs, vs);
        CONVERT_baseline[dense_dtype][value_dtype](one, j.in + (size_t)i * ds, 1);
        ACCUMULATE_baseline[dense_dtype][value_dtype](sum, j.in + (size_t)i * ds, 1);
        if (memcmp(one, out + (size_t)k * vs, vs)) fail("pack", l->name, dense_dtype, value_dtype, numel);
        if (memcmp(sum, sums + (size_t)k * vs, vs)) fail("accumulate", l->name, dense_dtype, value_dtype, numel);
        k++;
    }
    memset(expected, 0, dense_bytes);
    for (int64_t i = 0, k = 0; i < numel; i++)
        if (is_set(bits, i))
            CONVERT_baseline[value_dtype][dense_dtype](expected + (size_t)i * ds, values + (size_t)(k++) * vs, 1);
    j.in = (char *)values;
    j.out = (char *)dense + (size_t)start * ds;
    j.convert = l->convert[value_dtype][dense_dtype];
    for (j.stream = 0; j.stream <= (start == 0); j.stream++) {
        memset(j.out, 7, (size_t)numel * ds);
        bad &= run(&j, expand_group, 1 + j.stream);
        if (memcmp(expected, j.out, (size_t)numel * ds)) fail("expand", l->name, dense_dtype, value_dtype, numel);
    }
    if (bad != -1) fail("the check of the offsets", l->name, dense_dtype, value_dtype, numel);
    free(bits), free(offsets), free(dense), free(expected), free(out), free(values), free(sums);
}

/* Sparse entries, of which some have one bit set only, behind `start` others. */
static void check_nonzeros(const level *l, size_t size, int64_t numel, unsigned share,
                           int64_t start) {
    int64_t words = (numel + WORD - 1) / WORD, blocks = (numel + BLOCK - 1) / BLOCK, nnz = 0;
    unsigned char *entries = calloc((size_t)(numel + start) * size + 1, 1);
    unsigned char *bits = malloc((size_t)words * 8 + 1), *in = entries + (size_t)start * size;
    unsigned char *expected = calloc((size_t)words * 8 + 1, 1);
    int64_t *offsets = malloc(((size_t)blocks + 1) * sizeof *offsets);
    for (int64_t i = 0; i < numel; i++) {
        if (random64() % 1000 >= share) continue;
        in[(size_t)i * size + random64() % size] = (unsigned char)(1 << random64() % 8);
        expected[i / 8] |= (unsigned char)(1 << i % 8);
    }
    int64_t found = find_nonzeros(l, bits, offsets, (char *)in, numel, size);
    for (int64_t i = 0; i <= numel; i++) {
        if ((i % BLOCK == 0 || i == numel) && offsets[(i + BLOCK - 1) / BLOCK] != nnz)
            fail("an offset of nonzeros", l->name, (int)size, 0, numel);
        if (i < numel) nnz += is_set(expected, i);
    }
    if (found != nnz || memcmp(bits, expected, (size_t)words * 8))
        fail("nonzeros", l->name, (int)size, 0, numel);
    free(entries), free(bits), free(expected), free(offsets);
}

int main(void) {
    static const int64_t LENGTHS[] = {0, 1, 63, 64, 65, 4095, 4097, 3 * BLOCK + 5};
    static const unsigned SHARES[] = {0, 10, 100, 500, 1000};
    int here = levels_here();
    for (int l = 0; l < here; l++) {
        for (int dense = 0; dense < DTYPES; dense++)
            for (int value = 0; value < DTYPES; value++)
                for (size_t s = 0; s < sizeof SHARES / sizeof *SHARES; s++) {
                    for (size_t n = 0; n < sizeof LENGTHS / sizeof *LENGTHS; n++)
                        check(&LEVELS[l], dense, value, LENGTHS[n], SHARES[s], (int64_t)(n % 3));
                    if (dense == value) check(&LEVELS[l], dense, value, 129 * BLOCK, SHARES[s], 0);
                }
        for (size_t size = 2; size <= 8; size *= 2)
            for (size_t s = 0; s < sizeof SHARES / sizeof *SHARES; s++)
                for (size_t n = 0; n < sizeof LENGTHS / sizeof *LENGTHS; n++)
                    check_nonzeros(&LEVELS[l], size, LENGTHS[n], SHARES[s], (int64_t)(n % 3));
        printf("%s: as the plainest code\n", LEVELS[l].name);
    }
    return 0;
}
