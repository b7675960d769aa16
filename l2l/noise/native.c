/* One traversal over many pieces of memory: keyed noise is added, sums are taken on the way.
 * The meaning is that of reference.py, and the bits must agree. Products scale x integer are exact; the build forbids
 * contraction to fused multiply-add, which would change the sums. */
#include <stdint.h>
#include <string.h>

#define CHUNK 32768
#define TASK 8 /* chunks that a thread takes at a time */
#define INLINE static inline __attribute__((always_inline))

typedef float f8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef double d8 __attribute__((vector_size(64)));
typedef float f16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef int32_t s16 __attribute__((vector_size(64)));

typedef struct {
    const void *source; /* read */
    void *target;       /* written in the source's type; NULL where only sums are wanted */
    uint16_t *copy;     /* receives the result as bfloat16; NULL where there is none */
    int64_t count, first_task, first_chunk;
    uint32_t start, shift, words[2][2], rounding[2]; /* shift: of the first stream's hash */
    float scales[2][2], restoring, centre;           /* the second stream is added once */
} piece;

typedef struct job {
    const piece *pieces;
    double *sums; /* [chunks][5][8] or NULL */
    const uint32_t *shifts, *amounts; /* [terms], and floats [pieces][terms]: of bits of one hash, in place of streams */
    const struct job *then;           /* the same elements again: chunk by chunk, while they are in the cache */
    const uint32_t *keys;             /* [pieces][streams][2]: of many streams, in place of two; else NULL */
    int64_t n, tasks, next, terms, streams; /* of many streams, shifts [streams] are the adds of each, terms all adds */
    int32_t half, first, second, rademacher, rounding; /* first, second: scales used of each stream */
} job;

INLINE uint32_t hash(uint32_t x, const uint32_t *words) {
    x += words[0];
    x ^= x >> 17; x *= 0xed5ad4bbu; x ^= words[1];
    x ^= x >> 11; x *= 0xac4c1b51u;
    x ^= x >> 15; x *= 0x31848babu;
    return x ^ (x >> 14);
}

INLINE float integer(uint32_t x, uint32_t shift, int rademacher) {
    if (rademacher) return (float)(1 - 2 * (int32_t)((x << shift) >> 31));
    uint32_t pairs = (x & 0xff00ffu) + ((x >> 8) & 0xff00ffu); /* two sums of two bytes */
    return (float)((int32_t)((pairs + (pairs >> 16)) & 0xffffu) - 510);
}

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint16_t narrow(float value, uint32_t up) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nan = (bits & 0x7fffffffu) > 0x7f800000u;
    uint32_t moved = (bits + up) >> 16;
    return (uint16_t)(nan ? 0x7fc0u : moved);
}

INLINE uint16_t nearest(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return narrow(value, 0x7fffu + ((bits >> 16) & 1u));
}

INLINE uint16_t stochastic(float value, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
    return narrow(value, finite ? random & 0xffffu : 0u);
}

/* The loops below are compiled once for every combination of these constants. */
typedef struct { int half, first, second, rademacher, copied, stochastic; } shape;

INLINE float moved(float value, uint32_t at, const piece *p, const shape s) {
    if (s.first) {
        float u = integer(hash(at, p->words[0]), p->shift, s.rademacher);
        value += p->scales[0][0] * u;
        if (s.first > 1) value += p->scales[0][1] * u;
    }
    if (s.second) value += p->scales[1][0] * integer(hash(at, p->words[1]), 0, s.rademacher);
    return value;
}

INLINE uint16_t rounded(float value, uint32_t at, const piece *p, const shape s) {
    return s.stochastic ? stochastic(value, hash(at, p->rounding)) : nearest(value);
}

INLINE void add(const piece *given, int64_t from, int64_t to, const shape s) {
    const piece own = *given, *p = &own; /* a copy that no store can touch */
    if (s.half) {
        const uint16_t *source = (const uint16_t *)p->source;
        uint16_t *target = (uint16_t *)p->target;
        for (int64_t i = from; i < to; i++) {
            uint32_t at = p->start + (uint32_t)i;
            float value = moved(widen(source[i]), at, p, s);
            target[i] = rounded(value, at, p, s);
        }
        return;
    }
    const float *source = (const float *)p->source;
    float *target = (float *)p->target;
    if (!s.copied) {
        for (int64_t i = from; i < to; i++) target[i] = moved(source[i], p->start + (uint32_t)i, p, s);
        return;
    }
    uint16_t *copy = p->copy;
    for (int64_t i = from; i < to; i++) {
        uint32_t at = p->start + (uint32_t)i;
        float value = moved(source[i], at, p, s);
        target[i] = value;
        copy[i] = rounded(value, at, p, s);
    }
}

