// A batch and the tables it meets, decoded from bytes, in the shape that the kernels take.
#pragma once

#include <cmath>
#include <coldrow/numeric/convert.hpp>
#include <coldrow/policy/any_decay.hpp>
#include <coldrow/policy/builtin.hpp>
#include <coldrow/reference.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../bindings/kernels.hpp"
#include "bytes.hpp"

namespace coldrow_fuzz {

using namespace coldrow_module;

// An array on the heap of exactly its own bytes, so that the sanitizer sees every step past its end.
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t bytes) : bytes_(bytes), data_(new unsigned char[bytes]()) {}
  Array(const Array& other) : Array(other.bytes_) { std::memcpy(data(), other.data(), bytes_); }
  Array(Array&& other) = default;
  Array& operator=(Array other) {
    data_ = std::move(other.data_);
    bytes_ = other.bytes_;
    return *this;
  }
  unsigned char* data() const { return data_.get(); }
  std::size_t size() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  std::size_t bytes_ = 0;
  std::unique_ptr<unsigned char[]> data_;
};

// ------------------------------------------------------------------------------------- 16-bit numbers

struct Format {
  int precision, min_exponent, max_exponent;
};
inline Format format_of(NumericType type) {
  switch (type) {
    case NumericType::float16:
      return {11, -14, 15};
    case NumericType::bfloat16:
      return {8, -126, 127};
    case NumericType::float32:
      break;
  }
  return {24, -126, 127};
}
inline std::size_t bytes_of(NumericType type) {
  return static_cast<std::size_t>(coldrow::size_of(type));
}

// The distance between neighbours of x.
inline double spacing(NumericType type, double x) {
  const Format f = format_of(type);
  const int exponent = x == 0.0 || !std::isfinite(x) ? f.min_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, f.min_exponent) - (f.precision - 1));
}
inline double get(const Array& a, NumericType type, std::int64_t i) {
  switch (type) {
    case NumericType::float16:
      return static_cast<double>(coldrow::Convert<coldrow::half>::widen(a.as<coldrow::half>()[i]));
    case NumericType::bfloat16:
      return static_cast<double>(
          coldrow::Convert<coldrow::bfloat16>::widen(a.as<coldrow::bfloat16>()[i]));
    case NumericType::float32:
      break;
  }
  return static_cast<double>(a.as<float>()[i]);
}
inline void put(Array& a, NumericType type, std::int64_t i, float x) {
  if (type == NumericType::float16) {
    a.as<coldrow::half>()[i] = coldrow::Convert<coldrow::half>::nearest(x);
  } else if (type == NumericType::bfloat16) {
    a.as<coldrow::bfloat16>()[i] = coldrow::Convert<coldrow::bfloat16>::nearest(x);
  } else {
    a.as<float>()[i] = x;
  }
}

// ---------------------------------------------------------------------------------------------- a case

// The arrays of one table: what an update may write.
struct Memory {
  Array weight;
  Array by_row;  // records of int32: prev_iter and the scalar states, and words that are nobody's
  std::vector<Array> vectors;
};

struct TableCase {
  AnyTable args{};                                       // its pointers are set by point_to()
  std::int64_t rows;                                     // that have memory; args.rows may say more
  std::int64_t record, prev_at, scalar_at[kMaxScalars];  // in words of 4 bytes
  bool backward;  // the record array is passed from its end, with negative strides
  int scalars = 0, vectors = 0;
  const char* state_names[kMaxScalars + kMaxVectors] = {};
  coldrow::reference::Update expected;
  std::vector<float> decay_table;
  std::shared_ptr<void> optimizer;
  std::shared_ptr<coldrow::AnyDecay> decay;
  coldrow::Stochastic rounding;  // what is read of it with Nearest: nothing
  Memory memory;

  void point_to(Memory& m) {
    args.update.rounding = &rounding;
    auto* words = m.by_row.as<std::int32_t>();
    const std::int64_t stride = backward ? -record : record;
    if (backward && rows > 0) words += (rows - 1) * record;
    args.weight = m.weight.data();
    args.prev_iter = words + prev_at;
    args.prev_iter_stride = stride;
    for (int s = 0; s < scalars; ++s) {
      args.scalars[s] = reinterpret_cast<float*>(words + scalar_at[s]);
      args.scalar_strides[s] = stride;
    }
    for (int v = 0; v < vectors; ++v) {
      args.vectors[v] = m.vectors[static_cast<std::size_t>(v)].as<float>();
    }
  }
};

