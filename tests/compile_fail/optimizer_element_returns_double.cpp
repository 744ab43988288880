// expect: OptimizerPolicy
#include <coldrow/coldrow.hpp>

struct Sgd {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
  coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
#ifdef FIXED
  float element(const coldrow::RowMultiplier& row, float g, float*) const {
#else
  double element(const coldrow::RowMultiplier& row, float g, float*) const {
#endif
      return row.multiplier * g;
}
}
;

coldrow::Table<float, Sgd> table;
