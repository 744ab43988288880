#include <coldrow/host/lookup.hpp>

#include "../support.hpp"
#include "batches.hpp"

namespace coldrow_test {
namespace {

using host::Bags;

template <class W, class Index>
struct OneTable {
  TestBatch<Index> batch;
  std::vector<W> values;
  AtPageEnd<W> weight;       // faults where a row's end is passed
  AtPageEnd<Index> indices;  // and where an index too many is looked at

  static BatchSpec spec_of(int dim, BatchSpec spec) {
    spec.rows = {50};
    spec.dims = {dim};
    spec.feature_tables = {0};
    spec.bags = {40};
    return spec;
  }
  OneTable(int dim, const BatchSpec& spec, Random& random)
      : batch(spec_of(dim, spec), random),
        values(random.numbers<W>(50 * dim)),
        weight(values),
        indices(batch.indices) {}

  Bags<W, Index> bags() const {
    const Feature& feature = batch.features[0];
    const bool by_bag = batch.spec.pooled && batch.spec.offsets;
    return {weight.data(),
            feature.dim,
            indices.data(),
            by_bag ? batch.offsets.data() : nullptr,
            0,
            by_bag ? feature.bags : feature.positions,
            feature.positions,
            batch.spec.weighted ? batch.weights.data() : nullptr,
            batch.spec.mean};
  }
  double value(const Lookup& l, std::int64_t d) const {
    return value_of(values[static_cast<std::size_t>(l.row * batch.features[0].dim + d)]);
  }
};

constexpr float kUntouched = -777.0f;

template <class W, class Index, class Out>
void expect_lookup(int dim, const BatchSpec& spec) {
  Random random(1);
  const OneTable<W, Index> t(dim, spec, random);
  const auto size = static_cast<std::size_t>(t.batch.out_size);
  std::vector<double> expected(size), weight_of_terms(size);
  for (const Lookup& l : t.batch.lookups) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const auto i = static_cast<std::size_t>(t.batch.out_element(l, d));
      expected[i] += l.scale * t.value(l, d);
      weight_of_terms[i] += std::fabs(l.scale * t.value(l, d));
    }
  }
  std::vector<Out> out(size, number<Out>(kUntouched));
  const std::int64_t stride = t.batch.features[0].out_stride;
  host::lookup_bags(t.bags(), out.data(), stride);
  for (std::size_t i = 0; i < size; ++i) {
    if (static_cast<std::int64_t>(i) % stride >= dim) {
      ASSERT_EQ(value_of(out[i]), value_of(number<Out>(kUntouched))) << "written between rows";
      continue;
    }
    double tolerance = 1e-6 * weight_of_terms[i];
    if (!std::same_as<Out, float>) tolerance += spacing<Out>(expected[i]) / 2.0;
    ASSERT_NEAR(value_of(out[i]), expected[i], tolerance) << "dim " << dim << ", element " << i;
  }

  // In pieces, as threads take them: the same bits.
  for (const int parts : {2, 3}) {
    std::vector<Out> pieces(size, number<Out>(kUntouched));
    for (int part = 0; part < parts; ++part) {
      auto bags = t.bags();
      const std::int64_t n = bags.end;
      bags.begin = host::part_begin(n, part, parts);
      bags.end = host::part_begin(n, part + 1, parts);
      host::lookup_bags(bags, pieces.data() + bags.begin * stride, stride);
    }
    ASSERT_TRUE(same_bits(pieces, out)) << parts;
  }
}

constexpr int kDims[] = {1, 7, 16, 17, 64, 70, 130};

template <class W>
class LookupOf : public ::testing::Test {};
using AllNumeric = ::testing::Types<float, half, bfloat16>;
TYPED_TEST_SUITE(LookupOf, AllNumeric, NumericName);

TYPED_TEST(LookupOf, Sum) {
  for (const int dim : kDims) {
    expect_lookup<TypeParam, std::int64_t, float>(dim, {});
    expect_lookup<TypeParam, std::int32_t, TypeParam>(dim, {});
  }
}

TYPED_TEST(LookupOf, Mean) {
  BatchSpec spec;
  spec.mean = true;
  for (const int dim : kDims) {
    expect_lookup<TypeParam, std::int64_t, float>(dim, spec);
    expect_lookup<TypeParam, std::int32_t, half>(dim, spec);
  }
}

TYPED_TEST(LookupOf, Weighted) {
  BatchSpec spec;
  spec.weighted = true;
  for (const int dim : kDims) {
    expect_lookup<TypeParam, std::int64_t, float>(dim, spec);
    expect_lookup<TypeParam, std::int32_t, bfloat16>(dim, spec);
  }
}

TYPED_TEST(LookupOf, Unpooled) {
  BatchSpec spec;
  spec.pooled = false;
  for (const int dim : kDims) expect_lookup<TypeParam, std::int64_t, TypeParam>(dim, spec);
}

TYPED_TEST(LookupOf, WithoutOffsets) {
  BatchSpec spec;
  spec.offsets = false;
  for (const int dim : kDims) expect_lookup<TypeParam, std::int32_t, TypeParam>(dim, spec);
  spec.weighted = true;
  for (const int dim : kDims) expect_lookup<TypeParam, std::int32_t, float>(dim, spec);
}

