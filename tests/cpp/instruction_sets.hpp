// One piece of training, compiled once per instruction set (see instruction_sets_run.cpp).
#pragma once

#include <cstdint>

namespace coldrow_test {

enum class WeightType { f32, f16, bf16 };
enum class OptimizerType {
  sgd,
  rowwise_rmsprop,
  rowwise_adagrad,
  adagrad,
  adam,
  adam_by_touches,
  partial_rowwise_adam,
  partial_rowwise_adam_by_touches,
};
inline constexpr int kOptimizerTypes = 8;

struct Training {
  OptimizerType optimizer;
  WeightType weight_type;
  bool stochastic;
  std::int64_t rows;
  int dim;
  void* weight;             // [rows, dim]
  float* scalars[2];        // [rows] each, as many as the optimizer has
  float* vectors[2];        // [rows, dim] each, likewise
  std::int32_t* prev_iter;  // [rows]
  const float* grad;        // [rows, dim]
  float* read;              // [rows, dim]: the rows as a forward sees them in the end
};

namespace x86_64_v2 {
void train(const Training& training);
}
namespace x86_64_v3 {
void train(const Training& training);
}
namespace x86_64_v4 {
void train(const Training& training);
}

}  // namespace coldrow_test
