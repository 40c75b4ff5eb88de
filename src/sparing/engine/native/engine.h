// What Python hands to the native code: a list of operators over one workspace, and the tokens of one call.
// The structures are mirrored, field by field, in ../native.py. All sizes were validated before they get here.
#pragma once
#include <cstdint>

enum Kind : int32_t { EMBED = 0, NORM, QUANTISE, GEMM, ATTEND_INT, ATTEND_FLOAT, FIRST, MEAN, OUT_TOKENS, OUT_COLUMNS };
enum Format : int32_t { FLOAT32 = 0, DENSE, SPARSE_4X1, TILES, COLUMNS };
enum Epilogue : int32_t { PLAIN = 0, RESIDUAL, GELU, GELU_U8, QKV, TANH, RELU, ROUNDED };
enum Layout : int32_t { NONE = 0, FEATURES, QUADS };  // uint8 [slab][feature][token] or [slab][feature / 4][token][4]

// uint8 = round(clamp(value · inverse, low, high)) + zero, with low = −zero and high = 255 − zero
struct Grid {
  float inverse, low, high;
  int32_t zero;
};

struct Op {
  int32_t kind, format, epilogue, layout;  // layout: of the uint8 that is written
  int32_t rows, columns, heads, part;      // part: first of query, key, value that the rows of a QKV product make
  int32_t out_rows, out_row;               // features of the float buffer that is written, and the first of ours
  int32_t chunk, in_rows;                  // slabs that a product takes at a time; COLUMNS: features of the buffer read
  float constant, factor;                  // NORM: eps · ATTEND: scores' scale in powers of two, value scale ·
                                           // ROUNDED: the grid's scale
  Grid grid[3];
  const void *input, *weight, *index, *pointer;
  const int32_t *compensation;
  const float *scale, *bias, *extra;       // extra: NORM gamma, EMBED positions; bias: NORM beta, EMBED segments
  void *output, *output8;
  uint8_t *query;
  int8_t *key, *value;
  int32_t *key_sum;
  int64_t stride;                          // tokens between neighbouring rows of query and value
  void *scratch;
};

struct Run {
  int32_t batch, tokens, length, outputs;  // tokens: of all sequences, each rounded up to 16
  const int32_t *start, *count;            // per sequence: first token, number of tokens
  const int32_t *ids, *position, *segment; // per token
  const uint8_t *keep;                     // per token: may be attended to
  float *output;
};