/* ---- bits of one hash: their signed amounts are summed, and added as one ---- */

#define VECTORS 4
#define BLOCK (16 * VECTORS)

INLINE u16 hash_of_16(u16 x, const uint32_t *words) {
    x += words[0];
    x ^= x >> 17; x *= 0xed5ad4bbu; x ^= words[1];
    x ^= x >> 11; x *= 0xac4c1b51u;
    x ^= x >> 15; x *= 0x31848babu;
    return x ^ (x >> 14);
}

/* Up to BLOCK elements from i on; `size` is a constant wherever speed matters. */
INLINE void add_bits_to(const piece *p, const job *j, const uint32_t *amounts, int64_t i, int size, const shape s) {
    const u16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint32_t at = p->start + (uint32_t)i;
    u16 x[VECTORS];
    f16 total[VECTORS], value[VECTORS] = {{0}};
    float row[BLOCK];
    for (int v = 0; v < VECTORS; v++) {
        x[v] = hash_of_16(at + 16 * (uint32_t)v + lane, p->words[0]);
        total[v] = (f16)(((x[v] << j->shifts[0]) & 0x80000000u) ^ amounts[0]);
    }
    for (int64_t k = 1; k < j->terms; k++)
        for (int v = 0; v < VECTORS; v++) total[v] += (f16)(((x[v] << j->shifts[k]) & 0x80000000u) ^ amounts[k]);
    if (s.half) {
        for (int k = 0; k < size; k++) row[k] = widen(((const uint16_t *)p->source)[i + k]);
        memcpy(value, row, (size_t)size * 4);
    } else memcpy(value, (const float *)p->source + i, (size_t)size * 4);
    for (int v = 0; v < VECTORS; v++) value[v] += total[v];
    if (!s.half) memcpy((float *)p->target + i, value, (size_t)size * 4);
    if (s.half || s.copied) {
        uint16_t *out = s.half ? (uint16_t *)p->target : p->copy;
        memcpy(row, value, sizeof row);
        for (int k = 0; k < size; k++) out[i + k] = rounded(row[k], at + (uint32_t)k, p, s);
    }
}

INLINE void add_bits(const piece *given, const job *j, int64_t from, int64_t to, const shape s) {
    const piece own = *given, *p = &own;
    const uint32_t *amounts = j->amounts + (given - j->pieces) * j->terms;
    int64_t i = from;
    for (; i + BLOCK <= to; i += BLOCK) add_bits_to(p, j, amounts, i, BLOCK, s);
    if (i < to) add_bits_to(p, j, amounts, i, (int)(to - i), s);
}

/* ---- many streams, each added in turn some times, while the elements are in registers ---- */

INLINE f16 integer_of_16(u16 x, const int rademacher) {
    if (rademacher) return __builtin_convertvector(1 - 2 * (s16)(x >> 31), f16);
    u16 pairs = (x & 0xff00ffu) + ((x >> 8) & 0xff00ffu);
    return __builtin_convertvector((s16)((pairs + (pairs >> 16)) & 0xffffu) - 510, f16);
}

INLINE void add_many_to(const piece *p, const job *j, const uint32_t *keys, const float *amounts, int64_t i, int size,
                        const int rademacher) {
    const u16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint32_t at = p->start + (uint32_t)i;
    f16 value[VECTORS] = {{0}}, u[VECTORS];
    memcpy(value, (const float *)p->source + i, (size_t)size * 4);
    for (int64_t k = 0; k < j->streams; k++) {
        for (int v = 0; v < VECTORS; v++)
            u[v] = integer_of_16(hash_of_16(at + 16 * (uint32_t)v + lane, keys + 2 * k), rademacher);
        for (uint32_t a = 0; a < j->shifts[k]; a++, amounts++)
            for (int v = 0; v < VECTORS; v++) value[v] += *amounts * u[v];
    }
    memcpy((float *)p->target + i, value, (size_t)size * 4);
}

