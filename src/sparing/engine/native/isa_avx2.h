// Sixteen lanes as two AVX2 registers. Products go through 16 bits, since 8-bit ones would saturate.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#define INLINE static inline __attribute__((always_inline))

namespace SPARING_PATH {
constexpr int VECTORS = 1;
constexpr int SLAB = 64;

struct F { __m256 a, b; };
struct I { __m256i a, b; };

INLINE F loadf(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void storef(float *p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
INLINE F setf(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE __m256 with_sign(__m256 x, __m256 s) {
  const __m256 m = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(m, x), _mm256_and_ps(m, s));
}
INLINE F with_sign(F x, F s) { return {with_sign(x.a, s.a), with_sign(x.b, s.b)}; }
INLINE I loadi(const void *p) {
  return {_mm256_loadu_si256(static_cast<const __m256i *>(p)), _mm256_loadu_si256(static_cast<const __m256i *>(p) + 1)};
}
INLINE void storei(void *p, I x) {
  _mm256_storeu_si256(static_cast<__m256i *>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i *>(p) + 1, x.b);
}
INLINE I seti(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
INLINE I times(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
INLINE I flip(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
INLINE I min(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
template <int N> INLINE I shl(I x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE F lookup(const float *table, I n) {
  return {_mm256_i32gather_ps(table, n.a, 4), _mm256_i32gather_ps(table, n.b, 4)};
}
INLINE __m256i saturated_quads(__m256 a, __m256 b, __m256 c, __m256 d, __m256i zero) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
  const __m256i bytes = _mm256_packus_epi16(_mm256_adds_epi16(ab, zero), _mm256_adds_epi16(cd, zero));
  const __m256i order = _mm256_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0, 15, 11, 7, 3, 14, 10, 6, 2, 13,
                                        9, 5, 1, 12, 8, 4, 0);
  return _mm256_shuffle_epi8(bytes, order);
}
INLINE I saturated_quads(const F *v, int32_t zero) {
  const __m256i z = _mm256_set1_epi16(int16_t(zero));
  return {saturated_quads(v[0].a, v[1].a, v[2].a, v[3].a, z), saturated_quads(v[0].b, v[1].b, v[2].b, v[3].b, z)};
}
INLINE F add_exponent(F x, I n) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.a), _mm256_slli_epi32(n.a, 23))),
          _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.b), _mm256_slli_epi32(n.b, 23)))};
}
INLINE __m256i dot4(__m256i sum, __m256i x, __m256i even, __m256i odd) {
  const __m256i low = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), even);
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_srli_epi16(x, 8), odd)));
}
// all lanes of w are equal wherever this is called
INLINE I dot4(I sum, I x, I w) {
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w.a, 8), 8), odd = _mm256_srai_epi16(w.a, 8);
  return {dot4(sum.a, x.a, even, odd), dot4(sum.b, x.b, even, odd)};
}
INLINE void store_bytes(void *p, I x) {
  const __m256i m = _mm256_set1_epi32(255);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m));
  const __m256i in_order = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
  _mm_storeu_si128(static_cast<__m128i *>(p), bytes);
}
INLINE void store_columns(void *p, int64_t stride, I x) {
  alignas(32) int32_t t[16];
  storei(t, x);
  for (int l = 0; l < 16; ++l) memcpy(static_cast<char *>(p) + l * stride, t + l, 4);
}
INLINE void interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d, I *x) {
  const auto load = [](const uint8_t *p) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)); };
  const __m128i ra = load(a), rb = load(b), rc = load(c), rd = load(d);
  const __m128i ab0 = _mm_unpacklo_epi8(ra, rb), ab1 = _mm_unpackhi_epi8(ra, rb);
  const __m128i cd0 = _mm_unpacklo_epi8(rc, rd), cd1 = _mm_unpackhi_epi8(rc, rd);
  x->a = _mm256_set_m128i(_mm_unpackhi_epi16(ab0, cd0), _mm_unpacklo_epi16(ab0, cd0));
  x->b = _mm256_set_m128i(_mm_unpackhi_epi16(ab1, cd1), _mm_unpacklo_epi16(ab1, cd1));
}
INLINE void restore(I *) {}
INLINE void transpose(const float *p, int64_t from, float *q, int64_t to) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) q[j * to + i] = p[i * from + j];
}
}  // namespace SPARING_PATH
