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
INLINE I min(I x, I y) { return {_mm512_min_epi32(x.v, y.v)}; }
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
// 16 rows of 16 floats, `from` apart, to 16 columns, `to` apart
INLINE void transpose(const float *p, int64_t from, float *q, int64_t to) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(p + i * from);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // a[4 g + c]: in lane L, column 4 L + c of rows 4 g … 4 g + 3
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_ps(q + c * to, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(q + (4 + c) * to, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(q + (8 + c) * to, _mm512_shuffle_f32x4(even, even2, 0xDD));
    _mm512_storeu_ps(q + (12 + c) * to, _mm512_shuffle_f32x4(odd, odd2, 0xDD));
  }
}
}  // namespace SPARING_PATH