struct Case {
  std::vector<TableCase> tables;
  std::vector<Feature> features;
  AnyBatch batch{};
  Array indices, offsets, per_sample_weights, grad;
  NumericType grad_type, out_type;
  std::int64_t out_elements = 0;
  bool wild = false;  // numbers of any bits, so that only invariants can be asked for
  bool read = false;
  OnNonfinite on_nonfinite;
  bool check_step, check_only;
  int threads;

  std::int64_t index(std::int64_t p) const {
    return batch.index_type == IndexType::i32 ? indices.as<std::int32_t>()[p]
                                              : indices.as<std::int64_t>()[p];
  }
  std::int64_t offset(std::int64_t b) const {
    if (batch.offsets == nullptr) return b;
    return batch.index_type == IndexType::i32 ? offsets.as<std::int32_t>()[b]
                                              : offsets.as<std::int64_t>()[b];
  }

  explicit Case(Bytes& in);

 private:
  void add_table(Bytes& in);
  void add_batch(Bytes& in);
  float number(Bytes& in, double scale) {
    if (wild) {
      const auto bits = in.raw<std::uint32_t>();
      float x = 0.0f;
      std::memcpy(&x, &bits, sizeof x);
      return x;
    }
    return static_cast<float>(static_cast<double>(in.raw<std::int8_t>()) * scale);
  }
};

// A policy's struct, and the same in float64; fields are values that float32 holds, so that both are the same.
template <class List>
std::shared_ptr<void> make_policy(int number, const std::map<std::string, double>& values) {
  return coldrow::with_type_at<List>(number, [&](auto one) -> std::shared_ptr<void> {
    auto policy = std::make_shared<typename decltype(one)::type>();
    for (const auto& [field, value] : values) coldrow::set_field(*policy, field.c_str(), value);
    return policy;
  });
}

inline void choose_update(Bytes& in, TableCase& t) {
  AnyUpdate& u = t.args.update;
  coldrow::reference::Update& e = t.expected;
  u.optimizer_number = static_cast<std::int32_t>(in.from(0, coldrow::BuiltinOptimizers::size - 1));
  std::map<std::string, double> fields;
  fields["eps"] = in.one_of({0x1p-27, 0x1p-10, 0.25, 0x1p-60});
  fields["ema_beta"] = fields["beta1"] = in.one_of({0.0, 0.5, 0.75, 0.984375});
  fields["beta2"] = in.one_of({0.5, 0.875, 0.984375, 0.0});
  t.optimizer = make_policy<coldrow::BuiltinOptimizers>(u.optimizer_number, fields);
  u.optimizer = t.optimizer.get();
  coldrow::with_type_at<coldrow::BuiltinOptimizers>(u.optimizer_number, [&](auto one) {
    using Optimizer = typename decltype(one)::type;
    e.optimizer = *static_cast<const Optimizer*>(u.optimizer);
    t.scalars = Optimizer::scalar_states;
    t.vectors = Optimizer::vector_states;
    for (int i = 0; i < t.scalars + t.vectors; ++i) {
      t.state_names[i] = coldrow::state_name<Optimizer>(i);
    }
  });

  const auto decay = static_cast<int>(in.from(0, coldrow::BuiltinDecays::size - 1));
  const bool gated = in.flag();
  const auto number = [&](std::initializer_list<float> of) {
    return static_cast<double>(in.one_of(of));
  };
  fields["alpha"] = number({0.0f, 1e-9f, 1e-7f, 1e-3f, 0.0625f, 1.0f, 15.0f, 1e30f});
  fields["min_shrinkage"] = number({0.0f, 0.125f, 1.0f});
  fields["weight_decay"] = number({0.0f, 1e-8f, 0.25f, 1.0f, 60.0f, 1e30f});
  fields["half_life"] = number({0.0f, 0.5f, 20.0f, 1e9f, 1e-30f});
  const std::shared_ptr<void> made = make_policy<coldrow::BuiltinDecays>(decay, fields);
  coldrow::with_type_at<coldrow::BuiltinDecays>(decay, [&](auto one) {
    using Decay = typename decltype(one)::type;
    auto& policy = *static_cast<Decay*>(made.get());
    e.decay = {policy, gated};
    if constexpr (coldrow::DecayByTable<Decay>) {
      if (const std::int32_t size = Decay::table_size(policy.alpha); size > 0) {
        t.decay_table.resize(static_cast<std::size_t>(size));
        Decay::fill_table(policy.alpha, t.decay_table.data());
        policy.table = t.decay_table.data();
        policy.size = size;
      }
    }
    t.decay = std::make_shared<coldrow::AnyDecay>(policy, gated);
  });
  u.decay = t.decay.get();
  e.decay_state = u.decay_state = in.flag();
  u.rounding_number = in.flag() ? coldrow::BuiltinRoundings::number<coldrow::Stochastic>
                                : coldrow::BuiltinRoundings::number<coldrow::Nearest>;
  t.rounding.seed = in.raw<std::uint32_t>();
  t.args.lr = number({0.0f, 0.02f, 0.3f, 1.0f});
}

