// One piece of training, compiled once per instruction set (see instruction_sets_run.cpp).
#pragma once

#include <cstdint>

namespace coldrow_test {

enum class WeightType { f32, f16, bf16 };

struct Training {
  WeightType weight_type;
  bool stochastic;
  std::int64_t rows;
  int dim;
  void* weight;             // [rows, dim]
  float* momentum1;         // [rows]
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
