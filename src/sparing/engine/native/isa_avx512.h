// Sixteen lanes as one AVX-512 register, with VNNI dot products.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#define INLINE static inline __attribute__((always_inline))

namespace SPARING_PATH {
#ifdef SPARING_AMX
constexpr int VECTORS = 2;
constexpr int SLAB = 32;  // two tiles of tokens, so that a product reads its activations front to back
#else
constexpr int VECTORS = 4;
constexpr int SLAB = 64;
#endif

struct F { __m512 v; };
struct I { __m512i v; };

INLINE F loadf(const float *p) { return {_mm512_loadu_ps(p)}; }
INLINE void storef(float *p, F x) { _mm512_storeu_ps(p, x.v); }
INLINE F setf(float x) { return {_mm512_set1_ps(x)}; }
INLINE F add(F x, F y) { return {_mm512_add_ps(x.v, y.v)}; }
INLINE F sub(F x, F y) { return {_mm512_sub_ps(x.v, y.v)}; }
INLINE F mul(F x, F y) { return {_mm512_mul_ps(x.v, y.v)}; }
INLINE F div(F x, F y) { return {_mm512_div_ps(x.v, y.v)}; }
INLINE F sqrt(F x) { return {_mm512_sqrt_ps(x.v)}; }
INLINE F min(F x, F y) { return {_mm512_min_ps(x.v, y.v)}; }
INLINE F max(F x, F y) { return {_mm512_max_ps(x.v, y.v)}; }
INLINE F with_sign(F x, F s) {  // the sign bit of s, the other bits of x
  const __m512i bits = _mm512_castps_si512(x.v), sign = _mm512_castps_si512(s.v);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), sign, bits, 0xCA))};
}
INLINE I loadi(const void *p) { return {_mm512_loadu_si512(p)}; }
INLINE void storei(void *p, I x) { _mm512_storeu_si512(p, x.v); }
INLINE I seti(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE I add(I x, I y) { return {_mm512_add_epi32(x.v, y.v)}; }
INLINE I sub(I x, I y) { return {_mm512_sub_epi32(x.v, y.v)}; }
INLINE I times(I x, I y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
INLINE I flip(I x, I y) { return {_mm512_xor_si512(x.v, y.v)}; }
INLINE I max(I x, I y) { return {_mm512_max_epi32(x.v, y.v)}; }
template <int N> INLINE I shl(I x) { return {_mm512_slli_epi32(x.v, N)}; }
INLINE F to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
INLINE I to_int(F x) { return {_mm512_cvtps_epi32(x.v)}; }
INLINE F lookup(const float *table, I n) {  // of 32
  return {_mm512_permutex2var_ps(_mm512_load_ps(table), n.v, _mm512_load_ps(table + 16))};
}
INLINE I saturated_quads(const F *v, int32_t zero) {
  const __m512i z = _mm512_set1_epi16(int16_t(zero));
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(v[0].v), _mm512_cvtps_epi32(v[1].v));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(v[2].v), _mm512_cvtps_epi32(v[3].v));
  const __m512i bytes = _mm512_packus_epi16(_mm512_adds_epi16(ab, z), _mm512_adds_epi16(cd, z));
  return {_mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400))};
}
INLINE F add_exponent(F x, I n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_slli_epi32(n.v, 23)))};
}
INLINE I dot4(I sum, I x, I w) { return {_mm512_dpbusd_epi32(sum.v, x.v, w.v)}; }
INLINE void store_bytes(void *p, I x) { _mm_storeu_si128(static_cast<__m128i *>(p), _mm512_cvtepi32_epi8(x.v)); }
INLINE void store_columns(void *p, int64_t stride, I x) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_i32scatter_epi32(p, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int32_t(stride))), x.v, 1);
}
#ifdef SPARING_AMX
INLINE void interleave(const uint8_t *, const uint8_t *, const uint8_t *, const uint8_t *, I *) {}  // never called
INLINE void restore(I *) {}
#else
// 64 tokens: element e of 128-bit lane L of x[v] is token 16 L + 4 v + e
INLINE void interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d, I *x) {
  const __m512i ra = loadi(a).v, rb = loadi(b).v, rc = loadi(c).v, rd = loadi(d).v;
  const __m512i ab0 = _mm512_unpacklo_epi8(ra, rb), ab1 = _mm512_unpackhi_epi8(ra, rb);
  const __m512i cd0 = _mm512_unpacklo_epi8(rc, rd), cd1 = _mm512_unpackhi_epi8(rc, rd);
  x[0].v = _mm512_unpacklo_epi16(ab0, cd0);
  x[1].v = _mm512_unpackhi_epi16(ab0, cd0);
  x[2].v = _mm512_unpacklo_epi16(ab1, cd1);
  x[3].v = _mm512_unpackhi_epi16(ab1, cd1);
}
// back to tokens in order: a transposition of the four vectors' 128-bit lanes
INLINE void restore(I *x) {
  const __m512i a = _mm512_shuffle_i32x4(x[0].v, x[1].v, 0x44), b = _mm512_shuffle_i32x4(x[2].v, x[3].v, 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x[0].v, x[1].v, 0xEE), d = _mm512_shuffle_i32x4(x[2].v, x[3].v, 0xEE);
  x[0].v = _mm512_shuffle_i32x4(a, b, 0x88);
  x[1].v = _mm512_shuffle_i32x4(a, b, 0xDD);
  x[2].v = _mm512_shuffle_i32x4(c, d, 0x88);
  x[3].v = _mm512_shuffle_i32x4(c, d, 0xDD);
}
#endif
INLINE void transpose(const float *p, int64_t from, float *q, int64_t to) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i steps = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int32_t(from)));
  for (int j = 0; j < 16; ++j) _mm512_storeu_ps(q + j * to, _mm512_i32gather_ps(steps, p + j, 4));
}
}  // namespace SPARING_PATH
