// A small decay in bfloat16: to nearest it is lost, stochastically it is kept on average.
#include <cmath>
#include <coldrow/row/update.hpp>
#include <cstdio>
#include <vector>

using namespace coldrow;

constexpr int kDim = 4096;
constexpr int kSteps = 256;
constexpr float kDecay = 0x1p-11f;  // each touch multiplies by 1 - 2^-11

// The mean weight after kSteps touches without a gradient; a row of ones to begin with.
template <class Weight, class Rounding>
double mean_weight(const Rounding& rounding, std::vector<Weight>& weight) {
  using Update = RowUpdate<Weight, float, SGD, Constant, Rounding>;
  weight.assign(kDim, Convert<Weight>::nearest(1.0f));
  const std::vector<float> grad(kDim, 0.0f);
  std::int32_t prev_iter = 0;
  for (std::int32_t step = 1; step <= kSteps; ++step) {
    const auto update = Update::at(step, /*lr=*/1.0, {}, {.weight_decay = kDecay}, rounding);
    // The key names the row: bits are drawn for (seed, step, table, row, column).
    update(Serial{}, {weight.data(), &prev_iter, {}, {}}, grad.data(), kDim,
           {.table = 1, .row = 7});
  }
  double sum = 0.0;
  for (const Weight w : weight) sum += Convert<Weight>::widen(w);
  return sum / kDim;
}

bool same_bits(const std::vector<bfloat16>& a, const std::vector<bfloat16>& b) {
  for (int d = 0; d < kDim; ++d) {
    if (a[d].bits != b[d].bits) return false;
  }
  return true;
}

int main() {
  std::vector<float> f32;
  std::vector<bfloat16> nearest, drawn, again, other;
  const double exact = mean_weight(Nearest{}, f32);
  const double lost = mean_weight(Nearest{}, nearest);
  const double kept = mean_weight(Stochastic{.seed = 1}, drawn);
  mean_weight(Stochastic{.seed = 1}, again);
  mean_weight(Stochastic{.seed = 2}, other);

  std::printf("float32               %.4f\n", exact);
  std::printf("bfloat16, nearest     %.4f\n", lost);
  std::printf("bfloat16, stochastic  %.4f on average, %.4f %.4f %.4f ... each\n", kept,
              Convert<bfloat16>::widen(drawn[0]), Convert<bfloat16>::widen(drawn[1]),
              Convert<bfloat16>::widen(drawn[2]));
  const bool repeats = same_bits(drawn, again) && !same_bits(drawn, other);
  return lost == 1.0 && std::fabs(kept - exact) < 0.004 && repeats ? 0 : 1;
}
