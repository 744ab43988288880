// The same bits whatever the instruction set: rows are trained by builds of the headers for
// x86-64-v2, v3 and v4 and compared byte by byte.
#include "instruction_sets.hpp"

#include "support.hpp"

namespace coldrow_test {
namespace {

using Train = void (*)(const Training&);

std::vector<std::pair<std::string, Train>> builds_this_machine_runs() {
  std::vector<std::pair<std::string, Train>> out;
  __builtin_cpu_init();
  // (Not asked by name: F16C, which clang has no name for and every machine with AVX2 has.)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v3) out.emplace_back("x86-64-v3", x86_64_v3::train);
  if (v4) out.emplace_back("x86-64-v4", x86_64_v4::train);
  return out;
}

struct Trained {
  std::vector<char> weight;
  std::vector<float> scalars[2], vectors[2], read;
  std::vector<std::int32_t> prev_iter;
};

template <class W>
Trained trained(Train train, OptimizerType optimizer, WeightType type, bool stochastic, int dim) {
  constexpr std::int64_t kRows = 11;
  Random random(1);
  std::vector<W> weight = random.numbers<W>(kRows * dim);
  const auto grad = random.numbers<float>(kRows * dim);
  Trained out;
  for (auto& state : out.scalars) state.resize(kRows);
  for (auto& state : out.vectors) state.resize(weight.size());
  out.prev_iter.resize(kRows);
  out.read.resize(weight.size());
  train({optimizer,
         type,
         stochastic,
         kRows,
         dim,
         weight.data(),
         {out.scalars[0].data(), out.scalars[1].data()},
         {out.vectors[0].data(), out.vectors[1].data()},
         out.prev_iter.data(),
         grad.data(),
         out.read.data()});
  out.weight.resize(weight.size() * sizeof(W));
  std::memcpy(out.weight.data(), weight.data(), out.weight.size());
  return out;
}

template <class W>
void expect_same_bits(WeightType type) {
  const auto builds = builds_this_machine_runs();
  if (builds.empty()) GTEST_SKIP() << "this machine runs the x86-64-v2 build alone";
  std::vector<std::vector<char>> weights;  // after each optimizer's run
  for (int o = 0; o < kOptimizerTypes; ++o) {
    const auto optimizer = static_cast<OptimizerType>(o);
    for (const bool stochastic : {false, true}) {
      for (const int dim : {1, 3, 16, 30, 64, 77, 128}) {
        const Trained base = trained<W>(x86_64_v2::train, optimizer, type, stochastic, dim);
        for (const float x : base.read) ASSERT_TRUE(std::isfinite(x));
        for (const auto& [name, train] : builds) {
          const std::string where =
              name + ", optimizer " + std::to_string(o) + ", dim " + std::to_string(dim);
          const Trained other = trained<W>(train, optimizer, type, stochastic, dim);
          EXPECT_TRUE(same_bits(base.weight, other.weight)) << where;
          for (int i = 0; i < 2; ++i) {
            EXPECT_TRUE(same_bits(base.scalars[i], other.scalars[i])) << where << ", scalar " << i;
            EXPECT_TRUE(same_bits(base.vectors[i], other.vectors[i])) << where << ", vector " << i;
          }
          EXPECT_TRUE(same_bits(base.prev_iter, other.prev_iter)) << where;
          EXPECT_TRUE(same_bits(base.read, other.read)) << where;
        }
        if (dim == 128 && !stochastic) weights.push_back(base.weight);
      }
    }
  }
  for (std::size_t i = 0; i < weights.size(); ++i) {  // eight optimizers, not one eight times
    for (std::size_t j = 0; j < i; ++j) EXPECT_NE(weights[i], weights[j]);
  }
}

TEST(InstructionSets, Float32) { expect_same_bits<float>(WeightType::f32); }
TEST(InstructionSets, Float16) { expect_same_bits<half>(WeightType::f16); }
TEST(InstructionSets, Bfloat16) { expect_same_bits<bfloat16>(WeightType::bf16); }

}  // namespace
}  // namespace coldrow_test
