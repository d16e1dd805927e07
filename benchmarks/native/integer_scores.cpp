// What products in integers would save the CPU kernel: its own panels (csrc/kernels/flash.h) with the product of queries
// and keys as it is, in int8, in int16 (of fp32), and left out; of bf16 also both products in int8, and both left out.
//
//   integer_scores KEYS DIM TILES ROUNDS    one key/value head with four query heads; each block of 64 queries attends
//                                           TILES of the KEYS / 64 tiles, all rows all 64 keys. Prints JSON.
//
// Queries and keys have a step (scale) for each token. int8: keys less their mean, step = largest / 127. int16: the
// smallest step at which neither a number nor any int32 sum overflows. Values in int8 have a step for each tile. Packing,
// with the mean and the rounding, counts. Seconds are of the thread; `scores_s` is the product of queries and keys by
// itself, to scores in fp32.
// benchmarks/quantised.py compiles it with the flags of an instruction set and the macro that integer_products.h asks for.
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "integer_products.h"

namespace gossamer {
namespace {

struct Problem {
  static constexpr int kHeads = 4, kQueries = 64, kRows = kHeads * kQueries;
  static constexpr int kUnit = kBf16 ? 2 : 4;
  int keys, dim;
  int64_t row_bytes = int64_t{dim} * kUnit, tile_bytes = kChunk * row_bytes;
  std::vector<char> q, k, v, out, packed_keys, packed_values;
  std::vector<float> lse, scratch, mean = std::vector<float>(dim);
  std::vector<std::vector<Tile>> lists;  // by query block

  Problem(int keys, int dim, int tiles) : keys(keys), dim(dim) {
    for (auto* x : {&q, &out}) x->resize(keys * kHeads * row_bytes);
    for (auto* x : {&k, &v, &packed_keys, &packed_values}) x->resize(keys * row_bytes + 64);
    lse.resize(keys * kHeads);
    scratch.resize(panel_scratch_bytes(dim, dim) / sizeof(float) + 16);
    std::mt19937 generator(0);
    std::vector<int> order(keys / kChunk);
    std::iota(order.begin(), order.end(), 0);
    for (int m = 0; m < keys / kQueries; ++m) {
      std::shuffle(order.begin(), order.end(), generator);
      std::sort(order.begin(), order.begin() + tiles);
      lists.emplace_back();
      for (int n = 0; n < tiles; ++n)
        lists.back().push_back({aligned(packed_keys) + order[n] * tile_bytes,
                                aligned(packed_values) + order[n] * tile_bytes, nullptr, int64_t{order[n]} * kChunk,
                                ~uint64_t{0}, kChunk, TileKind::kFull});
    }
    keys_begin = aligned(packed_keys);
    keys_end = keys_begin + keys * row_bytes;
#if defined(GOSSAMER_AVX512_BF16)
    scratch_begin = reinterpret_cast<const char*>(scratch.data());
    scratch_end = reinterpret_cast<const char*>(scratch.data() + scratch.size());
#endif
  }

  template <class T>
  static T* aligned(std::vector<T>& x) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(x.data()) + 63) & ~uintptr_t{63});
  }

  void draw(unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v})
      for (size_t n = 0; n + kUnit <= x->size(); n += kUnit) {
        const float value = normal(generator);
        if (kBf16)
          *reinterpret_cast<uint16_t*>(x->data() + n) = float_to_bf16(value);
        else
          *reinterpret_cast<float*>(x->data() + n) = value;
      }
  }

  static constexpr DType dtype() { return kBf16 ? DType::kBFloat16 : DType::kFloat32; }

  void average() {
    alignas(64) float wide[kMaxHeadDim];
    std::fill(mean.begin(), mean.end(), 0.0f);
    for (int t = 0; t < keys; ++t) {
      widen_row<V>(k.data() + t * row_bytes, dtype(), dim, dim, 1.0f / static_cast<float>(keys), wide);
      for (int d = 0; d < dim; ++d) mean[d] += wide[d];
    }
  }

  template <class Pack>
  void pack(const Pack& pack_one) {
    for (int n = 0; n < keys / kChunk; ++n) {
      const void *key_rows[kChunk], *value_rows[kChunk];
      for (int t = 0; t < kChunk; ++t) {
        key_rows[t] = k.data() + (n * kChunk + t) * row_bytes;
        value_rows[t] = v.data() + (n * kChunk + t) * row_bytes;
      }
      pack_one(PackJob{dtype(), key_rows, value_rows, dim, dim, dim, dim, aligned(packed_keys) + n * tile_bytes,
                       aligned(packed_values) + n * tile_bytes});
    }
  }

  template <class Isa>
  void attend() {
    for (size_t m = 0; m < lists.size(); ++m) {
      const void* queries[kRows];
      void* outputs[kRows];
      float* lses[kRows];
      int64_t positions[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = (r / kQueries) * int64_t{keys} + m * kQueries + r % kQueries;
        queries[r] = q.data() + row * row_bytes;
        outputs[r] = out.data() + row * row_bytes;
        lses[r] = lse.data() + row;
        positions[r] = m * kQueries + r % kQueries;
      }
      Panel panel{kRows, dim, dim, dim, dim, dtype(), dtype(), queries, outputs, lses, positions, nullptr,
                  1.0f / std::sqrt(static_cast<float>(dim)), 0.0f, kInfinity, {keys, 0, 0, kUnlimited, false},
                  lists[m].data(), static_cast<int64_t>(lists[m].size()), aligned(scratch)};
      attend_panel<Isa>(panel);
    }
  }

  // The product of queries and keys alone, as the panels ask for it.
  template <class Isa>
  void scores() {
    float* queries = aligned(scratch);
    float* logits = queries + kMaxRows * dim;
    const int64_t row_words = row_bytes / 4;
    for (size_t m = 0; m < lists.size(); ++m) {
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = (r / kQueries) * int64_t{keys} + m * kQueries + r % kQueries;
        std::memcpy(queries + r * row_words, q.data() + row * row_bytes, row_bytes);
      }
      Isa::begin();
      for (const Tile& tile : lists[m])
        Isa::multiply(kRows, kChunk, static_cast<int>(row_words), reinterpret_cast<uint32_t*>(queries), row_words,
                      static_cast<const uint32_t*>(tile.keys), kChunk, logits, kChunk, false);
      Isa::end();
    }
  }

  std::vector<float> outputs() const {
    std::vector<float> wide(out.size() / kUnit);
    for (size_t n = 0; n < wide.size(); ++n) wide[n] = scalar_as_float(out.data(), static_cast<int>(n), dtype());
    return wide;
  }
};

