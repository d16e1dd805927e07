// What one thread does to run a plan over packed keys.
#pragma once

#include <cstdint>

#include "attend/packed.h"
#include "runtime/workspace.h"

namespace gossamer {

class PackedWorker {
 public:
  PackedWorker(const PackedKeys& keys, int64_t most_chunks, char* scratch);

  // Sets the marks of the chunks of a packed head that query blocks list.
  void mark_chunks(const PackedHead& head, char* marks);
  // A tile of this pass, counted over all packed heads.
  void pack_tile(int64_t tile);
  void attend(const RowRange& range);

 private:
  void pack_chunk(const PackedHead& head, int64_t chunk, const PackedTiles& to);
  void pack_columns(const PackedHead& head, int64_t column_tile, const PackedTiles& to);
  void pack_means(const PackedHead& head, int64_t mean_tile, const PackedTiles& to);
  void gather(const PackedHead& head);

  const PackedKeys& keys_;
  const Operands& o_;
  Worklist worklist_;
  PanelRows rows_;
  char* scratch_;
  Buffer gather_buffer_, means_buffer_;
};

}  // namespace gossamer
