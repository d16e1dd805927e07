// What one thread does to run a plan over packed keys.
#pragma once

#include <cstdint>

#include "attend/packed.h"
#include "runtime/workspace.h"

namespace gossamer {

class PackedWorker {
 public:
  PackedWorker(const PackedKeys& keys, char* scratch);

  // Sets the marks of the chunks that query blocks of a packed head list.
  void mark_chunks(int64_t packed_head, char* marks);
  // Chunk n of all (packed head of this pass, chunk).
  void pack_chunk(int64_t n);
  // Tile n of all column lists.
  void pack_columns(int64_t n);
  void attend(const RowRange& range);

 private:
  void gather();

  const PackedKeys& keys_;
  const Operands& o_;
  Worklist worklist_;
  PanelRows rows_;
  char* scratch_;
  Buffer gather_buffer_;
};

}  // namespace gossamer
