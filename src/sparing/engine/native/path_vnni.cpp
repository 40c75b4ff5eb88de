#define SPARING_PATH vnni
#include "isa_avx512.h"
#include "operators.h"

extern "C" __attribute__((visibility("hidden"))) void sparing_run_vnni(const Op *ops, int64_t count, const Run *run, double *seconds) {
  vnni::run_operators(ops, count, *run, seconds);
}

// multiplications of one second when nothing but registers is multiplied
extern "C" __attribute__((visibility("hidden"))) double sparing_peak_vnni() {
  __m512i sums[12];
  const __m512i x = _mm512_set1_epi32(0x01010101);
#pragma GCC unroll 12
  for (int j = 0; j < 12; ++j) sums[j] = _mm512_setzero_si512();
  const int64_t rounds = 200000;
  const double start = vnni::now();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      sums[j] = _mm512_dpbusd_epi32(sums[j], x, x);
      __asm__ volatile("" : "+v"(sums[j]));
    }
  }
  return double(rounds) * 12 * 64 / (vnni::now() - start);
}

// bytes of one second that a core reads from memory it has just gone through, in order
extern "C" __attribute__((visibility("hidden"))) double sparing_stream_vnni(const void *from, int64_t bytes) {
  const char *p = static_cast<const char *>(from);
  __m512i sum[4] = {};
  const int64_t rounds = 3;
  double start = 0;
  for (int64_t i = -1; i < rounds; ++i) {
    if (i == 0) start = vnni::now();
    for (int64_t at = 0; at + 256 <= bytes; at += 256)
      for (int j = 0; j < 4; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(p + at + 64 * j));
  }
  for (__m512i &part : sum) __asm__ volatile("" : "+v"(part));
  return double(rounds) * double(bytes) / (vnni::now() - start);
}
