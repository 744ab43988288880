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
  constexpr std::int64_t kSamples = 2;
  constexpr std::int32_t kFeatures = 3;

  std::vector<float> users(4 * 3, 1.0f), items(5 * 2, 1.0f);  // [rows, dim]
  std::vector<std::int32_t> users_touched(4), items_touched(5);
  constexpr double kLr = 0.125;
  const host::UpdateOf<SGD, Exponential> update({}, {.half_life = 4.0});
  const AnyTable tables[] = {
      update.table<float>({users.data(), /*rows=*/4, /*dim=*/3, {users_touched.data()}}, kLr),
      update.table<float>({items.data(), /*rows=*/5, /*dim=*/2, {items_touched.data()}}, kLr)};
  const std::int32_t feature_tables[kFeatures] = {0, 0, 1};
  Feature features
      [kFeatures];  // sample s of the output: what user, friend and item of s read, side by side
  const std::int64_t width =
      host::side_by_side(tables, feature_tables, kFeatures, kSamples, features);

  AnyBatch batch;
  batch.tables = tables;
  batch.num_tables = 2;
  batch.features = features;
  batch.num_features = kFeatures;
  batch.indices = indices.data();
  batch.offsets = offsets.data();
  batch.bags = kFeatures * kSamples;
  batch.positions = static_cast<std::int64_t>(indices.size());
  batch.mean = true;
  if (host::check_batch(batch).kind != BatchProblem::none) return 1;

  using Float = TypeList<float>;  // the types that are compiled
  constexpr NumericType kFloat = NumericType::float32;
  std::vector<float> out(static_cast<std::size_t>(kSamples * width)), grad(out.size(), 1.0f);
  host::Memory memory;
  for (const std::int32_t step : {1, 5}) {
    batch.step = step;
    // Forward: a row is read as it has become by the end of the last step. (The loss is the sum.)
    host::lookup<Float>(batch, /*read=*/true, out.data(), kFloat,
                        memory.reserve(host::lookup_bytes(batch, true)));
    // Backward: each touched row is updated once.
    host::update<Float>(batch, grad.data(), kFloat, {}, memory.reserve(host::update_bytes(batch)));
    std::printf("step %d: sample 0 reads user %.4f, friend %.4f, item %.4f\n", step, out[0], out[3],
                out[6]);
  }

  const auto f = [](int gap) { return std::exp2(-gap / 4.0); };
  const double user2 = f(1) - kLr * (1.0 + 0.5), user3 = f(1) - kLr * 0.5;  // after step 1
  const double item1 = f(1) - kLr * 2.0 / 3.0, item4 = f(1) - kLr / 3.0;
  const bool read = near(out[0], f(3) * user2) && near(out[3], f(3) * (user2 + user3) / 2) &&
                    near(out[6], f(3) * (2 * item1 + item4) / 3) && out[8 + 3] == 0.0f;
  const bool trained = near(users[2 * 3], f(4) * user2 - kLr * 1.5) && users[1 * 3] == 1.0f &&
                       users_touched[2] == 5 && users_touched[1] == 0;
  std::printf("user 2: %.4f after step 1, %.4f after step 5\n", user2, users[2 * 3]);
  return read && trained ? 0 : 1;
}
