// Memory of the drivers: one block given by the caller, cut into pieces.
#pragma once

#include "../platform.hpp"

COLDROW_BEGIN

namespace device {

// Hands out pieces of a block of device memory, each beginning at a multiple of 256 bytes, as the
// block does. With a null base it only counts: what takes the pieces first measures what it needs.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  T* take(std::int64_t count) {
    used_ = (used_ + 255) / 256 * 256;
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<std::size_t>(count) * sizeof(T);
    return piece;
  }
  std::size_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  std::size_t used_ = 0;
};

}  // namespace device

COLDROW_END
