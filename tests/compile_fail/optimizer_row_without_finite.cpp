// expect: needed: row().finite()
#include <coldrow/coldrow.hpp>

struct Sgd {
  static constexpr int scalar_states = 0;
  static constexpr int vector_states = 0;
#ifdef FIXED
  coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
#else
  float row(float*, float, float lr, std::int32_t) const { return lr; }  // has no finite()
  float element(float row, float g, float*) const { return row * g; }
#endif
};

coldrow::Table<float, Sgd> table;
