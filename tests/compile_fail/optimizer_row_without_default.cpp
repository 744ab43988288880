// expect: needed: what row() returns, a struct of plain fields
#include <coldrow/coldrow.hpp>

struct Step {
#ifndef FIXED
  explicit Step(float lr) : multiplier(lr) {}  // and no constructor without arguments
#endif
  float multiplier;
  bool finite() const { return coldrow::is_finite(multiplier); }
};

struct Sgd {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
  Step row(float*, float, float lr, std::int32_t) const { return Step{lr}; }
  float element(const Step& row, float g, float*) const { return row.multiplier * g; }
};

coldrow::Table<float, Sgd> table;
