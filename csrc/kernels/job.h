// Plain structures that the baseline code (plan, scheduling) hands to the instruction-set-specific kernels.
//
// The kernels' translation units are compiled with their own -m flags, so they share nothing with the rest but these
// structures: an inline function or a std:: template instantiated there could be chosen by the linker for every
// machine. Hence no std:: here.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int kChunk = 64;       // keys in a packed tile
constexpr int kMaxRows = 256;    // query rows that are processed together
constexpr int kMaxHeadDim = 256;
constexpr int64_t kUnlimited = int64_t{1} << 40;
constexpr float kLog2E = 1.44269504088896340736f;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Which keys a row may see, by their positions.
struct Rules {
  int64_t key_count;
  int64_t sink;    // keys before it are attended by every row
  int64_t window;  // |query - key| < window is attended
  int64_t limit;   // |query - key| >= limit is never attended
  bool causal;
};

enum class TileKind : int {
  kFull,         // every row attends all 64 keys
  kConsecutive,  // key t has position first_position + t
  kGathered,     // key t has positions[t], ascending; nothing but key_bits selects
  kScattered,    // key t has positions[t], any order, count of them
  kMeans,        // means of key blocks: key_bits says which every row attends
  kSelected,     // of keys anywhere, key_bits says which every row attends
};

struct StoredRows;

// 64 packed keys and values. Values that need no packing may lie where they are, value_stride floats from row to row
// (0: packed). Few rows read a tile of fp32 kernels as it is stored, where it says so.
struct Tile {
  const void* keys;
  const void* values;
  const int32_t* positions;
  int64_t first_position;
  uint64_t key_bits;  // bit t: key t is selected for all rows, by a block or a column
  int count;
  TileKind kind;
  int64_t value_stride = 0;
  const float* added = nullptr;  // to the logits of each key, in powers of two; null: nothing
  const uint64_t* row_bits = nullptr;  // kConsecutive: key_bits of each row besides; null: none
  const StoredRows* stored_keys = nullptr;  // both, in place of packed ones; null: packed
  const StoredRows* stored_values = nullptr;
};

// Up to kMaxRows query rows against a list of tiles.
struct Panel {
  int rows;
  int head_dim;         // of q and k
  int value_dim;
  int padded_head_dim;  // as packed
  int padded_value_dim;
  DType dtype;
  DType output_dtype;
  const void* const* queries;  // one pointer a row
  void* const* outputs;
  float* const* lse;
  const int64_t* positions;
  const float* sink_logits;    // one a row, or null
  float scale;
  float softcap;               // 0: none
  float skip;                  // in powers of two; infinite: none
  Rules rules;
  const Tile* tiles;
  int64_t tile_count;
  void* scratch;               // panel_scratch_bytes(), 64-byte aligned
};

// One tile to pack: 64 keys, some of which may be dead.
struct PackJob {
  DType dtype;
  const void* const* key_rows;    // 64 pointers; null: zero-fill (dead, or past the end)
  const void* const* value_rows;
  int head_dim;
  int value_dim;
  int padded_head_dim;
  int padded_value_dim;
  void* keys;
  void* values;  // null: keys only
};

// Up to kMaxRows query rows for gradients. Elements are floats, or pairs of bf16; rows are padded with zeros.
struct GradientPanel {
  int rows, padded_rows;  // the latter a multiple of kRowPadding
  int padded_head_dim;
  int padded_value_dim;
  const void* queries;          // [padded_rows][dims]; of floats, times the factor of the logits
  const void* queries_across;   // [dims][padded_rows]
  const void* reaching;         // what reaches the output, likewise
  const void* reaching_across;
  const float* lse;             // in powers of two; 0 where a row attends nothing
  const float* level;           // sum of the output times what reaches it, less what reaches the LSE
  const int64_t* positions;
  float scale, softcap;
  Rules rules;
  // Keys as for attention; at `values` the keys again, as values are, and behind them values as keys are.
  const Tile* tiles;
  float* const* sums;   // of each tile: [padded_head_dim][64] for keys, then [padded_value_dim][64] for values
  int64_t tile_count;
  float* query_sums;    // [padded_rows][padded_head_dim], or null
  bool needs_keys, needs_values;
  void* scratch;        // gradient_scratch_bytes(), 64-byte aligned
};

// Rows to pack for a GradientPanel.
struct GradientRows {
  DType dtype;
  int rows, padded_rows;
  int dim, padded_dim;
  const void* const* from;
  float factor;  // of floats
  void* to;
  void* across;
  void* scratch;  // gradient_scratch_bytes()
};

// Sums [padded_dim][64] of 64 keys, times a factor, to rows.
struct GradientKeys {
  DType dtype;
  int dim;
  int padded_dim;
  const float* sums;
  float factor;
  void* const* to;  // 64 pointers; null: nothing
};

struct GradientKernels {
  void (*pack)(const GradientRows&);
  void (*add)(const GradientPanel&);
  void (*write_keys)(const GradientKeys&);
  void (*write_row)(const float* sums, DType dtype, int dim, float factor, void* to);
  float (*product)(const void* a, const void* b, DType dtype, int dim);
};

struct QuantiseKernels;
struct ScoreKernels;
struct LinearKernels;

// One instruction set's kernels.
struct Kernels {
  bool bf16_tiles;       // packs bf16 pairs instead of fp32
  int head_dim_multiple; // packed head dimensions are multiples of it
  void (*pack)(const PackJob&);
  void (*attend)(const Panel&);
  const ScoreKernels* scores;
  const GradientKernels* gradients;
  const QuantiseKernels* quantise;
  const LinearKernels* linear;
};

// Layout of a panel's scratch: Q, O, S (P overwrites it), per-row state (sums, two maxima, a mask).
constexpr int64_t panel_scratch_bytes(int padded_head_dim, int padded_value_dim) {
  return int64_t{kMaxRows} * (padded_head_dim + padded_value_dim + kChunk + 16 + 4) * 4 + 4096;
}

constexpr int kRowPadding = 32;

// Weights and slopes, both also as pairs of rows, and a mask a row; or rows in pairs on their way across.
constexpr int64_t gradient_scratch_bytes() {
  return int64_t{kMaxRows} * (3 * kChunk * 4 + 8) + int64_t{kMaxRows} / 2 * kMaxHeadDim * 4 + 4096;
}

}  // namespace gossamer
