// The C interface, and what this CPU and its operating system allow.
#include "engine.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define PUBLIC extern "C" __attribute__((visibility("default")))

using Path = void(const Op *, int64_t, const Run *, double *);
extern "C" {
Path sparing_run_portable;
#ifdef SPARING_HAS_AVX2
Path sparing_run_avx2;
#endif
#ifdef SPARING_HAS_VNNI
Path sparing_run_vnni;
double sparing_peak_vnni();
double sparing_stream_vnni(const void *, int64_t);
#endif
#ifdef SPARING_HAS_AMX
Path sparing_run_amx;
double sparing_peak_amx();
#endif
}

enum { PORTABLE = 0, AVX2 = 1, VNNI = 2, AMX = 3 };

namespace {

#if defined(__x86_64__) && defined(__linux__)
uint64_t xgetbv() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// bits: 1 << path, for what the CPU has and the operating system saves
uint32_t detect() {
  uint32_t a, b, c, d, found = 1u << PORTABLE;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX)) return found;
  const bool popcnt = c & bit_POPCNT;
  const uint64_t saved = xgetbv();
  if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  if (b & bit_AVX2) found |= 1u << AVX2;
  const bool avx512 = (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
  if ((saved & 0xE6) != 0xE6 || !avx512 || !(c & bit_AVX512VNNI)) return found;
  found |= 1u << VNNI;
  const bool tiles = (d & (1u << 24)) && (d & (1u << 25));  // AMX-TILE, AMX-INT8
  if ((saved & 0x60000) != 0x60000 || !tiles || !(c & bit_AVX512VBMI2) || !popcnt) return found;
  const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) found |= 1u << AMX;
  return found;
}
#else
uint32_t detect() { return 1u << PORTABLE; }
#endif

uint32_t built() {
  uint32_t paths = 1u << PORTABLE;
#ifdef SPARING_HAS_AVX2
  paths |= 1u << AVX2;
#endif
#ifdef SPARING_HAS_VNNI
  paths |= 1u << VNNI;
#endif
#ifdef SPARING_HAS_AMX
  paths |= 1u << AMX;
#endif
  return paths;
}

uint32_t usable() {
  static const uint32_t found = detect() & built();
  return found;
}

}  // namespace

PUBLIC int32_t sparing_version() { return 3; }
PUBLIC uint32_t sparing_built() { return built(); }
PUBLIC uint32_t sparing_usable() { return usable(); }
PUBLIC int64_t sparing_size_of(int32_t what) { return what == 0 ? sizeof(Op) : sizeof(Run); }

// 0, or −1 for a path that is not usable here
PUBLIC int32_t sparing_run(int32_t path, const Op *ops, int64_t count, const Run *run, double *seconds) {
  switch ((path >= 0 && path < 4 && (usable() & (1u << path))) ? path : -1) {
    case PORTABLE: sparing_run_portable(ops, count, run, seconds); return 0;
#ifdef SPARING_HAS_AVX2
    case AVX2: sparing_run_avx2(ops, count, run, seconds); return 0;
#endif
#ifdef SPARING_HAS_VNNI
    case VNNI: sparing_run_vnni(ops, count, run, seconds); return 0;
#endif
#ifdef SPARING_HAS_AMX
    case AMX: sparing_run_amx(ops, count, run, seconds); return 0;
#endif
  }
  return -1;
}

// What a benchmark holds its figures against: multiplications a second in registers (0 where it is not known), and
// bytes a second read from a buffer.
PUBLIC double sparing_peak(int32_t path) {
#ifdef SPARING_HAS_VNNI
  if (path == VNNI && (usable() & (1u << VNNI))) return sparing_peak_vnni();
#endif
#ifdef SPARING_HAS_AMX
  if (path == AMX && (usable() & (1u << AMX))) return sparing_peak_amx();
#endif
  return 0.0;
}

PUBLIC double sparing_stream(const void *from, int64_t bytes) {
#ifdef SPARING_HAS_VNNI
  if (usable() & (1u << VNNI)) return sparing_stream_vnni(from, bytes);
#endif
  return 0.0;
}
