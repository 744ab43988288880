// Every optimizer of the library, the reference's name for it, and a row of it in memory.
#pragma once

#include <stdexcept>

#include "support.hpp"

namespace coldrow_test {

using AdamByClock = Adam<BiasCorrection::clock>;
using AdamByTouches = Adam<BiasCorrection::row>;
using PartialAdamByClock = PartialRowwiseAdam<BiasCorrection::clock>;
using PartialAdamByTouches = PartialRowwiseAdam<BiasCorrection::row>;

using Optimizers = ::testing::Types<SGD, RowwiseRMSprop, RowwiseAdagrad, Adagrad, AdamByClock,
                                    AdamByTouches, PartialAdamByClock, PartialAdamByTouches>;

// Calls f with one of each, of constants that no other has; eps counts beside gradients below 1.
template <class F>
void for_each_optimizer(const F& f) {
  f(SGD{});
  f(RowwiseRMSprop{0.05f, 0.75f});
  f(RowwiseAdagrad{0.0625f});
  f(Adagrad{0.03125f});
  f(AdamByClock{0.05, 0.8, 0.95});
  f(AdamByTouches{0.04, 0.7, 0.9});
  f(PartialAdamByClock{0.03, 0.85, 0.99});
  f(PartialAdamByTouches{0.02, 0.6, 0.97});
}

// The one of them that is an O.
template <OptimizerPolicy O>
O optimizer_of() {
  O out{};
  for_each_optimizer([&](const auto& one) {
    if constexpr (std::same_as<O, std::remove_cvref_t<decltype(one)>>) out = one;
  });
  return out;
}

template <OptimizerPolicy O>
constexpr bool expects_touches() {
  return std::same_as<O, AdamByTouches> || std::same_as<O, PartialAdamByTouches>;
}

struct OptimizerName {
  template <class O>
  static std::string GetName(int) {
    return O::name;
  }
};

// A table of an optimizer in memory; scalar states lie in records beside prev_iter.
template <Numeric W, OptimizerPolicy O>
struct OptimizedTable {
  static constexpr int kRecord = 1 + O::scalar_states;

  std::int64_t rows;
  int dim;
  std::vector<W> weight;
  std::vector<std::int32_t> records;  // [rows, kRecord]: prev_iter, then float32 bits
  std::vector<std::vector<float>> vectors;

  OptimizedTable(std::int64_t n, int d, Random& random)
      : rows(n),
        dim(d),
        weight(random.numbers<W>(n * d)),
        records(static_cast<std::size_t>(n * kRecord)),
        vectors(static_cast<std::size_t>(O::vector_states),
                std::vector<float>(static_cast<std::size_t>(n * d))) {}

  Table<W, O> view() {
    Table<W, O> t;
    t.weight = weight.data();
    t.rows = rows;
    t.dim = dim;
    t.prev_iter = {records.data(), kRecord};
    for (int s = 0; s < O::scalar_states; ++s) {
      t.scalars[s] = {reinterpret_cast<float*>(records.data()) + 1 + s, kRecord};
    }
    for (int s = 0; s < O::vector_states; ++s) {
      t.vectors[s] = vectors[static_cast<std::size_t>(s)].data();
    }
    return t;
  }
  Row<W, O> row(std::int64_t r = 0) { return view().row(r); }
  bool operator==(const OptimizedTable& other) const {
    bool same = same_bits(weight, other.weight) && same_bits(records, other.records);
    for (std::size_t s = 0; s < vectors.size(); ++s) {
      same = same && same_bits(vectors[s], other.vectors[s]);
    }
    return same;
  }
};

// The same table in float64, as the reference takes it.
struct ReferenceTable {
  std::int64_t dim;
  std::vector<double> weight;
  std::vector<std::int64_t> prev_iter;
  std::vector<double> momentum1, momentum2, touches;  // empty where the optimizer has none

