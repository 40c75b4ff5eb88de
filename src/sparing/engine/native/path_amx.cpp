// Products on AMX tiles; everything else on AVX-512.
//
// A product takes 32 outputs × 32 tokens at a time in four tiles of sums. While the tile unit works on one block, the
// vector units turn the block before into what the next operator reads: one piece of that after every tile step.
#define SPARING_PATH amx
#define SPARING_AMX
#include "isa_avx512.h"
#include "operators.h"

namespace amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// sums of R × C tiles; weights a: rows `stride` apart, the lower tile `below` away, the next step `next` away;
// activations b: quads `step` bytes apart
template <int R, int C, class Between>
INLINE void tiles(const int8_t *a, int64_t stride, int64_t below, int64_t next, const uint8_t *b, int64_t step, int64_t steps,
                  Between between) {
  _tile_zero(0);
  if constexpr (C == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && C == 2) _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k) {
    _tile_loadd(6, b, step);
    _tile_loadd(4, a, stride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + 64, step);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + below, stride);
      _tile_dpbsud(2, 5, 6);
    }
    if constexpr (R == 2 && C == 2) _tile_dpbsud(3, 5, 7);
    a += next;
    b += 16 * step;
    between(k);
  }
}

template <int R, int C> INLINE void store_tiles(int32_t *c, int64_t stride) {
  _tile_stored(0, c, stride * 4);
  if constexpr (C == 2) _tile_stored(1, c + 16, stride * 4);
  if constexpr (R == 2) _tile_stored(2, c + 16 * stride, stride * 4);
  if constexpr (R == 2 && C == 2) _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

// Weights of 16 outputs as [column / 64][output][64], from masks [4 outputs][column / 64] and the values they stand for.
INLINE const int8_t *expand(const uint64_t *masks, const int8_t *values, int64_t steps, int8_t *to) {
  for (int64_t k = 0; k < steps; ++k)
    for (int64_t g = 0; g < 4; ++g) {
      const uint64_t mask = masks[g * steps + k];
      const int64_t count = _mm_popcnt_u64(mask);
      for (int64_t i = 0; i < 4; ++i, to += 64, values += count)
        storei(to, {_mm512_maskz_expand_epi8(mask, loadi(values).v)});
    }
  return values;
}

// A block whose sums wait for their epilogue, in pieces of 4 outputs × 16 tokens.
template <int EPILOGUE> struct Waiting {
  const Op &op;
  const int32_t *sums = nullptr;
  int64_t row = 0, slab = 0, t = 0;
  int pieces = 0, done = 0, wide = 0;

  inline __attribute__((always_inline)) void one() {
    const int64_t r = wide == 2 ? done >> 1 : done, c = wide == 2 ? done & 1 : 0;
    I v[4];
    for (int i = 0; i < 4; ++i) v[i] = loadi(sums + (4 * r + i) * 32 + 16 * c);
    finish<EPILOGUE>(op, row + 4 * r, slab, t + 16 * c, v);
    ++done;
  }
  inline __attribute__((always_inline)) void until(int count) {
    while (done < count) one();
  }
};

template <int EPILOGUE, int R, int C>
static void block(const int8_t *a, int64_t stride, int64_t below, int64_t next, const uint8_t *b, int64_t steps,
                  Waiting<EPILOGUE> &before, int32_t *sums) {
  int due = 0;
  tiles<R, C>(a, stride, below, next, b, SLAB * 4, steps, [&](int64_t) {
    due += before.pieces;
    while (before.done < before.pieces && before.done * steps < due) before.one();
  });
  before.until(before.pieces);
  store_tiles<R, C>(sums, 32);
}

template <int EPILOGUE> static void gemm(const Op &op, const Run &run) {
  if (op.format == FLOAT32 || op.rows % 16 || op.columns % 64) return gemm_lanes<EPILOGUE>(op, run);
  const int64_t total = run.tokens, slabs = (total + SLAB - 1) / SLAB, steps = op.columns / 64;
  int8_t *expanded = static_cast<int8_t *>(op.scratch);                           // [2][steps][16][64]
  int32_t *sums[2];                                                               // [32][32] each
  sums[0] = reinterpret_cast<int32_t *>(expanded + 2 * 16 * op.columns);
  sums[1] = sums[0] + 32 * 32;
  int turn = 0;
  Waiting<EPILOGUE> waiting{op};
  const int8_t *weight = static_cast<const int8_t *>(op.weight);
  for (int64_t low = 0; low < slabs; low += op.chunk) {
    const int64_t high = low + op.chunk < slabs ? low + op.chunk : slabs;
    for (int64_t row = 0; row < op.rows; row += 32) {
      const bool pair = op.rows - row >= 32;
      const int8_t *a = weight + row * op.columns;
      int64_t stride = op.columns, below = 16 * op.columns, next = 64;
      if (op.format == TILES) {
        const uint64_t *masks = static_cast<const uint64_t *>(op.index) + row / 4 * steps;
        const int8_t *values = weight + static_cast<const uint32_t *>(op.pointer)[row / 16];
        values = expand(masks, values, steps, expanded);
        if (pair) expand(masks + 4 * steps, values, steps, expanded + below);
        a = expanded;
        stride = 64;
        next = 1024;
      }
      for (int64_t slab = low; slab < high; ++slab) {
        const uint8_t *b = static_cast<const uint8_t *>(op.input) + slab * op.columns * SLAB;
        const int wide = total - slab * SLAB > 16 ? 2 : 1;
        int32_t *into = sums[turn ^= 1];
        if (pair && wide == 2) block<EPILOGUE, 2, 2>(a, stride, below, next, b, steps, waiting, into);
        else if (pair) block<EPILOGUE, 2, 1>(a, stride, below, next, b, steps, waiting, into);
        else if (wide == 2) block<EPILOGUE, 1, 2>(a, stride, below, next, b, steps, waiting, into);
        else block<EPILOGUE, 1, 1>(a, stride, below, next, b, steps, waiting, into);
        waiting.sums = into;
        waiting.row = row;
        waiting.slab = slab;
        waiting.wide = wide;
        waiting.done = 0;
        waiting.pieces = (pair ? 8 : 4) * wide;
      }
    }
  }
  waiting.until(waiting.pieces);
}

template <int R, int C>
static void small_block(const int8_t *w, int64_t stride, const uint8_t *x, int64_t step, int64_t steps, int32_t *c) {
  tiles<R, C>(w, stride, 16 * stride, 64, x, step, steps, [](int64_t) {});
  store_tiles<R, C>(c, 16 * C);
}

static void small_product(const int8_t *w, int64_t stride, int64_t rows, const uint8_t *x, int64_t step, int64_t quads, int v, int32_t *c) {
  if (rows % 16 || quads % 16) {
    for (int64_t row = 0; row < rows; row += 4)
      for (int j = 0; j < v; ++j) {
        I sums[4][1];
        dense_rows<1>(w + row * stride, stride, x + 64 * j, step, quads, sums);
        for (int i = 0; i < 4; ++i) storei(c + ((row + i) * v + j) * 16, sums[i][0]);
      }
    return;
  }
  for (int64_t row = 0; row < rows; row += 32) {
    const int8_t *a = w + row * stride;
    int32_t *to = c + row * 16 * v;
    const bool pair = rows - row >= 32;
    if (pair && v == 2) small_block<2, 2>(a, stride, x, step, quads / 16, to);
    else if (pair) small_block<2, 1>(a, stride, x, step, quads / 16, to);
    else if (v == 2) small_block<1, 2>(a, stride, x, step, quads / 16, to);
    else small_block<1, 1>(a, stride, x, step, quads / 16, to);
  }
}

}  // namespace amx

extern "C" __attribute__((visibility("hidden"))) void sparing_run_amx(const Op *ops, int64_t count, const Run *run, double *seconds) {
  const amx::TileConfig config;
  _tile_loadconfig(&config);
  amx::run_operators(ops, count, *run, seconds);
  _tile_release();
}

// multiplications of one second when nothing but tiles in registers is multiplied
extern "C" __attribute__((visibility("hidden"))) double sparing_peak_amx() {
  const amx::TileConfig config;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  const int64_t rounds = 100000;
  const double start = amx::now();
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  const double seconds = amx::now() - start;
  _tile_release();
  return double(rounds) * 4 * 16 * 16 * 64 / seconds;
}