// Whether the first element-wise state is an average of gradients, not of their squares.
inline bool has_signed_moment(const TableCase& t) {
  return t.vectors > 0 && std::strcmp(t.state_names[t.scalars], "momentum1") == 0 &&
         t.args.update.optimizer_number != coldrow::BuiltinOptimizers::number<coldrow::Adagrad>;
}

inline void Case::add_table(Bytes& in) {
  TableCase t;
  t.args.name = "t";
  t.args.dtype = static_cast<NumericType>(in.from(0, 2));
  t.rows = in.flag() ? in.from(1, 5) : in.from(1, 40);
  t.args.dim = static_cast<std::int32_t>(in.flag() ? in.from(1, 40) : in.from(1, 200));
  t.args.rows = t.rows;
  // Rows that no index names need no memory: so keys get too large for 32 bits.
  if (in.from(0, 15) == 0) t.args.rows += std::int64_t{1} << 33;
  t.args.key = in.raw<std::uint16_t>();
  t.args.row_offset = in.one_of<std::int64_t>({0, 3, std::int64_t{1} << 40});
  t.args.col_offset = in.one_of<std::int64_t>({0, 5, 64});
  choose_update(in, t);

  t.record = 1 + t.scalars + in.from(0, 2);
  t.prev_at = in.flag() ? t.record - 1 : 0;
  for (int s = 0; s < t.scalars; ++s) t.scalar_at[s] = s + (t.prev_at == 0 ? 1 : 0);
  t.backward = in.flag();

  const auto elements = static_cast<std::size_t>(t.rows * t.args.dim);
  t.memory.weight = Array(elements * bytes_of(t.args.dtype));
  t.memory.by_row = Array(static_cast<std::size_t>(t.rows * t.record) * 4);
  t.memory.vectors.assign(static_cast<std::size_t>(t.vectors), Array(elements * 4));
  t.point_to(t.memory);

  // Numbers repeat: what matters about them is in a few bytes.
  float some[16];
  for (float& x : some) x = number(in, 0x1p-7);
  for (std::size_t i = 0; i < elements; ++i) {
    const auto at = static_cast<std::int64_t>(i);
    put(t.memory.weight, t.args.dtype, at, some[(i * 7 + i / 16) % 16]);
    for (int v = 0; v < t.vectors; ++v) {
      const bool signed_moment = v == 0 && has_signed_moment(t);
      const float x = some[(i * 5 + 3) % 16];
      t.args.vectors[v][i] = wild || signed_moment ? x : std::fabs(x);
    }
  }
  for (std::int64_t r = 0; r < t.rows; ++r) {
    for (int s = 0; s < t.scalars; ++s) {
      const float x = some[(static_cast<std::size_t>(r) + 2) % 16];
      const bool touches = std::strcmp(t.state_names[s], "touches") == 0;
      t.args.scalars[s][r * t.args.scalar_strides[s]] = wild      ? x
                                                        : touches ? std::floor(std::fabs(x) * 20.0f)
                                                                  : std::fabs(x);
    }
    t.args.prev_iter[r * t.args.prev_iter_stride] = 0;
  }
  tables.push_back(std::move(t));
  tables.back().point_to(tables.back().memory);
}