  template <Numeric W, OptimizerPolicy O>
  explicit ReferenceTable(OptimizedTable<W, O>& from) : dim(from.dim) {
    weight = values_of(from.weight);
    const auto table = from.view();
    for (std::int64_t r = 0; r < from.rows; ++r) prev_iter.push_back(table.prev_iter[r]);
    for (int s = 0; s < O::scalar_states; ++s) {
      for (std::int64_t r = 0; r < from.rows; ++r) {
        named(state_name<O>(s)).push_back(value_of(table.scalars[s][r]));
      }
    }
    for (int s = 0; s < O::vector_states; ++s) {
      named(state_name<O>(O::scalar_states + s)) =
          values_of(from.vectors[static_cast<std::size_t>(s)]);
    }
  }
  std::vector<double>& named(const std::string& name) {
    if (name == "momentum1") return momentum1;
    if (name == "momentum2") return momentum2;
    if (name != "touches") throw std::invalid_argument(name);
    return touches;
  }
  reference::State state() {
    return {prev_iter.data(), momentum1.data(), momentum2.data(), touches.data()};
  }
};

// Compares one step that made `after` of `before` with the reference's. grad: rows of `indices`,
// [n, dim], whose sums by row are exact in float32. For a factor of 0 or at least 0.1 a step of one
// row errs by at most these many roundings (2^-24, relatively):
//   factor  5 of |w|, and where it fades the state 51 of that
//   state   4, and those of the mean of squares: a chain of dim/16, the sum of lanes, the division
//   amount  two states, the second under a root; touches in both corrections; 10 of its own
//   weight  1, then half a unit of its type
// Moments and amounts may be differences: errors are relative to sums of absolute values, which are
// the reference's own results for |momentum1|, |g| and no weight.
template <Numeric W, OptimizerPolicy O>
void expect_step(const reference::Update& update, OptimizedTable<W, O> before,
                 OptimizedTable<W, O> after, const std::vector<double>& grad,
                 const std::vector<std::int64_t>& indices, std::int32_t step, double lr,
                 std::int32_t epoch_start, const std::string& where) {
  constexpr double kRound = 0x1p-24, kTiny = 1e-43;
  const std::int64_t dim = before.dim;
  const auto n = static_cast<std::int64_t>(indices.size());
  ReferenceTable want(before), size(before), got(after);
  reference::apply(update, want.weight.data(), dim, want.state(), grad.data(), indices.data(), n,
                   step, lr, epoch_start);

  std::vector<std::int64_t> rows;
  std::vector<double> sums;
  for (std::int64_t r = 0; r < before.rows; ++r) {
    bool touched = false;
    std::vector<double> sum(static_cast<std::size_t>(dim));
    for (std::size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] != r) continue;
      touched = true;
      for (std::size_t d = 0; d < sum.size(); ++d) sum[d] += grad[i * sum.size() + d];
    }
    if (!touched) continue;
    rows.push_back(r);
    for (const double x : sum) sums.push_back(std::fabs(x));
  }
  size.weight.assign(size.weight.size(), 0.0);
  for (double& m : size.momentum1) m = std::fabs(m);
  reference::apply(update, size.weight.data(), dim, size.state(), sums.data(), rows.data(),
                   static_cast<std::int64_t>(rows.size()), step, lr, epoch_start);

  ASSERT_EQ(got.prev_iter, want.prev_iter) << where;
  const double faded = update.decay_state ? 51.0 : 0.0;
  const double of_state = kRound * (10.0 + static_cast<double>(dim) / 16.0 + faded);
  for (const char* name : {"momentum1", "momentum2", "touches"}) {
    const auto &a = got.named(name), &b = want.named(name), &s = size.named(name);
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_NEAR(a[i], b[i], of_state * s[i] + kTiny) << where << ", " << name << " " << i;
    }
  }
  const std::vector<double> start = values_of(before.weight);
  for (std::size_t i = 0; i < start.size(); ++i) {
    if (want.prev_iter[i / static_cast<std::size_t>(dim)] != step) {
      ASSERT_EQ(got.weight[i], start[i]) << where << ", weight " << i << " of a row not touched";
      continue;
    }
    double error = (1.5 * of_state + kRound * (10.0 + 1.5 * faded)) * std::fabs(size.weight[i]);
    error += kRound * (std::fabs(want.weight[i]) + 5.0 * std::fabs(start[i])) + kTiny;
    if (!std::same_as<W, float>) error += spacing<W>(std::fabs(want.weight[i]) + error) / 2.0;
    ASSERT_NEAR(got.weight[i], want.weight[i], error) << where << ", weight " << i;
  }
}

// Gradients whose sums are exact: multiples of 1/64 in [-1, 1].
inline std::vector<double> exact_gradients(std::int64_t n, Random& random) {
  std::vector<double> out;
  for (std::int64_t i = 0; i < n; ++i) {
    out.push_back(static_cast<double>(random.below(129) - 64) / 64.0);
  }
  return out;
}
template <Numeric G>
std::vector<G> numbers_of(const std::vector<double>& x) {
  std::vector<G> out;
  for (const double v : x) out.push_back(number<G>(v));
  return out;
}

}  // namespace coldrow_test
