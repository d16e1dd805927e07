#include "linear/quantised.h"

#include <algorithm>
#include <cstring>

#include "runtime/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kRowsOfJob = 64;
constexpr int64_t kColumnsOfJob = 256;

int64_t parts(int64_t size, int64_t of) { return (size + of - 1) / of; }

}  // namespace

QuantisedInputs::QuantisedInputs(const Kernels& kernels, const MatrixView& x, float scale, uint8_t* out, int threads)
    : kernels_(kernels), rows_(x.rows), columns_(x.columns), starts_(x.rows + 1) {
  struct Found {
    std::vector<Beyond> beyond;
    std::vector<int64_t> counts;
  };
  std::vector<Found> found(parts(rows_, kRowsOfJob));
  run_parallel(threads, static_cast<int64_t>(found.size()), [&](int, int64_t job) {
    Found& mine = found[job];
    std::vector<Beyond> row(columns_);
    for (int64_t n = job * kRowsOfJob; n < std::min((job + 1) * kRowsOfJob, rows_); ++n) {
      uint8_t* to = out + n * columns_;
      const int64_t count =
          kernels.quantise->quantise({x.data + n * x.stride, x.dtype, static_cast<int>(columns_), scale, to}, row.data());
      mine.counts.push_back(count);
      if (count < 0) std::memset(to, kZeroAt, columns_);
      mine.beyond.insert(mine.beyond.end(), row.begin(), row.begin() + std::max<int64_t>(count, 0));
    }
  });
  int64_t n = 0;
  for (const Found& one : found) {
    for (const int64_t count : one.counts) {
      starts_[n + 1] = starts_[n] + std::max<int64_t>(count, 0);
      if (count < 0) lost_.push_back(n);
      ++n;
    }
    beyond_.insert(beyond_.end(), one.beyond.begin(), one.beyond.end());
  }
}

void QuantisedInputs::add(const int8_t* weight, const float* by_row, const MatrixView& out, int threads) const {
  if (beyond_.empty()) return;
  // The weight's columns that count, each in one piece.
  std::vector<int32_t> place(columns_, -1);
  std::vector<int64_t> features;
  for (const Beyond& one : beyond_) place[one.feature] = 0;
  for (int64_t f = 0; f < columns_; ++f) {
    if (place[f] < 0) continue;
    place[f] = static_cast<int32_t>(features.size());
    features.push_back(f);
  }
  const int64_t outputs = out.columns;
  std::vector<int8_t> columns(features.size() * outputs);
  run_parallel(threads, parts(outputs, kColumnsOfJob), [&](int, int64_t job) {
    const int64_t end = std::min((job + 1) * kColumnsOfJob, outputs);
    for (size_t f = 0; f < features.size(); ++f)
      for (int64_t n = job * kColumnsOfJob; n < end; ++n)
        columns[f * outputs + n] = weight[n * columns_ + features[f]];
  });
  run_parallel(threads, parts(rows_, kRowsOfJob), [&](int, int64_t job) {
    std::vector<Beyond> row;
    for (int64_t n = job * kRowsOfJob; n < std::min((job + 1) * kRowsOfJob, rows_); ++n) {
      if (starts_[n] == starts_[n + 1]) continue;
      row.assign(beyond_.begin() + starts_[n], beyond_.begin() + starts_[n + 1]);
      for (Beyond& one : row) one.feature = place[one.feature];
      kernels_.quantise->add_beyond({row.data(), static_cast<int64_t>(row.size()), columns.data(), by_row, outputs,
                                   out.data + n * out.stride, out.dtype});
    }
  });
}

}  // namespace gossamer
