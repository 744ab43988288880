// expect: Group
#include <coldrow/coldrow.hpp>

struct OneThread {
#ifdef FIXED
  static constexpr int block = 8;
#else
  static constexpr int block = 6;
#endif
  int rank() const { return 0; }
  int size() const { return 1; }
  float sum(float x) const { return x; }
};

using Update =
    coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, coldrow::NoDecay, coldrow::Nearest>;

void touch(const Update& update, const coldrow::Row<float, coldrow::RowwiseRMSprop>& row,
           const float* grad, int dim) {
  update(OneThread{}, row, grad, dim, {});
}
