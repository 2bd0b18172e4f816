/* Pack and expand of whole tensors: blocks, their bounds, and threads that share them.

   The values of a block pass through a buffer of its own in the first-level cache, which holds a
   whole block, and are counted against the offsets: whatever bitmap and offsets hold, nothing
   outside the tensors is read or written. Expand reads values in place where no bitmap could lead
   it out of them. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

enum {
    GROUP = 128,              /* blocks that a thread takes at a time; a pair is half of it apart */
    LEAST_GROUPS = 32,        /* a thread: 16.8M entries, a millisecond or so */
    MAX_THREADS = 64,
    STREAM_BYTES = 16 << 20,  /* dense tensors from this size on bypass the caches */
    VALUES_AHEAD = 4096,      /* bytes: where expand reads before their turn */
    PIECE = 8,                /* words that expand converts and scatters at a time */
    STACK_BYTES = 1 << 20,
};

typedef struct {
    const level *level;
    char *out;
    const char *in;
    const unsigned char *bits;
    const int64_t *offsets;
    int64_t numel, nnz, blocks;
    size_t dense_size, value_size; /* bytes an element */
    int width;                     /* log2 of the dense element size, less 1 */
    int stream, copies; /* whether dense elements and values are of one type */
    convert_run *convert;
    atomic_llong next;      /* the first block that nobody has taken */
    atomic_llong bad_block; /* a block where bitmap and offsets disagree, or -1 */
} job;

/* Entries of block b. */
static size_t entries(const job *j, int64_t b) {
    int64_t rest = j->numel - b * BLOCK;
    return rest < BLOCK ? (size_t)rest : BLOCK;
}

/* Whether the bits after the last entry are zero, as they must be. */
static int is_padded(const unsigned char *bits, size_t n) {
    return n % WORD == 0 || load_word(bits, n / WORD) >> n % WORD == 0;
}

/* Where the values of block b start, or -1 where the offsets leave the tensor. */
static int64_t values_of(const job *j, int64_t b, size_t *count) {
    int64_t start = j->offsets[b], end = j->offsets[b + 1];
    if (start < 0 || start > end || end > j->nnz || (uint64_t)(end - start) > entries(j, b)) return -1;
    *count = (size_t)(end - start);
    return start;
}

static void disagree(job *j, int64_t b) { atomic_store(&j->bad_block, b); }

static void put(job *j, int64_t b, const void *packed, size_t count) {
    size_t expected;
    int64_t start = values_of(j, b, &expected);
    if (start < 0 || count != expected)
        disagree(j, b);
    else if (count) /* an empty tensor has no address */
        j->convert(j->out + (size_t)start * j->value_size, packed, count);
}

static void pack_block(job *j, int64_t b) {
    _Alignas(64) char packed[BLOCK * 8 + SLACK], tail[BLOCK * 8];
    const char *dense = j->in + (size_t)b * BLOCK * j->dense_size;
    const unsigned char *bits = j->bits + (size_t)b * WORDS * 8;
    size_t n = entries(j, b), words = (n + WORD - 1) / WORD;
    if (!is_padded(bits, n)) {
        disagree(j, b);
        return;
    }
    if (n < words * WORD) {
        memset(tail, 0, words * WORD * j->dense_size);
        memcpy(tail, dense, n * j->dense_size);
        dense = tail;
    }
    put(j, b, packed, j->level->select_one[j->width](packed, dense, bits, words));
}

/* Two whole blocks. */
static void pack_two(job *j, int64_t first, int64_t second) {
    _Alignas(64) char packed[2][BLOCK * 8 + SLACK];
    void *const to[2] = {packed[0], packed[1]};
    size_t block_bytes = BLOCK * j->dense_size;
    const void *const from[2] = {j->in + (size_t)first * block_bytes,
                                 j->in + (size_t)second * block_bytes};
    const unsigned char *const bits[2] = {j->bits + (size_t)first * WORDS * 8,
                                          j->bits + (size_t)second * WORDS * 8};
    counts selected = j->level->select_two[j->width](to, from, bits, WORDS);
    put(j, first, packed[0], selected.count[0]);
    put(j, second, packed[1], selected.count[1]);
}

static void pack_group(job *j, int64_t first, int64_t last) {
    int whole = last - first == GROUP && last * BLOCK <= j->numel;
    if (whole && j->level->select_two[j->width])
        for (int64_t b = first; b < first + GROUP / 2; b++) pack_two(j, b, b + GROUP / 2);
    else
        for (int64_t b = first; b < last; b++) pack_block(j, b);
}

/* Stores that bypass the caches hold up the reads behind them, unless these find their lines in a
   cache. Each line is asked for once: the block that follows asks for the rest. */
static void ask_for_values(const char *values, size_t bytes) {
    uintptr_t first = (uintptr_t)values + VALUES_AHEAD, end = first + bytes;
    for (uintptr_t line = (first + 63) & ~(uintptr_t)63; line < end; line += 64)
        __builtin_prefetch((const void *)line);
}

/* Scatter whole words of block b from its `count` values, which pass through `buffer` by pieces: the
   stores that bypass the caches go on while the next piece is converted. Returns the values used. */
static size_t scatter_pieces(const job *j, char *out, const char *values, size_t count,
                             const unsigned char *bits, size_t words, char *buffer, int stream) {
    size_t ready = 0, used = 0;
    for (size_t w = 0; w < words; w += PIECE) {
        size_t piece = words - w < PIECE ? words - w : PIECE, most = used + piece * WORD;
        size_t needed = most < count ? most : count;
        if (needed > ready) {
            j->convert(buffer + ready * j->dense_size, values + ready * j->value_size,
                       needed - ready);
            ready = needed;
            memset(buffer + ready * j->dense_size, 0, SLACK);
        }
        used += j->level->scatter[j->width](out + w * WORD * j->dense_size,
                                            buffer + used * j->dense_size, bits + 8 * w, piece,
                                            stream);
        if (used > count) break;
    }
    return used;
}

