#include <coldrow/table/table.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

// The layout that drivers prefer: both state values of a row in one 8-byte record.
struct Record {
  float momentum1;
  std::int32_t prev_iter;
};

TEST(Table, StridedSkipsThroughRecords) {
  std::vector<Record> records(5);
  for (int i = 0; i < 5; ++i) {
    records[static_cast<std::size_t>(i)] = {static_cast<float>(i) + 0.5f, 10 * i};
  }
  const Strided<float> momentum1{&records[0].momentum1, 2};
  const Strided<std::int32_t> prev_iter{&records[0].prev_iter, 2};
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(momentum1[i], static_cast<float>(i) + 0.5f);
    EXPECT_EQ(prev_iter[i], 10 * i);
  }
  const Strided<float> backwards{&records[4].momentum1, -2};
  EXPECT_EQ(backwards[1], 3.5f);
}

TEST(Table, RowPointsAtItsOwnWeightsAndState) {
  std::vector<half> weight(4 * 7);
  std::vector<Record> records(4);
  Table<half, RowwiseRMSprop> table;
  table.weight = weight.data();
  table.rows = 4;
  table.dim = 7;
  table.prev_iter = {&records[0].prev_iter, 2};
  table.scalars[0] = {&records[0].momentum1, 2};
  for (std::int64_t r = 0; r < 4; ++r) {
    const auto row = table.row(r);
    EXPECT_EQ(row.weight, weight.data() + 7 * r);
    EXPECT_EQ(row.prev_iter, &records[static_cast<std::size_t>(r)].prev_iter);
    EXPECT_EQ(row.scalars[0], &records[static_cast<std::size_t>(r)].momentum1);
  }
}

struct ElementWise {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 2;
  struct AtRow {
    bool finite() const { return true; }
  };
  AtRow row(float*, float, float, std::int32_t) const { return {}; }
  float element(const AtRow&, float g, float*) const { return g; }
};

TEST(Table, ElementWiseStateIsLaidOutLikeTheWeights) {
  std::vector<float> weight(12), a(12), b(12);
  std::vector<std::int32_t> prev_iter(4);
  Table<float, ElementWise> table;
  table.weight = weight.data();
  table.rows = 4;
  table.dim = 3;
  table.prev_iter = {prev_iter.data()};
  table.vectors[0] = a.data();
  table.vectors[1] = b.data();
  EXPECT_EQ(table.row(2).vectors[0], a.data() + 6);
  EXPECT_EQ(table.row(2).vectors[1], b.data() + 6);
  EXPECT_EQ(table.row(2).prev_iter, &prev_iter[2]);
}

TEST(Table, UpdatesThroughARecordLeaveTheOthersAlone) {
  std::vector<float> weight = {1.0f, 2.0f, 3.0f, 4.0f};
  std::vector<Record> records(2, {4.0f, 1});
  Table<float, RowwiseRMSprop> table;
  table.weight = weight.data();
  table.rows = 2;
  table.dim = 2;
  table.prev_iter = {&records[0].prev_iter, 2};
  table.scalars[0] = {&records[0].momentum1, 2};
  const std::vector<float> grad(2);
  const auto update =
      RowUpdate<float, float, RowwiseRMSprop, Constant, Nearest>::at(2, 1.0, {1e-8f, 0.5f}, {0.5f});
  EXPECT_TRUE(update(Serial{}, table.row(1), grad.data(), 2, table.key(1)));
  EXPECT_EQ(weight, (std::vector<float>{1.0f, 2.0f, 1.5f, 2.0f}));
  EXPECT_EQ(records[0].momentum1, 4.0f);
  EXPECT_EQ(records[0].prev_iter, 1);
  EXPECT_EQ(records[1].momentum1, 2.0f);
  EXPECT_EQ(records[1].prev_iter, 2);
}

TEST(Table, KeysAreGlobal) {
  Table<float, RowwiseRMSprop> table;
  table.origin = {42, 1000000000000, 16, 3};
  const ElementKey key = table.key(5);
  EXPECT_EQ(key.table, 42u);
  EXPECT_EQ(key.row, 1000000000005);
  EXPECT_EQ(key.col_offset, 16);
}

}  // namespace
}  // namespace coldrow_test
