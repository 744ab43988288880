// What the tests share: 16-bit numbers by their definition (nothing of the library's conversions),
// random inputs, and memory that faults where it is read past its end.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <coldrow/coldrow.hpp>
#include <coldrow/reference.hpp>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace coldrow_test {

using namespace coldrow;

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr float kInff = std::numeric_limits<float>::infinity();
inline constexpr float kNanf = std::numeric_limits<float>::quiet_NaN();

// ------------------------------------------------------------------------------ numbers by definition

template <Numeric T>
struct Format;
template <>
struct Format<float> {
  static constexpr int precision = 24, min_exponent = -126, max_exponent = 127;
  static constexpr const char* name = "float";
};
template <>
struct Format<half> {
  static constexpr int precision = 11, min_exponent = -14, max_exponent = 15;
  static constexpr const char* name = "half";
};
template <>
struct Format<bfloat16> {
  static constexpr int precision = 8, min_exponent = -126, max_exponent = 127;
  static constexpr const char* name = "bfloat16";
};

template <Numeric T>
double value_of(T x) {
  if constexpr (std::same_as<T, float>) {
    return static_cast<double>(x);
  } else {
    using F = Format<T>;
    constexpr int fraction_bits = F::precision - 1;
    constexpr int all_ones = (1 << (15 - fraction_bits)) - 1;
    const int fraction = x.bits & ((1 << fraction_bits) - 1);
    const int exponent = (x.bits >> fraction_bits) & all_ones;
    double magnitude = 0.0;
    if (exponent == all_ones) {
      magnitude = fraction == 0 ? kInf : std::numeric_limits<double>::quiet_NaN();
    } else if (exponent == 0) {
      magnitude = std::ldexp(fraction, F::min_exponent - fraction_bits);
    } else {
      magnitude = std::ldexp(fraction + (1 << fraction_bits),
                             exponent - 1 + F::min_exponent - fraction_bits);
    }
    return (x.bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
}

// x with T's precision and range; `round` (std::nearbyint, std::trunc, ...) picks the neighbour.
template <Numeric T>
double rounded(double x, double (*round)(double) = std::nearbyint) {
  using F = Format<T>;
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x), F::min_exponent) - (F::precision - 1);
  const double y = std::ldexp(round(std::ldexp(x, -unit)), unit);
  return std::fabs(y) < std::ldexp(1.0, F::max_exponent + 1) ? y : std::copysign(kInf, x);
}

inline double away_from_zero(double x) { return x < 0.0 ? std::floor(x) : std::ceil(x); }

// The distance from x to the next number of T.
template <Numeric T>
double spacing(double x) {
  const int exponent = x == 0.0 ? Format<T>::min_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, Format<T>::min_exponent) - (Format<T>::precision - 1));
}

// The T nearest to x (not a NaN).
template <Numeric T>
T number(double x) {
  const double y = rounded<T>(x);
  if constexpr (std::same_as<T, float>) {
    return static_cast<float>(y);
  } else {
    using F = Format<T>;
    constexpr int fraction_bits = F::precision - 1;
    const int sign = std::signbit(y) ? 0x8000 : 0;
    int bits = 0;
    if (!std::isfinite(y)) {
      bits = 0x7fff >> fraction_bits << fraction_bits;
    } else if (std::fabs(y) < std::ldexp(1.0, F::min_exponent)) {
      bits = static_cast<int>(std::ldexp(std::fabs(y), fraction_bits - F::min_exponent));
    } else {
      const int e = std::ilogb(y);
      const int significand = static_cast<int>(std::ldexp(std::fabs(y), fraction_bits - e));
      bits = ((e - F::min_exponent) << fraction_bits) + significand;  // the leading one carries
    }
    return {static_cast<std::uint16_t>(sign | bits)};
  }
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x = 0.0f;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <Numeric T>
std::vector<double> values_of(const std::vector<T>& x) {
  std::vector<double> out;
  for (const T& v : x) out.push_back(value_of(v));
  return out;
}

// --------------------------------------------------------------------------------------------- input

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
  std::uint64_t bits64() { return engine_(); }
  std::int64_t below(std::int64_t n) {
    return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(n));
  }
  double uniform(double lo, double hi) {
    return lo + (hi - lo) * static_cast<double>(engine_() >> 11) * 0x1p-53;
  }
  template <Numeric T>
  std::vector<T> numbers(std::int64_t n, double lo = -1.0, double hi = 1.0) {
    std::vector<T> out;
    for (std::int64_t i = 0; i < n; ++i) out.push_back(number<T>(uniform(lo, hi)));
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

// A copy of `values` whose last byte is followed by memory that may not be touched.
template <class T>
class AtPageEnd {
 public:
  explicit AtPageEnd(const std::vector<T>& values) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t used = values.size() * sizeof(T);
    const std::size_t pages = (used + page - 1) / page * page;
    bytes_ = pages + page;
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    char* const end = static_cast<char*>(base_) + pages;
    mprotect(end, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(end - used);
    if (used > 0) std::memcpy(data_, values.data(), used);
  }
  AtPageEnd(const AtPageEnd&) = delete;
  AtPageEnd& operator=(const AtPageEnd&) = delete;
  ~AtPageEnd() { munmap(base_, bytes_); }
  T* data() const { return data_; }

 private:
  void* base_;
  std::size_t bytes_;
  T* data_;
};

// -------------------------------------------------------------------------------------------- decays

// A built-in decay twice: the library's and its definition.
struct DecayCase {
  std::string name;
  AnyDecay policy;
  reference::Decay expected;
};

inline std::vector<DecayCase> decay_cases() {
  // The table has to outlive the policy that reads it.
  static const std::vector<float> table = [] {
    std::vector<float> out(static_cast<std::size_t>(CumulativeLinear::table_size(1e-3)));
    CumulativeLinear::fill_table(1e-3, out.data());
    return out;
  }();
  const CumulativeLinear by_table{1e-3, table.data(), static_cast<std::int32_t>(table.size())};
  std::vector<DecayCase> out;
  const auto add = [&](const char* name, const auto& decay) {
    out.push_back({name, decay, decay});
    using Decay = std::remove_cvref_t<decltype(decay)>;
    if (std::same_as<Decay, EpochReset>) return;  // a gate already
    out.push_back({name + std::string("_gated"), {decay, true}, {decay, true}});
  };
  add("none", NoDecay{});
  add("linear_clipped", LinearClipped{0.125f, 0.25f});
  add("cumulative_linear_product", CumulativeLinear{1e-3});
  add("cumulative_linear_table", by_table);
  add("exponential_weight_decay", Exponential{0.5});
  add("exponential_half_life", Exponential{0.0, 20.0});
  add("constant", Constant{0.5f});
  add("epoch_reset", EpochReset{});
  // Those without a gate first.
  std::stable_partition(out.begin(), out.end(),
                        [](const DecayCase& c) { return !c.policy.epoch_gated; });
  return out;
}

}  // namespace coldrow_test
