/* Vectors of fp32 in the width the target has, and the few functions the kernels need of them.
 *
 * Written with GCC's vector extensions (clang has them too), so the same source serves AVX-512, AVX2, NEON and
 * plain SSE; AVX-512 alone gets a few intrinsics whose portable forms cost several instructions. Polynomials are
 * minimax fits of our own; the error stated beside each is the fit's, before rounding to fp32 (6e-8).
 */
#ifndef SSM_VEC_H
#define SSM_VEC_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define VL 16
#elif defined(__AVX__)
#include <immintrin.h>
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_set(float s) { return s - (vf){0}; }

/* The first `n` lanes of a row; the rest are 0. `full` is a compile-time constant: n == VL. */
INLINE vf v_load(const float *p, int full, int n) {
  if (full) return *(const vf_any *)p;
  vf r = {0};
  for (int i = 0; i < n; i++) r[i] = p[i];
  return r;
}

INLINE void v_store(float *p, vf v, int full, int n) {
  if (full) {
    *(vf_any *)p = v;
    return;
  }
  for (int i = 0; i < n; i++) p[i] = v[i];
}

INLINE vf v_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* The larger (smaller) of x and a bound; NaN in x stays NaN. */
INLINE vf v_at_least(vf x, float bound) {
#if VL == 16
  return (vf)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif VL == 8
  return (vf)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return v_select(x < v_set(bound), v_set(bound), x);
#endif
}

INLINE vf v_at_most(vf x, float bound) {
#if VL == 16
  return (vf)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#elif VL == 8
  return (vf)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#else
  return v_select(x > v_set(bound), v_set(bound), x);
#endif
}

INLINE vf v_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* p 2^n for whole n held as a float; n within [-150, 150] on AVX-512, [-127, 128] elsewhere, where -127 gives 0 and
 * 128 gives infinity. */
#if VL == 16
INLINE vf v_round(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, 8); }
INLINE vf v_scale(vf p, vf n) { return (vf)_mm512_scalef_ps((__m512)p, (__m512)n); }
#define EXP2_LOW -150.0f
#define EXP2_HIGH 150.0f
#else
/* Adding 1.5 2^23 rounds to a whole number and leaves it in the low bits. */
INLINE vf v_round(vf x) { return (x + 12582912.0f) - 12582912.0f; }
INLINE vf v_scale(vf p, vf n) {
  vi bits = (vi)(n + (12582912.0f + 127.0f));
  return p * (vf)(bits << 23);
}
#define EXP2_LOW -127.0f
#define EXP2_HIGH 128.0f
#endif

/* The part of x that rounding to a whole number takes away, 0 for infinities, and x without it. AVX-512 needs no
 * bounds on x: its scaling takes any. */
#if defined(__AVX512DQ__)
INLINE vf v_exp2_whole(vf x, vf *rest) {
  *rest = (vf)_mm512_reduce_ps((__m512)x, 8);
  return x - *rest;
}
#else
INLINE vf v_exp2_whole(vf x, vf *rest) {
  x = v_at_most(v_at_least(x, EXP2_LOW), EXP2_HIGH);
  vf n = v_round(x);
  *rest = x - n;
  return n;
}
#endif

/* 2^x. Fit 9.2e-8 relative, exact at whole x, so that a slow decay is not biased. x below -127 gives 0 (below -150
 * with AVX-512, subnormal between), above 128 infinity; NaN stays. */
INLINE vf v_exp2(vf x) {
  vf f, n = v_exp2_whole(x, &f);
  vf p = v_set(0x1.5bba13e2fd8bfp-10f);
  p = p * f + 0x1.3cea87596704ap-7f;
  p = p * f + 0x1.c6b752df2f801p-5f;
  p = p * f + 0x1.ebf9bb8a6880ep-3f;
  p = p * f + 0x1.62e429203728bp-1f;
  p = p * f + 1.0f;
  return v_scale(p, n);
}

/* e^x, the reduction in two parts so that the error stays near 1e-7 over the whole range. Fit 2e-9 relative. */
INLINE vf v_exp(vf x) {
  x = v_at_most(v_at_least(x, 0.6931471806f * EXP2_LOW), 0.6931471806f * EXP2_HIGH);
  vf n = v_round(x * 1.4426950409f);
  vf r = x - n * 0.693145751953125f; /* ln 2 in 15 bits: the product is exact */
  r = r - n * 1.42860682030941723212e-6f;
  vf p = v_set(0.00138437f);
  p = p * r + 0.00837416f;
  p = p * r + 0.041668f;
  p = p * r + 0.16666431f;
  p = p * r + 0.49999994f;
  p = p * r + 1.00000003f;
  p = p * r + 1.0f;
  return v_scale(p, n);
}

/* softplus(x) = max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 atanh(e / (2 + e)) (fit 1.1e-10 relative): small
 * results keep their relative accuracy, above 20 it is x. */
INLINE vf v_softplus(vf x) {
  vf e = v_exp(-v_abs(x));
  vf s = e / (e + 2.0f), w = s * s;
  vf p = v_set(0.12144779f);
  p = p * w + 0.1071537f;
  p = p * w + 0.14308298f;
  p = p * w + 0.19999444f;
  p = p * w + 0.33333338f;
  p = p * w + 1.0f;
  return v_at_least(x, 0.0f) + (s + s) * p;
}

/* 1 / (1 + e^-x), small results relatively accurate. */
INLINE vf v_sigmoid(vf x) {
  vf e = v_exp(-v_abs(x));
  return v_select(x < (vf){0}, e, v_set(1.0f)) / (e + 1.0f);
}

/* sums[i] = the sum over the lanes of v[i], for `count` vectors, a multiple of VL. */
#if defined(__clang__) || !defined(__GNUC__)
static __attribute__((unused)) void v_sum_lanes(const vf *v, float *sums, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    float s = 0;
    for (int j = 0; j < VL; j++) s += v[i][j];
    sums[i] = s;
  }
}
#else
/* VL vectors at a time, merged in pairs: each merge halves the lanes that a vector's sum is spread over. */
static __attribute__((unused)) void v_sum_lanes(const vf *v, float *sums, int64_t count) {
  vi low[5], high[5];
  int stages = 0;
  for (int w = VL; w > 1; w /= 2, stages++)
    for (int j = 0; j < VL; j++) {
      int in = j % (VL / 2), at = in / (w / 2) * w + in % (w / 2) + (j >= VL / 2 ? VL : 0);
      low[stages][j] = at;
      high[stages][j] = at + w / 2;
    }
  for (int64_t i = 0; i < count; i += VL) {
    vf part[VL];
    memcpy(part, v + i, sizeof part);
    for (int stage = 0, n = VL / 2; n > 0; n /= 2, stage++)
      for (int k = 0; k < n; k++)
        part[k] = __builtin_shuffle(part[2 * k], part[2 * k + 1], low[stage]) +
                  __builtin_shuffle(part[2 * k], part[2 * k + 1], high[stage]);
    *(vf_any *)(sums + i) = part[0];
  }
}
#endif

#endif
