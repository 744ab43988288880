#include <coldrow/table/batch.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

template <class Index>
class BatchOf : public ::testing::Test {};
struct IndexName {
  template <class T>
  static std::string GetName(int) {
    return sizeof(T) == 4 ? "int32" : "int64";
  }
};
using Indices = ::testing::Types<std::int32_t, std::int64_t>;
TYPED_TEST_SUITE(BatchOf, Indices, IndexName);

void expect_problem(const BatchProblem& p, BatchProblem::Kind kind, std::int64_t position,
                    std::int64_t value, std::int32_t feature) {
  EXPECT_EQ(p.kind, kind);
  EXPECT_EQ(p.position, position);
  EXPECT_EQ(p.value, value);
  EXPECT_EQ(p.feature, feature);
}

TYPED_TEST(BatchOf, GoodOffsetsPass) {
  const auto check = [](std::vector<TypeParam> offsets) {
    return check_offsets(offsets.data(), static_cast<std::int64_t>(offsets.size()) - 1,
                         static_cast<std::int64_t>(offsets.back()));
  };
  EXPECT_EQ(check({0}).kind, BatchProblem::none);  // no bags at all
  EXPECT_EQ(check({0, 0, 0}).kind, BatchProblem::none);
  EXPECT_EQ(check({0, 2, 2, 5}).kind, BatchProblem::none);
}

TYPED_TEST(BatchOf, BadOffsetsAreNamed) {
  const std::vector<TypeParam> start = {1, 2, 3};
  expect_problem(check_offsets(start.data(), 2, 3), BatchProblem::offsets_start, 0, 1, -1);
  const std::vector<TypeParam> negative = {-2, 2, 3};
  expect_problem(check_offsets(negative.data(), 2, 3), BatchProblem::offsets_start, 0, -2, -1);
  const std::vector<TypeParam> decrease = {0, 4, 3, 1, 5};  // the first decrease is reported
  expect_problem(check_offsets(decrease.data(), 4, 5), BatchProblem::offsets_decrease, 2, 3, -1);
  const std::vector<TypeParam> below_zero = {0, -1, 5};
  expect_problem(check_offsets(below_zero.data(), 2, 5), BatchProblem::offsets_decrease, 1, -1, -1);
  // A decrease so large that its difference wraps.
  constexpr TypeParam kMax = std::numeric_limits<TypeParam>::max();
  constexpr TypeParam kMin = std::numeric_limits<TypeParam>::min();
  const std::vector<TypeParam> wraps = {0, kMax, kMin, -1, 5};
  expect_problem(check_offsets(wraps.data(), 4, 5), BatchProblem::offsets_decrease, 2, kMin, -1);
  const std::vector<TypeParam> end = {0, 2, 4};
  expect_problem(check_offsets(end.data(), 2, 5), BatchProblem::offsets_end, 2, 4, -1);
  expect_problem(check_offsets(end.data(), 2, 3), BatchProblem::offsets_end, 2, 4, -1);
}

// Two features: table 1 (3 rows) at positions 0 to 3, table 0 (100 rows) at positions 4 and 5.
template <class Index>
BatchProblem check(const std::vector<Index>& indices) {
  Feature features[2] = {};
  features[0].table = 1;
  features[0].positions = 4;
  features[1].table = 0;
  features[1].first_position = 4;
  features[1].positions = 2;
  Batch<Index> batch{};
  batch.indices = indices.data();
  batch.positions = 6;
  batch.features = features;
  batch.num_features = 2;
  const std::int64_t rows[2] = {100, 3};
  return check_indices(batch, rows);
}

TYPED_TEST(BatchOf, IndicesAreCheckedAgainstTheirOwnTable) {
  constexpr TypeParam kMax = std::numeric_limits<TypeParam>::max();
  constexpr TypeParam kMin = std::numeric_limits<TypeParam>::min();
  EXPECT_EQ(check<TypeParam>({0, 1, 2, 0, 99, 3}).kind, BatchProblem::none);
  expect_problem(check<TypeParam>({0, 3, 5, 0, 99, 3}), BatchProblem::index_range, 1, 3, 0);
  expect_problem(check<TypeParam>({0, 1, 2, 0, 99, 100}), BatchProblem::index_range, 5, 100, 1);
  expect_problem(check<TypeParam>({0, 1, 2, -1, 99, 3}), BatchProblem::index_range, 3, -1, 0);
  expect_problem(check<TypeParam>({0, 1, 2, 0, kMin, 3}), BatchProblem::index_range, 4, kMin, 1);
  expect_problem(check<TypeParam>({kMax, 1, 2, 0, 0, 3}), BatchProblem::index_range, 0, kMax, 0);
}

// Every place of a loop that the compiler made vectors of, and every limit that a type can hold.
TYPED_TEST(BatchOf, OneBadIndexAmongMany) {
  for (const std::int64_t rows :
       {std::int64_t{0}, std::int64_t{1}, std::int64_t{1} << 40, INT64_MAX}) {
    for (std::int64_t n = 1; n < 70; ++n) {
      for (std::int64_t bad = 0; bad < n; ++bad) {
        std::vector<TypeParam> indices(static_cast<std::size_t>(n), 0);
        Feature feature{};
        feature.positions = n;
        Batch<TypeParam> batch{};
        batch.indices = indices.data();
        batch.features = &feature;
        batch.num_features = 1;
        indices[static_cast<std::size_t>(bad)] = -5;
        expect_problem(check_indices(batch, &rows), BatchProblem::index_range, rows > 0 ? bad : 0,
                       rows > 0 || bad == 0 ? -5 : 0, 0);
        indices[static_cast<std::size_t>(bad)] = 0;
        const auto kind = check_indices(batch, &rows).kind;
        EXPECT_EQ(kind, rows > 0 ? BatchProblem::none : BatchProblem::index_range);
      }
    }
  }
}

TYPED_TEST(BatchOf, FeatureWithoutIndicesIsFine) {
  Feature feature{};
  Batch<TypeParam> batch{};
  batch.features = &feature;
  batch.num_features = 1;
  const std::int64_t rows[1] = {0};
  EXPECT_EQ(check_indices(batch, rows).kind, BatchProblem::none);
}

TYPED_TEST(BatchOf, BagsBeginAtTheirOffsets) {
  const std::vector<TypeParam> offsets = {0, 2, 2, 5};
  Batch<TypeParam> batch{};
  batch.offsets = offsets.data();
  EXPECT_EQ(batch.bag_begin(1), 2);
  EXPECT_EQ(batch.bag_begin(3), 5);
  batch.offsets = nullptr;
  EXPECT_EQ(batch.bag_begin(3), 3);
}

}  // namespace
}  // namespace coldrow_test