inline void Case::add_batch(Bytes& in) {
  const bool functional = in.flag();  // as coldrow.apply_ calls: every index a bag of its own
  batch.index_type = in.flag() ? IndexType::i32 : IndexType::i64;
  batch.pooled = !functional && in.from(0, 3) != 0;
  batch.mean = batch.pooled && in.flag();
  const bool weighted = batch.pooled && !batch.mean && in.flag();
  const auto count = functional ? 1 : in.from(1, 5);
  std::vector<std::int64_t> index, offset = {0};
  std::vector<float> weight;
  std::int64_t total_dim = 0;
  for (std::int64_t f = 0; f < count; ++f) {
    Feature feature{};
    feature.table =
        functional ? 0 : static_cast<std::int32_t>(in.raw<std::uint8_t>() % tables.size());
    const TableCase& table = tables[static_cast<std::size_t>(feature.table)];
    feature.dim = table.args.dim;
    feature.first_bag = static_cast<std::int64_t>(offset.size()) - 1;
    feature.bags = in.flag() ? in.from(0, 4) : in.from(0, 40);
    feature.first_position = static_cast<std::int64_t>(index.size());
    const bool few = in.flag();
    for (std::int64_t b = 0; b < feature.bags; ++b) {
      // The lengths of which 1/length is exact.
      const std::int64_t length = functional   ? 1
                                  : batch.mean ? in.one_of<std::int64_t>({0, 1, 2, 4, 8, 16})
                                               : in.from(0, 9);
      for (std::int64_t i = 0; i < length; ++i) {
        const std::int64_t rows = few ? std::min<std::int64_t>(3, table.rows) : table.rows;
        index.push_back(in.raw<std::uint8_t>() % rows);
        if (weighted) weight.push_back(number(in, 0x1p-6));
      }
      offset.push_back(static_cast<std::int64_t>(index.size()));
    }
    feature.positions = static_cast<std::int64_t>(index.size()) - feature.first_position;
    total_dim += feature.dim;
    features.push_back(feature);
  }
  batch.bags = static_cast<std::int64_t>(offset.size()) - 1;
  batch.positions = static_cast<std::int64_t>(index.size());
  bool equal = batch.pooled && in.flag();
  for (const Feature& f : features) equal = equal && f.bags == features[0].bags;
  std::int64_t column = 0, flat = 0;
  for (Feature& f : features) {
    f.first_row = batch.pooled ? f.first_bag : f.first_position;
    f.out_offset = equal ? column : flat;  // side by side, or feature after feature
    f.out_stride = equal ? total_dim : f.dim;
    column += f.dim;
    flat += (batch.pooled ? f.bags : f.positions) * f.dim;
  }
  out_elements = flat;

  const auto store = [&](const std::vector<std::int64_t>& from) {
    const std::size_t item = batch.index_type == IndexType::i32 ? 4 : 8;
    Array a(from.size() * item);
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (item == 4) {
        a.as<std::int32_t>()[i] = static_cast<std::int32_t>(from[i]);
      } else {
        a.as<std::int64_t>()[i] = from[i];
      }
    }
    return a;
  };
  indices = store(index);
  offsets = store(functional ? std::vector<std::int64_t>() : offset);
  per_sample_weights = Array(weight.size() * 4);
  for (std::size_t i = 0; i < weight.size(); ++i) per_sample_weights.as<float>()[i] = weight[i];
  batch.indices = indices.data();
  batch.offsets = functional ? nullptr : offsets.data();
  batch.per_sample_weights = weighted ? per_sample_weights.as<float>() : nullptr;
}

inline Case::Case(Bytes& in) {
  wild = in.from(0, 3) == 0;
  read = in.flag();
  on_nonfinite = static_cast<OnNonfinite>(in.from(0, 2));
  check_step = in.flag();
  check_only = in.from(0, 7) == 0;
  threads = static_cast<int>(in.from(1, 6));
  grad_type = static_cast<NumericType>(in.from(0, 2));
  out_type = static_cast<NumericType>(in.from(0, 2));
  // 2^31 is a read after the last step.
  batch.step = in.one_of<std::int64_t>({1, 2, 5, 1000, 16777217, INT32_MAX, INT32_MAX, 0});
  if (batch.step == 0) batch.step = 1 + (in.raw<std::uint32_t>() >> 1) % INT32_MAX;
  const auto step = static_cast<std::int32_t>(batch.step);
  batch.epoch_start = in.one_of({0, 1, step, step > 3 ? step - 3 : 0, INT32_MAX, step / 2});
  const std::int64_t number_of_tables = in.from(1, 3);
  for (std::int64_t t = 0; t < number_of_tables; ++t) add_table(in);
  add_batch(in);
  for (TableCase& t : tables) {
    for (std::int64_t r = 0; r < t.rows; ++r) {
      std::int32_t prev = 0;
      switch (in.from(0, wild ? 6 : 4)) {
        case 1:
          prev = step - 1;
          break;
        case 2:
          prev = step > 4 ? step - 4 : 0;
          break;
        case 3:
          prev = 1;
          break;
        case 4:
          prev = step / 2;
          break;
        case 5:  // not before the step
          prev = step;
          break;
        case 6:
          prev = in.raw<std::int32_t>();
          break;
        default:
          break;
      }
      if (!wild && prev >= step) prev = 0;
      t.args.prev_iter[r * t.args.prev_iter_stride] = prev;
    }
  }
  grad = Array(static_cast<std::size_t>(out_elements) * bytes_of(grad_type));
  float some[8];
  for (float& x : some) x = wild ? number(in, 1.0) : static_cast<float>(in.from(-64, 64)) / 64.0f;
  for (std::int64_t i = 0; i < out_elements; ++i) {
    put(grad, grad_type, i, some[(i * 3 + i / 8) % 8]);
  }
}

}  // namespace coldrow_fuzz
