// The operators, written once over the sixteen lanes of isa_*.h and compiled for each instruction path. Lanes are
// tokens. Every float result is a fixed sequence of single-precision operations (compile with -ffp-contract=off), and
// ../reference.py is the same sequence in NumPy: all paths give its bits.
#pragma once
#include <ctime>

#include "engine.h"
#include "gelu_table.h"

namespace SPARING_PATH {

// ------------------------------------------------------------------------------------------------ functions of floats

// 2^t for t ≤ 0
INLINE F exp2_negative(F t) {
  t = max(t, setf(-125.0f));
  const I n = to_int(t);
  const F f = sub(t, to_float(n));
  F p = setf(0.00132764719f);
  p = add(mul(p, f), setf(0.00967554189f));
  p = add(mul(p, f), setf(0.0555071279f));
  p = add(mul(p, f), setf(0.240221202f));
  p = add(mul(p, f), setf(0.693146974f));
  p = add(mul(p, f), setf(1.0f));
  return add_exponent(p, n);
}

// 255 · 2^t for t ≤ 0, to 1e-4 of itself: it will be rounded to a whole number
INLINE F weight_of(F t) {
  t = max(t, setf(-125.0f));
  const I n = to_int(t);
  const F f = sub(t, to_float(n));
  F p = setf(14.027278f);
  p = add(mul(p, f), setf(61.763798f));
  p = add(mul(p, f), setf(176.78714f));
  p = add(mul(p, f), setf(255.0f));
  return add_exponent(p, n);
}

// x Φ(x), Φ from a table of parabolas
INLINE F gelu(F x) {
  const F t = min(max(add(mul(x, setf(GELU_PER_UNIT)), setf(GELU_MIDDLE)), setf(0.0f)), setf(GELU_LAST));
  const I n = to_int(t);
  const F f = sub(t, to_float(n));
  const F p = add(mul(lookup(GELU_TABLE[2], n), f), lookup(GELU_TABLE[1], n));
  return mul(x, add(mul(p, f), lookup(GELU_TABLE[0], n)));
}

INLINE F tanh(F x) {
  const F e = exp2_negative(mul(with_sign(x, setf(1.0f)), setf(-2.88539008f)));
  return with_sign(div(sub(setf(1.0f), e), add(setf(1.0f), e)), x);
}

INLINE I round_to(F v, const Grid &g) { return to_int(min(max(mul(v, setf(g.inverse)), setf(g.low)), setf(g.high))); }

// four vectors, rounded to a grid, as the four bytes of every lane
INLINE I rounded_quads(const F *v, const Grid &g) {
  F scaled[4];
  for (int i = 0; i < 4; ++i) scaled[i] = min(mul(v[i], setf(g.inverse)), setf(g.high));
  return saturated_quads(scaled, g.zero);
}

// four vectors of whole numbers, each plus zero in 0…255, as the four bytes of every lane
INLINE I pack(const I *n, int32_t zero) {
  return add(add(add(n[0], shl<8>(n[1])), add(shl<16>(n[2]), shl<24>(n[3]))), seti(zero * 0x01010101));
}

// four features of 16 tokens, to a uint8 buffer of `rows` features in either layout
INLINE void store_u8(void *base, int layout, int64_t rows, int64_t row, int64_t slab, int64_t t, const F *v, const Grid &g) {
  uint8_t *p = static_cast<uint8_t *>(base) + slab * rows * SLAB;
  if (layout == QUADS) {
    storei(p + row * SLAB + t * 4, rounded_quads(v, g));
  } else {
    for (int i = 0; i < 4; ++i) store_bytes(p + (row + i) * SLAB + t, add(round_to(v[i], g), seti(g.zero)));
  }
}

INLINE int32_t load4(const void *p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// --------------------------------------------------------------------------------------------------------- epilogues

// What becomes of four rows of a product for 16 tokens, from biased floats on.
template <int EPILOGUE> INLINE void store_product(const Op &op, int64_t row, int64_t slab, int64_t t, F *v) {
  if constexpr (EPILOGUE == GELU || EPILOGUE == GELU_U8)
    for (int i = 0; i < 4; ++i) v[i] = gelu(v[i]);
  if constexpr (EPILOGUE == GELU_U8) {
    store_u8(op.output8, op.layout, op.rows, row, slab, t, v, op.grid[0]);
  } else if constexpr (EPILOGUE == QKV) {
    const int64_t width = op.heads * int64_t(op.part >> 2), part = (op.part & 3) + row / width, r = row % width;
    const int64_t size = op.part >> 2, head = r / size, d = r % size, token = slab * SLAB + t;
    const Grid &g = op.grid[part];
    if (part == 0) return storei(op.query + (r / 4 * op.stride + token) * 4, rounded_quads(v, g));
    I n[4];
    for (int i = 0; i < 4; ++i) n[i] = round_to(v[i], g);
    if (part == 1) {
      int32_t *sums = op.key_sum + head * op.stride + token;
      const I sum = add(add(n[0], n[1]), add(n[2], n[3]));
      storei(sums, d ? add(loadi(sums), sum) : sum);
      store_columns(op.key + (head * op.stride + token) * size + d, size, flip(pack(n, g.zero), seti(int32_t(0x80808080))));
    } else {
      for (int i = 0; i < 4; ++i) store_bytes(op.value + (r + i) * op.stride + token, add(n[i], seti(g.zero - 128)));
    }
  } else {
    float *p = static_cast<float *>(op.output) + (slab * op.out_rows + op.out_row + row) * SLAB + t;
    for (int i = 0; i < 4; ++i) {
      if constexpr (EPILOGUE == RESIDUAL) v[i] = add(v[i], loadf(p + i * SLAB));
      if constexpr (EPILOGUE == ROUNDED) v[i] = mul(to_float(round_to(v[i], op.grid[0])), setf(op.factor));
      storef(p + i * SLAB, v[i]);
    }
  }
}

template <int EPILOGUE> INLINE void finish(const Op &op, int64_t row, int64_t slab, int64_t t, const I *sums) {
  F v[4];
  for (int i = 0; i < 4; ++i) {
    const F whole = to_float(sub(sums[i], seti(op.compensation[row + i])));
    v[i] = add(mul(whole, setf(op.scale[row + i])), setf(op.bias[row + i]));
  }
  store_product<EPILOGUE>(op, row, slab, t, v);
}

// ---------------------------------------------------------------------------------------------------------- products

// sums[4][V] = four rows of int8, `stride` apart, times quads of 16·V tokens, `step` bytes apart
template <int V> INLINE void dense_rows(const int8_t *w, int64_t stride, const uint8_t *x, int64_t step, int64_t quads, I (*sums)[V]) {
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = seti(0);
  for (int64_t k = 0; k < quads; ++k, x += step) {
    I a[V];
    for (int v = 0; v < V; ++v) a[v] = loadi(x + 64 * v);
    for (int i = 0; i < 4; ++i) {
      const I b = seti(load4(w + i * stride + 4 * k));
      for (int v = 0; v < V; ++v) sums[i][v] = dot4(sums[i][v], a[v], b);
    }
  }
}

template <int V> INLINE void float_rows(const float *w, int64_t stride, const float *x, int64_t columns, F (*sums)[V]) {
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = setf(0.0f);
  for (int64_t k = 0; k < columns; ++k, x += SLAB) {
    F a[V];
    for (int v = 0; v < V; ++v) a[v] = loadf(x + 16 * v);
    for (int i = 0; i < 4; ++i) {
      const F b = setf(w[i * stride + k]);
      for (int v = 0; v < V; ++v) sums[i][v] = add(sums[i][v], mul(b, a[v]));
    }
  }
}

template <int EPILOGUE, int V> static void dense_tile(const Op &op, int64_t slab, int64_t t) {
  const uint8_t *x = static_cast<const uint8_t *>(op.input) + slab * op.columns * SLAB + t * 4;
  const int8_t *w = static_cast<const int8_t *>(op.weight);
  for (int64_t row = 0; row < op.rows; row += 4) {
    I sums[4][V];
    dense_rows<V>(w + row * op.columns, op.columns, x, SLAB * 4, op.columns / 4, sums);
    for (int v = 0; v < V; ++v) {
      const I of_v[4] = {sums[0][v], sums[1][v], sums[2][v], sums[3][v]};
      finish<EPILOGUE>(op, row, slab, t + 16 * v, of_v);
    }
  }
}

template <int EPILOGUE, int V> static void float_tile(const Op &op, int64_t slab, int64_t t) {
  const float *x = static_cast<const float *>(op.input) + slab * op.columns * SLAB + t;
  const float *w = static_cast<const float *>(op.weight);
  for (int64_t row = 0; row < op.rows; row += 4) {
    F sums[4][V];
    float_rows<V>(w + row * op.columns, op.columns, x, op.columns, sums);
    for (int v = 0; v < V; ++v) {
      F of_v[4];
      for (int i = 0; i < 4; ++i) of_v[i] = add(sums[i][v], setf(op.bias[row + i]));
      store_product<EPILOGUE>(op, row, slab, t + 16 * v, of_v);
    }
  }
}

template <int EPILOGUE> static void sparse_tile(const Op &op, int64_t slab, int64_t t) {
  const uint8_t *x = static_cast<const uint8_t *>(op.input) + slab * op.columns * SLAB + t;
  const int32_t *starts = static_cast<const int32_t *>(op.pointer);
  for (int64_t row = 0; row < op.rows; row += 4) {
    I sums[4][VECTORS];
    for (int i = 0; i < 4; ++i)
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = seti(0);
    const uint16_t *index = static_cast<const uint16_t *>(op.index) + 4 * int64_t(starts[row / 4]);
    const int8_t *w = static_cast<const int8_t *>(op.weight) + 16 * int64_t(starts[row / 4]);
    for (int32_t g = starts[row / 4]; g < starts[row / 4 + 1]; ++g, index += 4, w += 16) {
      I a[VECTORS];
      interleave(x + index[0] * SLAB, x + index[1] * SLAB, x + index[2] * SLAB, x + index[3] * SLAB, a);
      for (int i = 0; i < 4; ++i) {
        const I b = seti(load4(w + 4 * i));
        for (int v = 0; v < VECTORS; ++v) sums[i][v] = dot4(sums[i][v], a[v], b);
      }
    }
    for (int i = 0; i < 4; ++i) restore(sums[i]);
    for (int v = 0; v < VECTORS; ++v) {
      const I of_v[4] = {sums[0][v], sums[1][v], sums[2][v], sums[3][v]};
      finish<EPILOGUE>(op, row, slab, t + 16 * v, of_v);
    }
  }
}

// A layer on one column for each sequence: lanes are outputs, weights [input][output].
template <int EPILOGUE, int V> INLINE void columns_tile(const Op &op, int64_t b, int64_t row) {
  const float *column = static_cast<const float *>(op.input) + b / SLAB * op.in_rows * SLAB + b % SLAB;
  const float *w = static_cast<const float *>(op.weight) + row;
  F sums[4][V];
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = setf(0.0f);
  for (int64_t k = 0; k < op.columns; ++k, w += op.rows, column += SLAB) {
    F weights[V];
    for (int v = 0; v < V; ++v) weights[v] = loadf(w + 16 * v);
    for (int i = 0; i < 4; ++i)
      for (int v = 0; v < V; ++v) sums[i][v] = add(sums[i][v], mul(weights[v], setf(column[i])));
  }
  float *y = static_cast<float *>(op.output) + (b / SLAB * op.rows + row) * SLAB + b % SLAB;
  for (int i = 0; i < 4; ++i)
    for (int v = 0; v < V; ++v) {
      F x = add(sums[i][v], loadf(op.bias + row + 16 * v));
      if constexpr (EPILOGUE == TANH) x = tanh(x);
      if constexpr (EPILOGUE == RELU) x = max(x, setf(0.0f));
      float lanes[16];
      storef(lanes, x);
      for (int l = 0; l < 16; ++l) y[(16 * v + l) * SLAB + i] = lanes[l];
    }
}

template <int EPILOGUE> static void columns_product(const Op &op, const Run &run) {
  for (int64_t b = 0; b < run.batch; b += 4) {
    int64_t row = 0;
    for (; row + 64 <= op.rows; row += 64) columns_tile<EPILOGUE, 4>(op, b, row);
    for (; row < op.rows; row += 16) columns_tile<EPILOGUE, 1>(op, b, row);
  }
}

template <int EPILOGUE> static void gemm_lanes(const Op &op, const Run &run) {
  const int64_t total = run.tokens;
  for (int64_t first = 0; first < total; first += SLAB) {
    const int64_t slab = first / SLAB, here = total - first < SLAB ? total - first : SLAB;
    for (int64_t t = 0; t < here;) {
      const int64_t left = (here - t) / 16;
      if (op.format == SPARSE_4X1) {  // the rest of a slab is there to be computed along
        sparse_tile<EPILOGUE>(op, slab, t);
        t += 16 * VECTORS;
      } else if (op.format == FLOAT32) {
        if (left >= VECTORS) {
          float_tile<EPILOGUE, VECTORS>(op, slab, t);
          t += 16 * VECTORS;
        } else {
          float_tile<EPILOGUE, 1>(op, slab, t);
          t += 16;
        }
      } else if (left >= VECTORS) {
        dense_tile<EPILOGUE, VECTORS>(op, slab, t);
        t += 16 * VECTORS;
      } else {
        dense_tile<EPILOGUE, 1>(op, slab, t);
        t += 16;
      }
    }
  }
}

#ifndef SPARING_AMX
template <int EPILOGUE> static void gemm(const Op &op, const Run &run) { gemm_lanes<EPILOGUE>(op, run); }
// c[rows][16·v] of int32 = int8 rows × quads; rows come in fours, quads in steps of 64·v bytes and more
INLINE void small_product(const int8_t *w, int64_t stride, int64_t rows, const uint8_t *x, int64_t step, int64_t quads, int v, int32_t *c) {
  for (int64_t row = 0; row < rows; row += 4)
    for (int j = 0; j < v; ++j) {
      I sums[4][1];
      dense_rows<1>(w + row * stride, stride, x + 64 * j, step, quads, sums);
      for (int i = 0; i < 4; ++i) storei(c + ((row + i) * v + j) * 16, sums[i][0]);
    }
}
#else
template <int EPILOGUE> static void gemm(const Op &op, const Run &run);
static void small_product(const int8_t *w, int64_t stride, int64_t rows, const uint8_t *x, int64_t step, int64_t quads, int v, int32_t *c);
#endif

static void product(const Op &op, const Run &run) {
  if (op.format == COLUMNS) {
    if (op.epilogue == TANH) return columns_product<TANH>(op, run);
    if (op.epilogue == RELU) return columns_product<RELU>(op, run);
    return columns_product<PLAIN>(op, run);
  }
  switch (op.epilogue) {
    case PLAIN: return gemm<PLAIN>(op, run);
    case RESIDUAL: return gemm<RESIDUAL>(op, run);
    case GELU: return gemm<GELU>(op, run);
    case GELU_U8: return gemm<GELU_U8>(op, run);
    case QKV: return gemm<QKV>(op, run);
    case ROUNDED: return gemm<ROUNDED>(op, run);
  }
}

// -------------------------------------------------------------------------------------------- embeddings, layer norm

static void embed(const Op &op, const Run &run) {
  const int64_t rows = op.rows;
  const float *words = static_cast<const float *>(op.weight), *positions = op.extra, *segments = op.bias;
  float *sums = static_cast<float *>(op.scratch);  // [16][rows]
  for (int64_t first = 0; first < run.tokens; first += 16) {
    for (int64_t t = 0; t < 16; ++t) {
      const float *w = words + run.ids[first + t] * rows, *p = positions + run.position[first + t] * rows;
      const float *s = segments ? segments + run.segment[first + t] * rows : nullptr;
      int64_t d = 0;
      for (; d + 16 <= rows; d += 16) {
        F x = add(loadf(w + d), loadf(p + d));
        if (s) x = add(x, loadf(s + d));
        storef(sums + t * rows + d, x);
      }
      for (; d < rows; ++d) {
        const float x = w[d] + p[d];
        sums[t * rows + d] = s ? x + s[d] : x;
      }
    }
    float *q = static_cast<float *>(op.output) + first / SLAB * rows * SLAB + first % SLAB;
    int64_t d = 0;
    for (; d + 16 <= rows; d += 16) transpose(sums + d, rows, q + d * SLAB, SLAB);
    for (; d < rows; ++d)
      for (int64_t t = 0; t < 16; ++t) q[d * SLAB + t] = sums[t * rows + d];
  }
}

// Over the features of each token, two passes; four sums of every fourth feature each, added up in pairs. In place.
static void norm(const Op &op, const Run &run) {
  const int64_t rows = op.rows, total = run.tokens;
  const F size = setf(float(rows)), eps = setf(op.constant);
  for (int64_t first = 0; first < total; first += 16) {
    const int64_t slab = first / SLAB, t = first % SLAB;
    const float *x = static_cast<const float *>(op.input) + slab * rows * SLAB + t;
    float *y = static_cast<float *>(op.output) + slab * rows * SLAB + t;
    F s[4] = {setf(0), setf(0), setf(0), setf(0)}, q[4] = {setf(0), setf(0), setf(0), setf(0)};
    for (int64_t r = 0; r < rows; r += 4)
      for (int i = 0; i < 4; ++i) s[i] = add(s[i], loadf(x + (r + i) * SLAB));
    const F mean = div(add(add(s[0], s[1]), add(s[2], s[3])), size);
    for (int64_t r = 0; r < rows; r += 4)
      for (int i = 0; i < 4; ++i) {
        const F d = sub(loadf(x + (r + i) * SLAB), mean);
        q[i] = add(q[i], mul(d, d));
      }
    const F variance = div(add(add(q[0], q[1]), add(q[2], q[3])), size);
    const F inverse = div(setf(1.0f), sqrt(add(variance, eps)));
    for (int64_t r = 0; r < rows; r += 4) {
      F v[4];
      for (int i = 0; i < 4; ++i) {
        const F unit = mul(sub(loadf(x + (r + i) * SLAB), mean), inverse);
        v[i] = add(mul(unit, setf(op.extra[r + i])), setf(op.bias[r + i]));
        storef(y + (r + i) * SLAB, v[i]);
      }
      if (op.layout != NONE) store_u8(op.output8, op.layout, rows, r, slab, t, v, op.grid[0]);
    }
  }
}

static void quantise(const Op &op, const Run &run) {
  for (int64_t first = 0; first < run.tokens; first += 16) {
    const int64_t slab = first / SLAB, t = first % SLAB;
    const float *x = static_cast<const float *>(op.input) + slab * op.rows * SLAB + t;
    for (int64_t r = 0; r < op.rows; r += 4) {
      F v[4];
      for (int i = 0; i < 4; ++i) v[i] = loadf(x + (r + i) * SLAB);
      store_u8(op.output8, op.layout, op.rows, r, slab, t, v, op.grid[0]);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- attention

constexpr int32_t MASKED = 1 << 28;  // more than two scores can lie apart: 255 · 255 · MAX_HEAD of ../pack.py

// Soft-max weights are 255 · 2^(score − largest), rounded: uint8 without a scale of their own, since
// context = Σ p·v / Σ p. All sums are integers.
static void attend_int(const Op &op, const Run &run) {
  const int64_t size = op.columns, stride = op.stride;
  for (int32_t b = 0; b < run.batch; ++b) {
    const int64_t start = run.start[b], keys = (run.count[b] + 15) / 16 * 16, padded = (keys + 63) / 64 * 64;
    int32_t *scores = static_cast<int32_t *>(op.scratch);             // [keys][16·v], later context [size][16·v]
    int32_t *offset = scores + (padded > size ? padded : size) * 32;  // [keys]
    uint8_t *p = reinterpret_cast<uint8_t *>(offset + padded);        // [padded / 4][16·v][4]
    for (int64_t head = 0; head < op.heads; ++head) {
      const int8_t *key = op.key + (head * stride + start) * size, *value = op.value + head * size * stride + start;
      for (int64_t j = 0; j < keys; ++j)
        offset[j] = op.grid[1].zero * op.key_sum[head * stride + start + j] + (run.keep[start + j] ? 0 : MASKED);
      const int64_t width = keys > 256 ? 16 : 32;  // queries at a time, for their scores to stay in the level-1 cache
      for (int64_t i = 0; i < keys; i += width) {
        const int v = keys - i < width || width == 16 ? 1 : 2;
        const uint8_t *query = op.query + (head * size / 4 * stride + start + i) * 4;
        small_product(key, size, keys, query, stride * 4, size / 4, v, scores);
        I sum[2];
        for (int j = 0; j < v; ++j) {
          const int32_t *column = scores + j * 16;
          I least = seti(INT32_MAX);  // of offset − score
          for (int64_t k = 0; k < keys; ++k) least = min(least, sub(seti(offset[k]), loadi(column + k * v * 16)));
          I total = seti(0);
          for (int64_t k = 0; k < keys; k += 4) {
            F w[4];
            for (int r = 0; r < 4; ++r) {
              const I above = sub(sub(seti(offset[k + r]), loadi(column + (k + r) * v * 16)), least);
              w[r] = weight_of(mul(to_float(above), setf(-op.constant)));
            }
            if (load4(run.keep + start + k) != 0x01010101)
              for (int r = 0; r < 4; ++r)
                if (!run.keep[start + k + r]) w[r] = setf(0.0f);
            const I quads = saturated_quads(w, 0);
            total = dot4(total, quads, seti(0x01010101));
            storei(p + (k / 4 * v + j) * 64, quads);
          }
          for (int64_t k = keys; k < padded; k += 4) storei(p + (k / 4 * v + j) * 64, seti(0));
          sum[j] = total;
        }
        small_product(value, stride, size, p, 64 * v, padded / 4, v, scores);
        for (int j = 0; j < v; ++j) {
          const F scale = div(setf(op.factor), to_float(sum[j]));
          const I shift = times(sum[j], seti(op.grid[2].zero - 128));
          const int64_t slab = (start + i + 16 * j) / SLAB, t = (start + i + 16 * j) % SLAB;
          for (int64_t d = 0; d < size; d += 4) {
            F c[4];
            for (int r = 0; r < 4; ++r) c[r] = mul(to_float(sub(loadi(scores + ((d + r) * v + j) * 16), shift)), scale);
            const int64_t row = head * size + d;
            if (op.layout != NONE) {
              store_u8(op.output8, op.layout, op.heads * size, row, slab, t, c, op.grid[0]);
            } else {
              float *out = static_cast<float *>(op.output) + (slab * op.heads * size + row) * SLAB + t;
              for (int r = 0; r < 4; ++r) storef(out + r * SLAB, c[r]);
            }
          }
        }
      }
    }
  }
}

// query, key and value are the three thirds of a float buffer [slab][3·heads·size][token]
static void attend_float(const Op &op, const Run &run) {
  const int64_t size = op.columns, width = op.heads * size;
  const float *qkv = static_cast<const float *>(op.input);
  const auto at = [&](int64_t row, int64_t token) { return qkv + (token / SLAB * 3 * width + row) * SLAB + token % SLAB; };
  for (int32_t b = 0; b < run.batch; ++b) {
    const int64_t start = run.start[b], keys = run.count[b];
    float *weights = static_cast<float *>(op.scratch);  // [keys][16]
    for (int64_t head = 0; head < op.heads; ++head)
      for (int64_t i = 0; i < keys; i += 16) {
        F m = setf(-3.0e38f);
        for (int64_t j = 0; j < keys; ++j) {
          if (!run.keep[start + j]) continue;
          F s = setf(0.0f);
          for (int64_t d = 0; d < size; ++d)
            s = add(s, mul(setf(*at(width + head * size + d, start + j)), loadf(at(head * size + d, start + i))));
          s = mul(s, setf(op.constant));
          storef(weights + j * 16, s);
          m = max(m, s);
        }
        F sum = setf(0.0f);
        for (int64_t j = 0; j < keys; ++j) {
          if (!run.keep[start + j]) continue;
          const F e = exp2_negative(sub(loadf(weights + j * 16), m));
          storef(weights + j * 16, e);
          sum = add(sum, e);
        }
        const int64_t slab = (start + i) / SLAB, t = (start + i) % SLAB;
        for (int64_t d = 0; d < size; d += 4) {
          F c[4];
          for (int r = 0; r < 4; ++r) {
            c[r] = setf(0.0f);
            for (int64_t j = 0; j < keys; ++j)
              if (run.keep[start + j])
                c[r] = add(c[r], mul(setf(*at(2 * width + head * size + d + r, start + j)), loadf(weights + j * 16)));
            c[r] = div(c[r], sum);
          }
          const int64_t row = head * size + d;
          if (op.layout != NONE) {
            store_u8(op.output8, op.layout, width, row, slab, t, c, op.grid[0]);
          } else {
            float *out = static_cast<float *>(op.output) + (slab * width + row) * SLAB + t;
            for (int r = 0; r < 4; ++r) storef(out + r * SLAB, c[r]);
          }
        }
      }
  }
}

// ------------------------------------------------------------------------------------------------------------- heads

// a column for each sequence: its first token, or the mean over the tokens that are kept
static void first_or_mean(const Op &op, const Run &run) {
  const float *x = static_cast<const float *>(op.input);
  float *y = static_cast<float *>(op.output);
  for (int64_t b = 0; b < (run.batch + 15) / 16 * 16; ++b)
    for (int64_t r = 0; r < op.rows; ++r) {
      float sum = 0.0f, kept = 0.0f;
      const int64_t from = b < run.batch ? run.start[b] : 0, count = b >= run.batch ? 0 : op.kind == FIRST ? 1 : run.count[b];
      for (int64_t token = from; token < from + count; ++token)
        if (op.kind == FIRST || run.keep[token]) {
          sum += x[(token / SLAB * op.rows + r) * SLAB + token % SLAB];
          kept += 1.0f;
        }
      y[(b / SLAB * op.rows + r) * SLAB + b % SLAB] = kept > 1.0f ? sum / kept : sum;
    }
}

// features of tokens [slab][feature][token] to the caller's [sequence][token][output]; what was not computed stays 0
static void out_tokens(const Op &op, const Run &run) {
  const float *x = static_cast<const float *>(op.input);
  for (int64_t b = 0; b < run.batch; ++b)
    for (int64_t i = 0; i < run.count[b]; ++i) {
      const int64_t token = run.start[b] + i;
      float *y = run.output + (b * run.length + i) * run.outputs;
      for (int64_t r = 0; r < run.outputs; ++r) y[r] = x[(token / SLAB * op.rows + r) * SLAB + token % SLAB];
    }
}

static void out_columns(const Op &op, const Run &run) {
  const float *x = static_cast<const float *>(op.input);
  for (int64_t b = 0; b < run.batch; ++b)
    for (int64_t r = 0; r < run.outputs; ++r) run.output[b * run.outputs + r] = x[(b / SLAB * op.rows + r) * SLAB + b % SLAB];
}

// ------------------------------------------------------------------------------------------------------------ runner

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

static void run_operators(const Op *ops, int64_t count, const Run &run, double *seconds) {
  for (int64_t i = 0; i < count; ++i) {
    const double start = seconds ? now() : 0;
    const Op &op = ops[i];
    switch (op.kind) {
      case EMBED: embed(op, run); break;
      case NORM: norm(op, run); break;
      case QUANTISE: quantise(op, run); break;
      case GEMM: product(op, run); break;
      case ATTEND_INT: attend_int(op, run); break;
      case ATTEND_FLOAT: attend_float(op, run); break;
      case FIRST:
      case MEAN: first_or_mean(op, run); break;
      case OUT_TOKENS: out_tokens(op, run); break;
      case OUT_COLUMNS: out_columns(op, run); break;
    }
    if (seconds) seconds[i] += now() - start;
  }
}

}  // namespace SPARING_PATH
