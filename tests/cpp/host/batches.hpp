// Random batches over several tables, and the list of their lookups by the definition.
#pragma once

#include <coldrow/host/segment.hpp>

#include "../inputs.hpp"

namespace coldrow_test {

struct BatchSpec {
  std::vector<std::int64_t> rows;            // of each table
  std::vector<std::int32_t> dims;            // of each table
  std::vector<std::int32_t> feature_tables;  // of each feature
  std::vector<std::int64_t> bags;            // of each feature
  int longest = 5;
  bool pooled = true;
  bool mean = false;
  bool weighted = false;
  bool offsets = true;  // false: every index is a bag of its own
  int gap = 3;          // between output rows: nobody's
};

// Tables 0 and 1 are shared by two features each, bags may be empty, one feature has none at all.
inline BatchSpec shared_tables() {
  BatchSpec spec;
  spec.rows = {40, 7, 1000, 3};
  spec.dims = {16, 5, 70, 130};
  spec.feature_tables = {1, 0, 2, 0, 3, 1, 2};
  spec.bags = {30, 20, 25, 40, 6, 11, 0};
  return spec;
}

// One lookup: the row read, its bag, and what the row is multiplied by.
struct Lookup {
  std::size_t feature;
  std::int64_t table, row, position;
  std::int64_t out_row;  // counted over all features
  double scale;
};

template <class Index>
struct TestBatch {
  BatchSpec spec;
  std::vector<Index> indices, offsets;
  std::vector<float> weights;
  std::vector<Feature> features;
  std::vector<std::int64_t> table_base;
  std::int64_t bags = 0;
  std::int64_t out_size = 0;
  std::vector<Lookup> lookups;

  TestBatch(const BatchSpec& s, Random& random) : spec(s) {
    std::int64_t base = 0;
    for (const std::int64_t rows : spec.rows) {
      table_base.push_back(base);
      base += rows;
    }
    offsets.push_back(0);
    for (std::size_t f = 0; f < spec.feature_tables.size(); ++f) add_feature(f, random);
    if (spec.weighted) weights = random.numbers<float>(positions(), -2.0, 2.0);
    list_lookups();
  }

  std::int64_t positions() const { return static_cast<std::int64_t>(indices.size()); }
  std::int64_t out_rows() const { return spec.pooled ? bags : positions(); }

  Batch<Index> view() const {
    return {indices.data(),
            spec.offsets ? offsets.data() : nullptr,
            bags,
            positions(),
            features.data(),
            static_cast<std::int32_t>(features.size()),
            spec.pooled,
            spec.mean,
            spec.weighted ? weights.data() : nullptr};
  }

  // All lookups, for sorting over all tables at once.
  host::Lookups<Index> all(const std::int64_t* base) const {
    return {view(), features.data(), static_cast<int>(features.size()), base};
  }

  // Where element d of a lookup's output row is.
  std::int64_t out_element(const Lookup& lookup, std::int64_t d) const {
    const Feature& feature = features[lookup.feature];
    return feature.out_offset + (lookup.out_row - feature.first_row) * feature.out_stride + d;
  }

 private:
  void add_feature(std::size_t f, Random& random) {
    Feature feature{};
    feature.table = spec.feature_tables[f];
    const auto table = static_cast<std::size_t>(feature.table);
    feature.dim = spec.dims[table];
    feature.first_bag = bags;
    feature.bags = spec.bags[f];
    feature.first_position = positions();
    for (std::int64_t b = 0; b < feature.bags; ++b) {
      const std::int64_t length = spec.offsets ? random.below(spec.longest + 1) : 1;
      for (std::int64_t i = 0; i < length; ++i) {
        // Half of the lookups go to a few rows, so that there are duplicates.
        const std::int64_t rows = spec.rows[table];
        const std::int64_t among = random.below(2) == 0 ? std::min<std::int64_t>(rows, 5) : rows;
        indices.push_back(static_cast<Index>(random.below(among)));
      }
      offsets.push_back(static_cast<Index>(positions()));
    }
    bags += feature.bags;
    feature.positions = positions() - feature.first_position;
    feature.first_row = spec.pooled ? feature.first_bag : feature.first_position;
    feature.out_offset = out_size;
    feature.out_stride = feature.dim + spec.gap;
    out_size += (spec.pooled ? feature.bags : feature.positions) * feature.out_stride;
    features.push_back(feature);
  }

  void list_lookups() {
    for (std::size_t f = 0; f < features.size(); ++f) {
      for (std::int64_t b = 0; b < features[f].bags; ++b) {
        const auto bag = static_cast<std::size_t>(features[f].first_bag + b);
        for (Index p = offsets[bag]; p < offsets[bag + 1]; ++p) {
          Lookup l{};
          l.feature = f;
          l.table = features[f].table;
          l.position = p;
          l.row = indices[static_cast<std::size_t>(p)];
          l.out_row = spec.pooled ? static_cast<std::int64_t>(bag) : l.position;
          l.scale = 1.0;
          if (spec.pooled && spec.mean)
            l.scale = 1.0 / static_cast<double>(offsets[bag + 1] - offsets[bag]);
          if (spec.weighted) l.scale = value_of(weights[static_cast<std::size_t>(p)]);
          lookups.push_back(l);
        }
      }
    }
  }
};

}  // namespace coldrow_test
