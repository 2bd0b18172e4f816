/* Pack and expand of whole tensors: blocks, their bounds, and threads that share them.

   The values of a block pass through a buffer of its own in the first-level cache, which holds a
   whole block, and are counted against the offsets: whatever bitmap and offsets hold, nothing
   outside the tensors is read or written. */

#include <pthread.h>
#include <stdatomic.h>

enum {
    GROUP = 128,              /* blocks that a thread takes at a time; a pair is half of it apart */
    LEAST_GROUPS = 16,        /* a thread: 8.4M entries */
    MAX_THREADS = 64,
    STREAM_BYTES = 16 << 20,  /* dense tensors from this size on bypass the caches */
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
    int stream;
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

/* Blocks `first` and, if it is a block, `second`. */
static void pack_pair(job *j, int64_t first, int64_t second) {
    _Alignas(64) char packed[2][BLOCK * 8 + SLACK], tail[BLOCK * 8];
    void *const to[2] = {packed[0], packed[1]};
    size_t block_bytes = BLOCK * j->dense_size;
    const void *from[2] = {j->in + (size_t)first * block_bytes, NULL};
    const unsigned char *bits[2] = {j->bits + (size_t)first * WORDS * 8, NULL};
    if (second >= 0) {
        from[1] = j->in + (size_t)second * block_bytes;
        bits[1] = j->bits + (size_t)second * WORDS * 8;
        counts selected = j->level->select_two[j->width](to, from, bits, WORDS);
        put(j, first, packed[0], selected.count[0]);
        put(j, second, packed[1], selected.count[1]);
        return;
    }
    size_t n = entries(j, first), words = (n + WORD - 1) / WORD;
    if (!is_padded(bits[0], n)) {
        disagree(j, first);
        return;
    }
    if (n < words * WORD) {
        memset(tail, 0, words * WORD * j->dense_size);
        memcpy(tail, from[0], n * j->dense_size);
        from[0] = tail;
    }
    put(j, first, packed[0], j->level->select_one[j->width](to, from, bits, words).count[0]);
}

static void pack_group(job *j, int64_t first, int64_t last) {
    int64_t half = last - first == GROUP && last * BLOCK <= j->numel ? GROUP / 2 : 0;
    for (int64_t b = first; b < first + half; b++) pack_pair(j, b, b + half);
    for (int64_t b = first + 2 * half; b < last; b++) pack_pair(j, b, -1);
}

static void expand_block(job *j, int64_t b) {
    _Alignas(64) char packed[BLOCK * 8 + SLACK], tail[BLOCK * 8];
    const unsigned char *bits = j->bits + (size_t)b * WORDS * 8;
    size_t n = entries(j, b), words = (n + WORD - 1) / WORD, count, used;
    int64_t start = values_of(j, b, &count);
    if (start < 0 || !is_padded(bits, n)) {
        disagree(j, b);
        return;
    }
    char *out = j->out + (size_t)b * BLOCK * j->dense_size;
    if (count) j->convert(packed, j->in + (size_t)start * j->value_size, count);
    memset(packed + count * j->dense_size, 0, SLACK);
    if (n == words * WORD) {
        used = j->level->scatter[j->width](out, packed, bits, words, j->stream);
    } else {
        used = j->level->scatter[j->width](tail, packed, bits, words, 0);
        memcpy(out, tail, n * j->dense_size);
    }
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

/* Run over all blocks; returns a block where bitmap and offsets disagree, or -1.

   Threads are made for the call, so that a fork finds no pool to break, and take groups as they
   come. One that is put on a busy core keeps the others waiting for its last group, a millisecond
   or more: so only as many as have a millisecond's worth of groups each. */
static int64_t run(job *j, void (*group)(job *, int64_t, int64_t), int threads) {
    work w = {j, group};
    pthread_t others[MAX_THREADS];
    pthread_attr_t attributes;
    int64_t most = j->blocks / (LEAST_GROUPS * GROUP);
    int wanted = threads < most ? threads : (int)most, started = 0;
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
