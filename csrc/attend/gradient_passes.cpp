#include "attend/gradient_passes.h"

#include <utility>

namespace gossamer {

std::vector<GradientPass> GradientSizes::passes() const {
  std::vector<GradientPass> passes;
  int64_t held = 0;
  for (int64_t b = 0; b < o_.plan.batch(); ++b)
    for (int64_t group = 0; group < o_.call.k.heads; ++group) {
      GradientUnit whole{b, group, ranges_of(b, group), true, true};
      if (whole.ranges.empty() || o_.chunks(b) == 0) continue;
      const int64_t bytes = unit_bytes(whole, 1);
      if (bytes > kGradientBytes) {
        add_in_pieces(whole, passes);
        held = kGradientBytes;  // the next begins a pass
        continue;
      }
      if (passes.empty() || held + bytes > kGradientBytes) {
        passes.emplace_back();
        held = 0;
      }
      held += bytes;
      passes.back().push_back(std::move(whole));
    }
  return passes;
}

void GradientSizes::add_in_pieces(const GradientUnit& whole, std::vector<GradientPass>& passes) const {
  const int64_t room = std::max(kGradientBytes - key_bytes(whole.b), kGradientBytes / 2);
  size_t first = 0;
  while (first < whole.ranges.size()) {
    GradientUnit piece{whole.b, whole.group, {}, first == 0, false};
    int64_t bytes = 0;
    do {
      bytes += panel_bytes(whole.ranges[first], 2);
      piece.ranges.push_back(whole.ranges[first++]);
    } while (first < whole.ranges.size() && bytes + panel_bytes(whole.ranges[first], 2) <= room);
    piece.ends = first == whole.ranges.size();
    passes.push_back({std::move(piece)});
  }
}

std::vector<RowRange> GradientSizes::ranges_of(int64_t b, int64_t group) const {
  const Plan& plan = o_.plan;
  const int64_t share = o_.heads_a_plan_head, plan_heads = plan.heads / o_.call.k.heads;
  // Bands alone are the same for all query blocks, which then need not be told apart.
  const bool apart = plan.blocks.count > 0 || plan.columns.count > 0;
  const int64_t blocks = plan.row_blocks(b), block_rows = std::min<int64_t>(plan.grid.block_q, kMaxRows);
  const int64_t heads_at_once = std::max<int64_t>(1, std::min(share, kMaxRows / block_rows));
  const int64_t rows_at_once = apart ? block_rows : kMaxRows / heads_at_once;
  std::vector<RowRange> ranges;
  for (int64_t m = 0; m < (apart ? blocks : std::min<int64_t>(blocks, 1)); ++m) {
    const Range rows{plan.rows(b, m).begin, plan.rows(b, apart ? m : blocks - 1).end};
    for (int64_t first = rows.begin; first < rows.end; first += rows_at_once)
      for (int64_t h = group * plan_heads; h < (group + 1) * plan_heads; ++h)
        for (int64_t head = 0; head < share; head += heads_at_once)
          ranges.push_back({int32_t(b), int32_t(h), int32_t(m), int32_t(h * share + head),
                            int32_t(std::min(heads_at_once, share - head)), int32_t(first),
                            int32_t(std::min(rows_at_once, rows.end - first))});
  }
  return ranges;
}

}  // namespace gossamer