TEST(Lookup, EmptyBagsGiveZeros) {
  const std::vector<float> weight = {kNanf, kNanf};
  const std::vector<std::int64_t> offsets = {0, 0, 0};
  for (const bool mean : {false, true}) {
    const Bags<float, std::int64_t> bags{weight.data(), 2,   nullptr, offsets.data(), 0, 2, 0,
                                         nullptr,       mean};
    std::vector<float> out(4, kUntouched);
    host::lookup_bags(bags, out.data(), 2);
    EXPECT_EQ(out, std::vector<float>(4, 0.0f));
  }
}

TEST(Lookup, ReadScalesAreTheReadFactorsTimesTheWeights) {
  Random random(2);
  std::vector<std::int32_t> prev_iter;
  for (int r = 0; r < 30; ++r) prev_iter.push_back(static_cast<std::int32_t>(random.below(100)));
  prev_iter[3] = 0;  // never touched
  prev_iter[4] = 99;
  // Interleaved with something else, as in a state record.
  std::vector<std::int32_t> records(60, -1);
  for (std::size_t r = 0; r < 30; ++r) records[2 * r + 1] = prev_iter[r];
  const Strided<const std::int32_t> strided{records.data() + 1, 2};

  std::vector<std::int64_t> rows;
  for (int p = 0; p < 200; ++p) rows.push_back(random.below(30));
  rows[0] = 3;
  rows[1] = 4;
  const AtPageEnd<std::int64_t> indices(rows);
  const auto weights = random.numbers<float>(200, -2.0, 2.0);
  constexpr double kLr = 0.02;
  for (const DecayCase& c : decay_cases()) {
    for (const std::int32_t epoch_start : {0, 50, 100}) {
      const auto decay = prepare(c.policy, 99, kLr, epoch_start);
      for (const bool weighted : {false, true}) {
        std::vector<float> scale(201, kUntouched);
        host::read_scales(decay, 100, static_cast<float>(kLr), strided, indices.data(), 5, 200,
                          weighted ? weights.data() : nullptr, scale.data());
        host::read_scales(decay, 100, static_cast<float>(kLr), strided, indices.data(), 0, 5,
                          weighted ? weights.data() : nullptr, scale.data());
        for (std::size_t p = 0; p < 200; ++p) {
          const reference::Update update{{}, c.expected};
          const double factor = reference::read_factor(
              update, prev_iter[static_cast<std::size_t>(rows[p])], 100, kLr, epoch_start);
          const double expected = weighted ? factor * value_of(weights[p]) : factor;
          ASSERT_NEAR(value_of(scale[p]), expected, 2e-6)
              << c.name << ", epoch " << epoch_start << ", last "
              << prev_iter[static_cast<std::size_t>(rows[p])];
        }
        ASSERT_EQ(scale[200], kUntouched);
      }
    }
  }
}

template <class W, class G>
void expect_weight_gradients(int dim, bool with_scale, bool pooled) {
  Random random(3);
  BatchSpec spec;
  spec.pooled = pooled;
  const OneTable<W, std::int32_t> t(dim, spec, random);
  const std::int64_t stride = t.batch.features[0].out_stride;
  const auto grad = random.numbers<G>(t.batch.out_size);
  const auto scale = random.numbers<float>(t.batch.positions(), 0.0, 1.0);
  auto bags = t.bags();
  bags.scale = with_scale ? scale.data() : nullptr;

  std::vector<float> out(t.batch.indices.size(), kUntouched);
  host::weight_gradients(bags, grad.data(), stride, out.data());
  for (const Lookup& l : t.batch.lookups) {
    const auto p = static_cast<std::size_t>(l.position);
    double expected = 0.0;
    for (std::int64_t d = 0; d < dim; ++d) {
      expected +=
          t.value(l, d) * value_of(grad[static_cast<std::size_t>(t.batch.out_element(l, d))]);
    }
    if (with_scale) expected *= value_of(scale[p]);
    ASSERT_NEAR(value_of(out[p]), expected, 1e-6 * dim) << "dim " << dim << ", position " << p;
  }

  std::vector<float> pieces(out.size(), kUntouched);
  const std::int64_t n = bags.end;
  for (int part = 0; part < 3; ++part) {
    bags.begin = host::part_begin(n, part, 3);
    bags.end = host::part_begin(n, part + 1, 3);
    host::weight_gradients(bags, grad.data() + bags.begin * stride, stride, pieces.data());
  }
  ASSERT_TRUE(same_bits(pieces, out));
}

TYPED_TEST(LookupOf, WeightGradients) {
  for (const int dim : kDims) {
    for (const bool pooled : {true, false}) {
      expect_weight_gradients<TypeParam, float>(dim, false, pooled);
      expect_weight_gradients<TypeParam, float>(dim, true, pooled);
      expect_weight_gradients<TypeParam, TypeParam>(dim, true, pooled);
    }
  }
}

}  // namespace
}  // namespace coldrow_test