INLINE void add_many(const piece *given, const job *j, int64_t from, int64_t to, const int rademacher) {
    const piece own = *given, *p = &own;
    const uint32_t *keys = j->keys + (given - j->pieces) * j->streams * 2;
    const float *amounts = (const float *)j->amounts + (given - j->pieces) * j->terms;
    int64_t i = from;
    for (; i + BLOCK <= to; i += BLOCK) add_many_to(p, j, keys, amounts, i, BLOCK, rademacher);
    if (i < to) add_many_to(p, j, keys, amounts, i, (int)(to - i), rademacher);
}

/* ---- with sums: at most one stream; eight lanes, added up as RUN and LANES in reference.py prescribe ---- */

INLINE f8 wide_integer(u8 x, const int rademacher) {
    if (rademacher) return __builtin_convertvector(1 - 2 * (i8)(x >> 31), f8);
    u8 pairs = (x & 0xff00ffu) + ((x >> 8) & 0xff00ffu);
    return __builtin_convertvector((i8)((pairs + (pairs >> 16)) & 0xffffu) - 510, f8);
}

INLINE u8 wide_hash(u8 x, const uint32_t *words) {
    x += words[0];
    x ^= x >> 17; x *= 0xed5ad4bbu; x ^= words[1];
    x ^= x >> 11; x *= 0xac4c1b51u;
    x ^= x >> 15; x *= 0x31848babu;
    return x ^ (x >> 14);
}

/* Up to eight elements from i on; `size` is a constant wherever speed matters. */
INLINE void eight(const piece *p, int64_t i, int size, const shape s, f8 *sums) {
    const u8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    f8 value = {0}, u = {0};
    if (s.half)
        for (int k = 0; k < size; k++) value[k] = widen(((const uint16_t *)p->source)[i + k]);
    else memcpy(&value, (const float *)p->source + i, (size_t)size * 4);
    if (s.first) {
        u8 x = wide_hash(p->start + (uint32_t)i + lane, p->words[0]);
        u = wide_integer(s.rademacher ? x << p->shift : x, s.rademacher);
        value += p->scales[0][0] * u;
        if (s.first > 1) value += p->scales[0][1] * u;
        if (s.half)
            for (int k = 0; k < 8; k++) value[k] = widen(nearest(value[k]));
    }
    if (p->target) {
        if (s.half)
            for (int k = 0; k < size; k++) ((uint16_t *)p->target)[i + k] = nearest(value[k]);
        else memcpy((float *)p->target + i, &value, (size_t)size * 4);
    }
    if (p->copy)
        for (int k = 0; k < size; k++) p->copy[i + k] = nearest(value[k]);
    f8 d = (value + p->restoring * u) - p->centre;
    for (int k = size; k < 8; k++) d[k] = u[k] = 0;
    sums[0] += d; sums[1] += d * d; sums[2] += d * u; sums[3] += u; sums[4] += u * u;
}

INLINE void gather(const piece *given, int64_t from, int64_t to, const shape s, double *out) {
    const piece own = *given, *p = &own;
    d8 total[5] = {{0}};
    for (int64_t run = from; run < to; run += 512) {
        f8 sums[5] = {{0}};
        int64_t end = run + 512 < to ? run + 512 : to, i = run;
        for (; i + 8 <= end; i += 8) eight(p, i, 8, s, sums);
        if (i < end) eight(p, i, (int)(end - i), s, sums);
        for (int k = 0; k < 5; k++) total[k] += __builtin_convertvector(sums[k], d8);
    }
    memcpy(out, total, sizeof total);
}

INLINE void in_form(const piece *p, const job *j, int64_t from, int64_t to, const int bits, const shape s) {
    if (bits) add_bits(p, j, from, to, s); else add(p, from, to, s);
}

