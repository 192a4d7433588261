/* What is done between the matrix products of a block, each in one pass over memory: see compiled.py, and `Between` in
 * moeprune/model/blocks.py, whose comments on shapes hold here. Arithmetic is in float32. */
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef float f32;
typedef uint16_t bf16;

static inline float of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float load_f32(float x) { return x; }
static inline float store_f32(float x) { return x; }
static inline float load_bf16(bf16 x) { return of_bits((uint32_t)x << 16); }
static inline bf16 store_bf16(float x) {  /* to nearest, ties to even; NaN stays NaN */
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* 1 / (1 + exp(-x)): exp by 2^n times a polynomial (Cephes' expf), about 2 units in the last place. */
static inline float sigmoid(float x) {
    float y = -x;
    y = y > 89.0f ? 89.0f : y; /* whose exponential is infinite */
    y = y < -87.0f ? -87.0f : y;
    float n = (y * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return 1.0f / (1.0f + p * of_bits((uint32_t)((int32_t)n + 127) << 23));
}

#define KERNELS(T)                                                                                                   \
/* h = silu(gate) up w; gu [n, 2 F] holds gate, then up; w [n]; h [n, F] */                                          \
void swiglu_##T(const T *gu, const float *w, T *h, i64 n, i64 F, i64 threads) {                                      \
    _Pragma("omp parallel for num_threads((int)threads) if(threads > 1)")                                            \
    for (i64 i = 0; i < n; i++) {                                                                                    \
        const T *gate = gu + 2 * F * i, *up = gate + F;                                                              \
        T *row = h + F * i;                                                                                          \
        const float weight = w[i];                                                                                   \
        _Pragma("omp simd")                                                                                          \
        for (i64 j = 0; j < F; j++) {                                                                                \
            float g = load_##T(gate[j]);                                                                             \
            row[j] = store_##T(g * sigmoid(g) * load_##T(up[j]) * weight);                                           \
        }                                                                                                            \
    }                                                                                                                \
}                                                                                                                    \
/* dh is the gradient of h / w; writes h, d_gu [n, 2 F] and dw [n] */                                                \
void swiglu_backward_##T(const T *gu, const T *dh, const float *w, T *h, T *d_gu, float *dw, i64 n, i64 F,           \
                         i64 threads) {                                                                              \
    _Pragma("omp parallel for num_threads((int)threads) if(threads > 1)")                                            \
    for (i64 i = 0; i < n; i++) {                                                                                    \
        const T *gate = gu + 2 * F * i, *up = gate + F, *d = dh + F * i;                                             \
        T *row = h + F * i, *d_gate = d_gu + 2 * F * i, *d_up = d_gate + F;                                          \
        const float weight = w[i];                                                                                   \
        float sum = 0;                                                                                               \
        _Pragma("omp simd reduction(+ : sum)")                                                                       \
        for (i64 j = 0; j < F; j++) {                                                                                \
            float g = load_##T(gate[j]), u = load_##T(up[j]), grad = load_##T(d[j]);                                 \
            float s = sigmoid(g), a = g * s;                                                                         \
            sum += grad * u * a;                                                                                     \
            row[j] = store_##T(a * weight * u);                                                                      \
            d_gate[j] = store_##T(grad * u * weight * (s + a * (1.0f - s)));                                         \
            d_up[j] = store_##T(grad * a * weight);                                                                  \
        }                                                                                                            \
        dw[i] = sum;                                                                                                 \
    }                                                                                                                \
}                                                                                                                    \
/* total[at[i]] += rows[i], in the order of i, whatever the number of threads: they share the columns */             \
void add_rows_##T(float *total, const T *rows, const i64 *at, i64 n, i64 D, i64 threads) {                           \
    _Pragma("omp parallel for num_threads((int)threads) if(threads > 1)")                                            \
    for (i64 start = 0; start < D; start += 128) {                                                                   \
        const i64 end = start + 128 < D ? start + 128 : D;                                                           \
        for (i64 i = 0; i < n; i++) {                                                                                \
            float *to = total + D * at[i];                                                                           \
            const T *row = rows + D * i;                                                                             \
            _Pragma("omp simd")                                                                                      \
            for (i64 j = start; j < end; j++) to[j] += load_##T(row[j]);                                             \
        }                                                                                                            \
    }                                                                                                                \
}

KERNELS(f32)
KERNELS(bf16)

/* out[i] = x[at[i]], rows of `bytes` bytes */
void take_rows(char *out, const char *x, const i64 *at, i64 n, i64 bytes, i64 threads) {
    _Pragma("omp parallel for num_threads((int)threads) if(threads > 1)")
    for (i64 i = 0; i < n; i++) memcpy(out + bytes * i, x + bytes * at[i], bytes);
}
