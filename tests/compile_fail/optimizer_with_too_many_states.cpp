// expect: at most four scalar and four vector states
#include <coldrow/coldrow.hpp>

struct Greedy {
  static constexpr int scalar_states = 0;
#ifdef FIXED
  static constexpr int vector_states = 4;
#else
  static constexpr int vector_states = 5;
#endif
  static constexpr const char* state_name(int i) {
    constexpr const char* names[] = {"a", "b", "c", "d", "e"};
    return names[i];
  }
  coldrow::RowMultiplier row(float*, float, float lr, std::int32_t) const { return {lr}; }
  float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};

constexpr auto kernel = coldrow::host::RowsKernel::of<float, Greedy, coldrow::Nearest>();