struct Contender {
  const char* name;
  std::function<void()> pack, attend, scores;  // the last may lack
  std::vector<double> pack_s{}, attend_s{}, scores_s{};
  double difference = 0;  // of the output from the first contender's, relative, in the L2 norm
};

double difference(const std::vector<float>& got, const std::vector<float>& expected) {
  double apart = 0, size = 0;
  for (size_t n = 0; n < got.size(); ++n) {
    apart += std::pow(got[n] - expected[n], 2.0);
    size += std::pow(expected[n], 2.0);
  }
  return std::sqrt(apart / size);
}

// Of this thread alone: others may share the processor.
double seconds(const std::function<void()>& work) {
  const auto now = [] {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  };
  const double start = now();
  work();
  return now() - start;
}

void print(const char* name, const std::vector<double>& values) {
  std::printf("\"%s\": [", name);
  for (size_t n = 0; n < values.size(); ++n) std::printf("%s%.6f", n ? ", " : "", values[n]);
  std::printf("], ");
}

int run(int keys, int dim, int tiles, int rounds) {
  Problem p(keys, dim, tiles);
  const auto as_it_is = [&] { p.pack([](const PackJob& job) { pack_tile<Base>(job); }); };
  const auto with_mean = [&](auto pack_one) {
    return [&p, pack_one] {
      p.average();
      p.pack([&](const PackJob& job) { pack_one(job, p.mean.data()); });
    };
  };
  using Int8 = WithIntegers<int8_t>;
  std::vector<Contender> all{
      {"as it is", as_it_is, [&] { p.attend<Base>(); }, [&] { p.scores<Base>(); }},
      {"no product", as_it_is, [&] { p.attend<Without<false>>(); }, nullptr},
      {"int8", with_mean(Int8::pack), [&] { p.attend<Int8>(); }, [&] { p.scores<Int8>(); }}};
#if defined(GOSSAMER_AVX512_BF16)
  all.push_back({"neither product", as_it_is, [&] { p.attend<Without<true>>(); }, nullptr});
  all.push_back({"int8, values too", with_mean(WithBytes::pack), [&] { p.attend<WithBytes>(); }, nullptr});
#endif
  if (!kBf16) {
    using Int16 = WithIntegers<int16_t>;
    all.push_back({"int16", with_mean(Int16::pack), [&] { p.attend<Int16>(); }, [&] { p.scores<Int16>(); }});
  }
  for (int n = 0; n <= rounds; ++n) {
    p.draw(static_cast<unsigned>(n));
    all[0].pack();
    all[0].attend();
    const std::vector<float> expected = p.outputs();
    for (size_t turn = 0; turn < all.size(); ++turn) {
      Contender& one = all[(n + turn) % all.size()];
      const double pack_s = seconds(one.pack), attend_s = seconds(one.attend);
      one.difference = difference(p.outputs(), expected);
      if (n == 0) continue;
      one.pack_s.push_back(pack_s);
      one.attend_s.push_back(attend_s);
      if (one.scores != nullptr) one.scores_s.push_back(seconds(one.scores));
    }
  }
  std::printf("[");
  for (const Contender& one : all) {
    std::printf("%s{\"scores\": \"%s\", ", &one == all.data() ? "" : ", ", one.name);
    print("pack_s", one.pack_s);
    print("attend_s", one.attend_s);
    if (one.scores != nullptr) print("scores_s", one.scores_s);
    std::printf("\"difference\": %.6f}", one.difference);
  }
  std::printf("]\n");
  return 0;
}

}  // namespace
}  // namespace gossamer

int main(int argc, char** argv) {
  if (argc != 5) return 1;
#if defined(GOSSAMER_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 1;
#endif
  return gossamer::run(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]));
}