static void expand_block(job *j, int64_t b) {
    _Alignas(64) char buffer[BLOCK * 8 + SLACK], tail[BLOCK * 8];
    const unsigned char *bits = j->bits + (size_t)b * WORDS * 8;
    size_t n = entries(j, b), words = (n + WORD - 1) / WORD, count, used;
    int64_t start = values_of(j, b, &count);
    if (start < 0 || !is_padded(bits, n)) {
        disagree(j, b);
        return;
    }
    const char *values = j->in + (size_t)start * j->value_size;
    ask_for_values(values, count * j->value_size);
    int whole = n == words * WORD, stream = whole && j->stream;
    char *out = j->out + (size_t)b * BLOCK * j->dense_size, *to = whole ? out : tail;
    if (j->copies && j->nnz - start >= BLOCK + SLACK)
        used = j->level->scatter[j->width](to, values, bits, words, stream);
    else
        used = scatter_pieces(j, to, values, count, bits, words, buffer, stream);
    if (!whole) memcpy(out, tail, n * j->dense_size);
    if (used != count) disagree(j, b);
}

static void expand_group(job *j, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) expand_block(j, b);
#ifdef __SSE2__
    if (j->stream) _mm_sfence();
#endif
}

typedef struct {
    job *job;
    void (*group)(job *, int64_t, int64_t);
} work;

static void *run_groups(void *argument) {
    work *w = argument;
    for (;;) {
        int64_t first = atomic_fetch_add(&w->job->next, GROUP), last = first + GROUP;
        if (first >= w->job->blocks) return NULL;
        w->group(w->job, first, last < w->job->blocks ? last : w->job->blocks);
    }
}

/* How many threads find a core, this one included: as many as this process may use, and not more
   than are left by the other threads of the machine that run or want to. (Among them are torch's
   own, which spin for a moment after an operator.) As many as may be where nobody tells. */
static int free_cores(void) {
#ifdef __linux__
    cpu_set_t allowed;
    int running = 0;
    FILE *file = fopen("/proc/loadavg", "r");
    if (!file) return MAX_THREADS;
    int read = fscanf(file, "%*s %*s %*s %d", &running);
    fclose(file);
    if (read != 1 || running < 1 || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return MAX_THREADS;
    long mine = CPU_COUNT(&allowed), left = sysconf(_SC_NPROCESSORS_ONLN) - (running - 1);
    if (left > mine) left = mine;
    return left < 1 ? 1 : (int)left;
#else
    return MAX_THREADS;
#endif
}

/* Run over all blocks; returns a block where bitmap and offsets disagree, or -1.

   Threads are made for the call, so that a fork finds no pool to break, and take groups as they
   come. One that is put on a busy core would keep the others waiting for its last group, a
   millisecond or more: so no more are made than there are free cores. */
static int64_t run(job *j, void (*group)(job *, int64_t, int64_t), int threads) {
    work w = {j, group};
    pthread_t others[MAX_THREADS];
    pthread_attr_t attributes;
    int64_t most = j->blocks / (LEAST_GROUPS * GROUP);
    int wanted = threads < most ? threads : (int)most, started = 0;
    if (wanted > 1) {
        int cores = free_cores();
        wanted = cores < wanted ? cores : wanted;
    }
    atomic_init(&j->next, 0);
    atomic_init(&j->bad_block, -1);
    if (j->offsets[0] != 0 || j->offsets[j->blocks] != j->nnz) return 0;
    if (wanted > 1 && pthread_attr_init(&attributes) == 0) {
        pthread_attr_setstacksize(&attributes, STACK_BYTES);
        while (started < wanted - 1 && started < MAX_THREADS &&
               pthread_create(&others[started], &attributes, run_groups, &w) == 0)
            started++;
        pthread_attr_destroy(&attributes);
    }
    run_groups(&w);
    for (int t = 0; t < started; t++) pthread_join(others[t], NULL);
    return atomic_load(&j->bad_block);
}

/* Bitmap, padded to whole words, and offsets of the entries with any bit set; returns how many.
   One thread: it only reads, and what it writes is small. */
static int64_t find_nonzeros(const level *l, unsigned char *bits, int64_t *offsets, const char *in,
                             int64_t numel, size_t itemsize) {
    nonzero_block *block = l->nonzero[itemsize == 2 ? 0 : itemsize == 4 ? 1 : 2];
    int64_t nnz = 0;
    for (int64_t b = 0; b * BLOCK < numel; b++) {
        int64_t rest = numel - b * BLOCK;
        size_t n = rest < BLOCK ? (size_t)rest : BLOCK, words = n / WORD;
        const char *entries = in + (size_t)b * BLOCK * itemsize;
        unsigned char *at = bits + (size_t)b * WORDS * 8;
        offsets[b] = nnz;
        nnz += (int64_t)block(at, entries, words);
        if (n % WORD) {
            _Alignas(64) char tail[WORD * 8] = {0};
            memcpy(tail, entries + words * WORD * itemsize, n % WORD * itemsize);
            nnz += (int64_t)block(at + 8 * words, tail, 1);
        }
    }
    offsets[(numel + BLOCK - 1) / BLOCK] = nnz;
    return nnz;
}
