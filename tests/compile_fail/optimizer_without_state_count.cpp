// expect: needed: a static constexpr int
#include <coldrow/coldrow.hpp>

struct Sgd {
  static constexpr int scalar_states = 0;
#ifdef FIXED
  static constexpr int vector_states = 0;  // said even where there is none
#endif
  coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

coldrow::RowUpdate<float, float, Sgd, coldrow::NoDecay, coldrow::Nearest> update;
