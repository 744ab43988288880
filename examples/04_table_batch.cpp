// Two tables and three features, of which two share a table: a lookup with mean pooling that charges
// decay where it reads, then backward with update.
#include <cmath>
#include <coldrow/coldrow.hpp>
#include <cstdio>
#include <vector>

using namespace coldrow;

bool near(double a, double b) { return std::fabs(a - b) < 1e-6; }

int main() {
  // Bags of two samples, feature by feature: user {2} {0}, friend {2, 3} {}, item {1, 1, 4} {0}.
  const std::vector<std::int64_t> indices = {2, 0, 2, 3, 1, 1, 4, 0};
  const std::vector<std::int64_t> offsets = {0, 1, 2, 4, 4, 7, 8};
  constexpr std::int64_t kSamples = 2, kPositions = 8;

  std::vector<float> users(4 * 3, 1.0f), items(5 * 2, 1.0f);  // [rows, dim]
  std::vector<std::int32_t> users_touched(4), items_touched(5);
  using TableView = Table<float, SGD>;
  const TableView tables[] = {
      {users.data(), /*rows=*/4, /*dim=*/3, {users_touched.data()}, {}, {}},
      {items.data(), /*rows=*/5, /*dim=*/2, {items_touched.data()}, {}, {}}};
  const std::int64_t table_base[] = {0, 4, 9};  // rows numbered through both tables

  // Sample s of the output: what user, friend and item of s read, side by side.
  constexpr std::int64_t kWidth = 3 + 3 + 2;
  const Feature features[] = {
      // table, dim; bags from, count; indices from, count; output rows from; element, stride
      {0, 3, 0, kSamples, 0, 2, 0, 0, kWidth},
      {0, 3, 2, kSamples, 2, 2, 2, 3, kWidth},
      {1, 2, 4, kSamples, 4, 4, 4, 6, kWidth},
  };
  const Batch<std::int64_t> batch{indices.data(), offsets.data(), 3 * kSamples,
                                  kPositions,     features,       3,
                                  true,           /*mean=*/true,  nullptr};

  const Exponential decay{.half_life = 4.0};
  constexpr float kLr = 0.125f;
  float out[kSamples * kWidth], scale[kPositions];
  const std::vector<float> grad(kSamples * kWidth, 1.0f);  // the loss is the sum of the output
  for (const std::int32_t step : {1, 5}) {
    // Forward: a row is read as it has become by the end of the last step.
    const auto owed = prepare(decay, step - 1, kLr, /*epoch_start=*/0);
    for (const Feature& f : features) {
      const TableView& t = tables[f.table];
      const std::int64_t end = f.first_position + f.positions;
      host::read_scales(owed, step, kLr, {t.prev_iter.data}, indices.data(), f.first_position, end,
                        nullptr, scale);
      const host::Bags<float, std::int64_t> bags{
          t.weight, t.dim, indices.data(), offsets.data(), f.first_bag, f.first_bag + f.bags,
          end,      scale, batch.mean};
      host::lookup_bags(bags, out + f.out_offset, f.out_stride);
    }
    std::printf("step %d: sample 0 reads user %.4f, friend %.4f, item %.4f\n", step, out[0], out[3],
                out[6]);

    // Backward: one sort over both tables; each touched row is updated once.
    host::ScaledEntry entries[kPositions], other[kPositions];  // scaled: by 1 / length of the bag
    std::vector<std::uint32_t> counts(host::kCounts);
    const host::ScaledEntry* sorted = host::sort_lookups(
        host::Lookups<std::int64_t>{batch, features, 3, table_base}, host::row_bits(table_base[2]),
        /*threads=*/1, entries, other, counts.data());
    const auto update =
        RowUpdate<float, float, SGD, Exponential, Nearest>::at(step, kLr, {}, decay);
    const host::GradientRows<float> of_table[] = {{grad.data(), features, 2},
                                                  {grad.data(), features + 2, 1}};
    std::int64_t begin = 0;
    for (int t = 0; t < 2; ++t) {
      std::int64_t end = begin;
      while (end < kPositions && sorted[end].key < table_base[t + 1]) ++end;
      std::vector<float> scratch(static_cast<std::size_t>(host::scratch_floats(tables[t].dim)));
      host::apply_runs(update, tables[t], sorted, begin, end, table_base[t], host::Pass::update,
                       of_table[t], scratch.data());
      begin = end;
    }
  }
  const auto f = [](int gap) { return std::exp2(-gap / 4.0); };
  const double user2 = f(1) - kLr * (1.0 + 0.5), user3 = f(1) - kLr * 0.5;  // after step 1
  const double item1 = f(1) - kLr * 2.0 / 3.0, item4 = f(1) - kLr / 3.0;
  const bool read = near(out[0], f(3) * user2) && near(out[3], f(3) * (user2 + user3) / 2) &&
                    near(out[6], f(3) * (2 * item1 + item4) / 3) && out[kWidth + 3] == 0.0f;
  const bool trained = near(users[2 * 3], f(4) * user2 - kLr * 1.5) && users[1 * 3] == 1.0f &&
                       users_touched[2] == 5 && users_touched[1] == 0;
  std::printf("user 2: %.4f after step 1, %.4f after step 5\n", user2, users[2 * 3]);
  return read && trained ? 0 : 1;
}
