#define SPARING_PATH avx2
#include "isa_avx2.h"
#include "operators.h"

extern "C" __attribute__((visibility("hidden"))) void sparing_run_avx2(const Op *ops, int64_t count, const Run *run, double *seconds) {
  avx2::run_operators(ops, count, *run, seconds);
}
