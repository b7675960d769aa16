/* Adds keyed noise in place. The meaning is that of reference.py; the bits must agree.
 * Products scale x integer are exact, so contraction to fused multiply-add cannot change a result. */
#include <stdint.h>

static inline uint32_t hash(uint32_t x, uint32_t first, uint32_t second) {
    x += first;
    x ^= x >> 17; x *= 0xed5ad4bbu; x ^= second;
    x ^= x >> 11; x *= 0xac4c1b51u;
    x ^= x >> 15; x *= 0x31848babu;
    return x ^ (x >> 14);
}

#define PASS(INTEGER)                                                            \
    for (int64_t i = 0; i < count; i++) {                                        \
        uint32_t x = hash(start + (uint32_t)i, first, second);                   \
        float u = (float)(INTEGER);                                              \
        p[i] += a * u;                                                           \
    }
#define TWO_PASSES(INTEGER)                                                      \
    for (int64_t i = 0; i < count; i++) {                                        \
        uint32_t x = hash(start + (uint32_t)i, first, second);                   \
        float u = (float)(INTEGER);                                              \
        float q = p[i] + a * u;                                                  \
        p[i] = q + b * u;                                                        \
    }
#define BYTES ((int32_t)((x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24)) - 510)
#define SIGN (1 - 2 * (int32_t)(x >> 31))

/* p[i] += a * u[i], then p[i] += b * u[i] when `both`. No element may cross a multiple of 2^32. */
void add_noise(float *p, int64_t count, uint32_t start, uint32_t first, uint32_t second,
               int32_t rademacher, int32_t both, float a, float b) {
    if (rademacher && both) TWO_PASSES(SIGN)
    else if (rademacher) PASS(SIGN)
    else if (both) TWO_PASSES(BYTES)
    else PASS(BYTES)
}
