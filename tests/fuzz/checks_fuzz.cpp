// The checks of a batch on offsets and indices of any value, in memory of exactly their own size: what
// is wrong with a batch must be found, the first of it, and nothing outside the arrays be read.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../bindings/kernels.hpp"
#include "bytes.hpp"

namespace coldrow_fuzz {
namespace {

using namespace coldrow_module;

struct Given {
  std::vector<std::int64_t> offsets, indices, rows;
  std::vector<Feature> features;
};

// A few values anywhere become what the bytes say.
template <class Index>
void patch(Bytes& in, std::vector<std::int64_t>& values) {
  for (std::int64_t n = in.from(0, 3); n > 0 && !values.empty(); --n) {
    const std::size_t at = in.raw<std::uint16_t>() % values.size();
    values[at] = in.flag() ? in.from(-2, 80) : static_cast<std::int64_t>(in.raw<Index>());
  }
}

template <class Index>
Given decode(Bytes& in, bool functional) {
  Given g;
  for (std::int64_t t = in.from(1, 3); t > 0; --t) {
    g.rows.push_back(in.one_of<std::int64_t>(
        {0, 1, 7, 200, std::int64_t{1} << 31, (std::int64_t{1} << 32) + 1, INT64_MAX}));
  }
  const std::int64_t features = functional ? 1 : in.from(0, 4);
  g.offsets.push_back(0);
  for (std::int64_t f = 0; f < features; ++f) {
    Feature feature{};
    feature.table = static_cast<std::int32_t>(in.raw<std::uint8_t>() % g.rows.size());
    feature.dim = 1;
    feature.first_bag = static_cast<std::int64_t>(g.offsets.size()) - 1;
    feature.bags = in.from(0, 20);
    for (std::int64_t b = 0; b < feature.bags; ++b) {
      g.offsets.push_back(g.offsets.back() + (functional ? 1 : in.from(0, 4)));
    }
    const std::int64_t rows = g.rows[static_cast<std::size_t>(feature.table)];
    while (static_cast<std::int64_t>(g.indices.size()) < g.offsets.back()) {
      g.indices.push_back(rows == 0 ? 0 : in.raw<std::uint8_t>() % rows);
    }
    feature.positions = functional ? feature.bags : 0;  // otherwise check_batch() finds them
    g.features.push_back(feature);
  }
  if (!functional) patch<Index>(in, g.offsets);
  patch<Index>(in, g.indices);
  for (auto* values : {&g.offsets, &g.indices}) {
    for (std::int64_t& v : *values) v = static_cast<Index>(v);
  }
  if (in.from(0, 7) == 0 && !g.indices.empty() && !functional) g.indices.pop_back();
  return g;
}

BatchProblem expected(const Given& g, bool functional) {
  const auto& o = g.offsets;
  const auto positions = static_cast<std::int64_t>(g.indices.size());
  if (!functional) {
    if (o[0] != 0) return {BatchProblem::offsets_start, 0, o[0], -1};
    for (std::size_t b = 1; b < o.size(); ++b) {
      if (o[b] < o[b - 1])
        return {BatchProblem::offsets_decrease, static_cast<std::int64_t>(b), o[b], -1};
    }
    if (o.back() != positions) {
      return {BatchProblem::offsets_end, static_cast<std::int64_t>(o.size()) - 1, o.back(), -1};
    }
  }
  for (std::size_t f = 0; f < g.features.size(); ++f) {
    const Feature& feature = g.features[f];
    const std::int64_t rows = g.rows[static_cast<std::size_t>(feature.table)];
    for (std::int64_t p = o[static_cast<std::size_t>(feature.first_bag)];
         p < o[static_cast<std::size_t>(feature.first_bag + feature.bags)]; ++p) {
      const std::int64_t i = g.indices[static_cast<std::size_t>(p)];
      if (i < 0 || i >= rows)
        return {BatchProblem::index_range, p, i, static_cast<std::int32_t>(f)};
    }
  }
  return {BatchProblem::none, -1, 0, -1};
}

template <class Index>
void check(Bytes& in, bool functional) {
  const Given g = decode<Index>(in, functional);
  const auto exact = [](const std::vector<std::int64_t>& from) {
    std::unique_ptr<Index[]> to(new Index[from.size()]);
    for (std::size_t i = 0; i < from.size(); ++i) to[i] = static_cast<Index>(from[i]);
    return to;
  };
  const auto indices = exact(g.indices), offsets = exact(g.offsets);
  std::vector<AnyTable> tables;
  for (const std::int64_t rows : g.rows) {
    AnyTable t{};
    t.rows = rows;
    t.dim = 1;
    tables.push_back(t);
  }
  std::vector<Feature> features = g.features;
  AnyBatch b{};
  b.tables = tables.data();
  b.num_tables = static_cast<std::int32_t>(tables.size());
  b.features = features.data();
  b.num_features = static_cast<std::int32_t>(features.size());
  b.index_type = sizeof(Index) == 4 ? IndexType::i32 : IndexType::i64;
  b.indices = indices.get();
  b.offsets = functional ? nullptr : offsets.get();
  b.bags = static_cast<std::int64_t>(g.offsets.size()) - 1;
  b.positions = static_cast<std::int64_t>(g.indices.size());
  b.threads = 1;
  const BatchProblem want = expected(g, functional);
  for (auto k = available_kernels(); *k != nullptr; ++k) {
    const BatchProblem got = (*k)->check_batch(b);
    if (got.kind != want.kind || got.position != want.position || got.value != want.value ||
        got.feature != want.feature) {
      std::fprintf(stderr, "%s found %d at %ld (%ld, feature %d), expected %d at %ld (%ld, %d)\n",
                   (*k)->name, got.kind, static_cast<long>(got.position),
                   static_cast<long>(got.value), got.feature, want.kind,
                   static_cast<long>(want.position), static_cast<long>(want.value), want.feature);
      std::abort();
    }
  }
}

}  // namespace
}  // namespace coldrow_fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace coldrow_fuzz;
  Bytes in(data, size);
  const bool wide = in.flag(), functional = in.flag();
  if (wide) {
    check<std::int64_t>(in, functional);
  } else {
    check<std::int32_t>(in, functional);
  }
  return 0;
}
