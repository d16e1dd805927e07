// What a decode step asks of each token of a cache without reading its key. No std:: here; job.h says why.
#pragma once

#include <cstdint>

namespace gossamer {

// Numbers of a label: of floating point, or codes of 8 or 4 bits.
enum class LabelType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUint8 = 3, kUint4 = 4 };

// Labels of consecutive tokens against a few queries. A row of codes has one channel of all tokens, or two: of 4 bits,
// the first of them in the lower half of a byte.
struct LabelScores {
  const float* queries;  // heads rows of `channels`
  int heads;
  int channels;
  const char* codes;  // of the first token and channel
  int64_t row_bytes;  // from one row of codes to the next
  LabelType type;
  const uint16_t* low;   // of codes: a value is low + step * code, bf16, one of each a token
  const uint16_t* step;
  int64_t count;         // of tokens
  float* scores;         // a row of `pitch` a head
  int64_t pitch;
};

constexpr int kHashTile = 64;  // tokens whose codes lie together

// In how many tables the codes of tokens are those of a few queries. Codes of 64 tokens lie together, table by table.
struct Collisions {
  const int16_t* queries;  // heads rows of `tables`
  int heads;
  int tables;
  const int16_t* codes;  // tiles of tables x 64
  int64_t tiles;
  int16_t* counts;  // a row of `pitch` a head
  int64_t pitch;
};

}  // namespace gossamer
