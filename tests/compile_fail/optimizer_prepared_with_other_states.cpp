// expect: OptimizerPolicy
#include <coldrow/coldrow.hpp>

struct Momentum {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 1;
  struct AtStep {
    float lr;
    static constexpr int scalar_states = 0;
#ifdef FIXED
    static constexpr int vector_states = Momentum::vector_states;
#else
    static constexpr int vector_states = 2;  // the table has memory for one
#endif
    coldrow::RowMultiplier row(float*, float, float, std::int32_t) const { return {lr}; }
    float element(const coldrow::RowMultiplier& row, float g, float* state) const {
      state[vector_states - 1] += g;
      return row.multiplier * state[vector_states - 1];
    }
  };
  AtStep prepare(std::int32_t, double lr) const { return {static_cast<float>(lr)}; }
};

coldrow::Table<float, Momentum> table;
