// Values decoded from a fuzzer's bytes. Where the bytes are at an end every value is 0, so that any
// input means something and a shorter one means less.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace coldrow_fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::size_t left() const { return size_; }
  template <class T>
  T raw() {
    T value{};
    const std::size_t n = size_ < sizeof(T) ? size_ : sizeof(T);
    std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }
  bool flag() { return (raw<std::uint8_t>() & 1) != 0; }
  // From low to high, both included; at most 256 values.
  std::int64_t from(std::int64_t low, std::int64_t high) {
    return low + raw<std::uint8_t>() % (high - low + 1);
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[raw<std::uint8_t>() % values.size()];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace coldrow_fuzz
