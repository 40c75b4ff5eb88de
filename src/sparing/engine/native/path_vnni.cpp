#define SPARING_PATH vnni
#include "isa_avx512.h"
#include "operators.h"

extern "C" __attribute__((visibility("hidden"))) void sparing_run_vnni(const Op *ops, int64_t count, const Run *run, double *seconds) {
  vnni::run_operators(ops, count, *run, seconds);
}
