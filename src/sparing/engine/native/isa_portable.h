// Sixteen lanes in plain C++: right everywhere, fast nowhere.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define INLINE static inline

namespace SPARING_PATH {
constexpr int VECTORS = 1;  // vectors of 16 tokens that a product keeps in registers
constexpr int SLAB = 64;

struct F { float v[16]; };
struct I { int32_t v[16]; };
#define EACH for (int l = 0; l < 16; ++l)

INLINE F loadf(const float *p) { F r; memcpy(r.v, p, 64); return r; }
INLINE void storef(float *p, F a) { memcpy(p, a.v, 64); }
INLINE F setf(float x) { F r; EACH r.v[l] = x; return r; }
INLINE F add(F a, F b) { EACH a.v[l] += b.v[l]; return a; }
INLINE F sub(F a, F b) { EACH a.v[l] -= b.v[l]; return a; }
INLINE F mul(F a, F b) { EACH a.v[l] *= b.v[l]; return a; }
INLINE F div(F a, F b) { EACH a.v[l] /= b.v[l]; return a; }
INLINE F sqrt(F a) { EACH a.v[l] = sqrtf(a.v[l]); return a; }
INLINE F min(F a, F b) { EACH a.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l]; return a; }
INLINE F max(F a, F b) { EACH a.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l]; return a; }
INLINE F with_sign(F a, F s) { EACH a.v[l] = copysignf(a.v[l], s.v[l]); return a; }
INLINE I loadi(const void *p) { I r; memcpy(r.v, p, 64); return r; }
INLINE void storei(void *p, I a) { memcpy(p, a.v, 64); }
INLINE I seti(int32_t x) { I r; EACH r.v[l] = x; return r; }
INLINE I add(I a, I b) { EACH a.v[l] = int32_t(uint32_t(a.v[l]) + uint32_t(b.v[l])); return a; }
INLINE I sub(I a, I b) { EACH a.v[l] = int32_t(uint32_t(a.v[l]) - uint32_t(b.v[l])); return a; }
INLINE I times(I a, I b) { EACH a.v[l] = int32_t(uint32_t(a.v[l]) * uint32_t(b.v[l])); return a; }
INLINE I flip(I a, I b) { EACH a.v[l] ^= b.v[l]; return a; }
INLINE I min(I a, I b) { EACH a.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l]; return a; }
template <int N> INLINE I shl(I a) { EACH a.v[l] = int32_t(uint32_t(a.v[l]) << N); return a; }
INLINE F to_float(I a) { F r; EACH r.v[l] = float(a.v[l]); return r; }
// half to even: in 2²³ … 2²⁴ floats are the whole numbers; |x| < 2²² holds wherever this is called
INLINE I to_int(F a) {
  I r;
  EACH r.v[l] = int32_t((a.v[l] + 12582912.0f) - 12582912.0f);
  return r;
}
INLINE F lookup(const float *table, I n) {
  F r;
  EACH r.v[l] = table[n.v[l]];
  return r;
}
// whole numbers nearest to four vectors, plus zero, held within 0…255, as the four bytes of every lane
INLINE I saturated_quads(const F *v, int32_t zero) {
  I r = seti(0);
  for (int i = 0; i < 4; ++i)
    EACH {
      // below −2¹⁵ the result is 0 whatever it is, and the conversion stays defined
      const float bounded = v[i].v[l] < -32768.0f ? -32768.0f : v[i].v[l];
      const int32_t n = int32_t((bounded + 12582912.0f) - 12582912.0f) + zero;
      r.v[l] = int32_t(uint32_t(r.v[l]) | uint32_t(n < 0 ? 0 : n) << (8 * i));
    }
  return r;
}
INLINE F add_exponent(F a, I n) {
  EACH {
    uint32_t bits;
    memcpy(&bits, &a.v[l], 4);
    bits += uint32_t(n.v[l]) << 23;
    memcpy(&a.v[l], &bits, 4);
  }
  return a;
}
INLINE I dot4(I sum, I x, I w) {
  uint8_t u[64];
  int8_t s[64];
  memcpy(u, x.v, 64);
  memcpy(s, w.v, 64);
  EACH for (int j = 0; j < 4; ++j) sum.v[l] += int32_t(u[4 * l + j]) * int32_t(s[4 * l + j]);
  return sum;
}
INLINE void store_bytes(void *p, I a) { EACH static_cast<uint8_t *>(p)[l] = uint8_t(a.v[l]); }
INLINE void store_columns(void *p, int64_t stride, I a) { EACH memcpy(static_cast<char *>(p) + l * stride, &a.v[l], 4); }
INLINE void interleave(const uint8_t *a, const uint8_t *b, const uint8_t *c, const uint8_t *d, I *x) {
  uint8_t t[64];
  EACH {
    t[4 * l] = a[l];
    t[4 * l + 1] = b[l];
    t[4 * l + 2] = c[l];
    t[4 * l + 3] = d[l];
  }
  memcpy(x->v, t, 64);
}
INLINE void restore(I *) {}
// 16 rows of 16 floats, `from` apart, to 16 columns, `to` apart
INLINE void transpose(const float *p, int64_t from, float *q, int64_t to) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) q[j * to + i] = p[i * from + j];
}
#undef EACH
}  // namespace SPARING_PATH
