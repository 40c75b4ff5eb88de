#define SPARING_PATH portable
#include "isa_portable.h"
#include "operators.h"

extern "C" __attribute__((visibility("hidden"))) void sparing_run_portable(const Op *ops, int64_t count, const Run *run, double *seconds) {
  portable::run_operators(ops, count, *run, seconds);
}