INLINE void add_in_form(const piece *p, const job *j, int64_t from, int64_t to, const int bits,
                        const int first, const int second, const int rademacher) {
    if (j->half && j->rounding) in_form(p, j, from, to, bits, (shape){1, first, second, rademacher, 0, 1});
    else if (j->half) in_form(p, j, from, to, bits, (shape){1, first, second, rademacher, 0, 0});
    else if (p->copy == 0) in_form(p, j, from, to, bits, (shape){0, first, second, rademacher, 0, 0});
    else if (j->rounding) in_form(p, j, from, to, bits, (shape){0, first, second, rademacher, 1, 1});
    else in_form(p, j, from, to, bits, (shape){0, first, second, rademacher, 1, 0});
}

#define ADD(FIRST, SECOND, RADEMACHER) add_in_form(p, j, from, to, 0, FIRST, SECOND, RADEMACHER); break

static void part(const piece *p, const job *j, int64_t from, int64_t to) {
    if (j->streams) {
        if (j->rademacher) add_many(p, j, from, to, 1); else add_many(p, j, from, to, 0);
        return;
    }
    if (j->terms) { add_in_form(p, j, from, to, 1, 0, 0, 0); return; }
    switch (j->first == 0 ? 0 : j->rademacher * 4 + j->first * 2 + j->second - 1) {
    case 0: ADD(0, 0, 0); /* a second stream only follows a first */
    case 1: ADD(1, 0, 0);
    case 2: ADD(1, 1, 0);
    case 3: ADD(2, 0, 0);
    case 4: ADD(2, 1, 0);
    case 5: ADD(1, 0, 1);
    case 6: ADD(1, 1, 1);
    case 7: ADD(2, 0, 1);
    default: ADD(2, 1, 1);
    }
}

#define GATHER(HALF, FIRST, RADEMACHER) gather(p, from, to, (shape){HALF, FIRST, 0, RADEMACHER, 0, 0}, out); break
#define EACH_GATHER(HALF)                                                             \
    switch (first == 0 ? 0 : rademacher * 2 + first) {                                \
    case 0: GATHER(HALF, 0, 0);                                                       \
    case 1: GATHER(HALF, 1, 0);                                                       \
    case 2: GATHER(HALF, 2, 0);                                                       \
    case 3: GATHER(HALF, 1, 1);                                                       \
    default: GATHER(HALF, 2, 1);                                                      \
    }

static void part_sums(const piece *p, int64_t from, int64_t to, int half, int first, int rademacher, double *out) {
    if (half) { EACH_GATHER(1) } else { EACH_GATHER(0) }
}

#define STRIDE 256 /* elements between requests for memory */
#define AHEAD 512  /* elements that it is asked for before its turn: without it, loops waited half of the time */

INLINE void request(const piece *p, int64_t at, int half) {
    const char *memory = (const char *)p->source + (at + AHEAD) * (half ? 2 : 4);
    for (int k = 0; k < STRIDE * (half ? 2 : 4); k += 64) __builtin_prefetch(memory + k);
}

/* Works until no task is left; any number of threads may run it on the same job. Which thread takes which task changes
 * no bit: elements are independent, and sums are kept per chunk. */
void add_noise(job *j) {
    for (;;) {
        int64_t task = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (task >= j->tasks) return;
        int64_t low = 0, high = j->n - 1; /* the piece that this task belongs to */
        while (low < high) {
            int64_t middle = (low + high + 1) / 2;
            if (j->pieces[middle].first_task <= task) low = middle; else high = middle - 1;
        }
        const piece *p = j->pieces + low;
        int64_t from = (task - p->first_task) * TASK * CHUNK, to = from + TASK * CHUNK;
        if (to > p->count) to = p->count;
        for (int64_t chunk = from; chunk < to && !j->sums; chunk += CHUNK) {
            int64_t end = chunk + CHUNK < to ? chunk + CHUNK : to;
            for (int64_t at = chunk; at < end; at += STRIDE) {
                request(p, at, j->half);
                part(p, j, at, at + STRIDE < end ? at + STRIDE : end);
            }
            for (const job *k = j->then; k; k = k->then) part(k->pieces + low, k, chunk, end);
        }
        for (int64_t at = from; at < to && j->sums; at += CHUNK)
            part_sums(p, at, at + CHUNK < to ? at + CHUNK : to, j->half, j->first, j->rademacher,
                      j->sums + (p->first_chunk + at / CHUNK) * 40);
    }
}
