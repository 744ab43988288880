// The compiled form of coldrow.RowUpdate, and errors as Python raises them.
//
// A policy comes from Python as a name and the values of its fields by name. What names and fields there
// are is said by the lists of built-in policies (coldrow/policy/builtin.hpp) and nowhere here. A policy
// compiled at run time comes as the address of its functions and the bytes of its struct.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <coldrow/host/rows.hpp>
#include <coldrow/policy/any_decay.hpp>
#include <coldrow/policy/builtin.hpp>
#include <coldrow/reference.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace coldrow_module {

namespace nb = nanobind;

// ----------------------------------------------------------------------------------------- errors

[[noreturn]] inline void bad_value(const std::string& message) {
  throw nb::value_error(message.c_str());
}
[[noreturn]] inline void bad_index(const std::string& message) {
  throw nb::index_error(message.c_str());
}

template <class T>
T choice(const std::string& name, const std::string& given,
         std::initializer_list<std::pair<const char*, T>> options) {
  std::string accepted;
  for (const auto& [word, value] : options) {
    if (given == word) return value;
    accepted += (accepted.empty() ? "'" : ", '") + std::string(word) + "'";
  }
  bad_value(name + ": got '" + given + "', accepted: " + accepted);
}

// ----------------------------------------------------------------------------------------- policies

// A policy from Python: its name, and the values of its fields.
struct GivenPolicy {
  const char* what;  // "optimizer", ...
  std::string name;
  nb::object fields;
};

// The number of a built-in policy in the list of its kind.
template <class List>
int number_of(const GivenPolicy& given) {
  const int number = coldrow::policy_number<List>(given.name.c_str());
  if (number >= 0) return number;
  std::string accepted;
  List::for_each([&](auto one) {
    accepted += (accepted.empty() ? "'" : ", '") + std::string(decltype(one)::type::name) + "'";
  });
  bad_value(std::string(given.what) + ": got '" + given.name + "', accepted: " + accepted);
}

// Calls set(field's name, value) for each given field, and refuses one that the policy has not. (Whole
// numbers stay such: a float64 does not hold every seed.)
template <class Set>
void for_given_fields(const GivenPolicy& given, const Set& set) {
  for (const auto& [key, value] : nb::cast<nb::dict>(given.fields)) {
    const auto field = nb::cast<std::string>(key);
    const bool known = nb::isinstance<nb::int_>(value)
                           ? set(field.c_str(), nb::cast<std::uint64_t>(value))
                           : set(field.c_str(), nb::cast<double>(value));
    if (!known)
      bad_value(std::string(given.what) + ": '" + given.name + "' has no '" + field + "'");
  }
}

template <class Policy>
Policy policy_of(const GivenPolicy& given) {
  Policy policy{};
  for_given_fields(given, [&](const char* field, auto value) {
    return coldrow::set_field(policy, field, value);
  });
  return policy;
}

// Fields unrounded, for the float64 reference.
inline void take_values(const GivenPolicy& given, coldrow::reference::Fields& fields) {
  for_given_fields(given, [&](const char* field, auto value) {
    return fields.set(field, static_cast<double>(value));
  });
}

// A struct whose type is known at run time only, aligned for any. Copies share it.
using PolicyBytes = std::shared_ptr<std::vector<std::max_align_t>>;

inline PolicyBytes policy_bytes(const void* from, std::size_t size) {
  auto bytes = std::make_shared<std::vector<std::max_align_t>>(size / sizeof(std::max_align_t) + 1);
  std::memcpy(bytes->data(), from, size);
  return bytes;
}
inline PolicyBytes policy_bytes(const nb::object& given) {
  const auto bytes = nb::cast<nb::bytes>(given);
  return policy_bytes(bytes.c_str(), bytes.size());
}

// The factors of a decay that reads them from a table, for one alpha, kept while an update uses them.
template <class Decay>
std::shared_ptr<std::vector<float>> decay_table(double alpha) {
  static std::mutex mutex;
  static std::map<double, std::weak_ptr<std::vector<float>>> tables;
  const std::lock_guard lock(mutex);
  auto& kept = tables[alpha];
  auto table = kept.lock();
  if (!table) {
    table = std::make_shared<std::vector<float>>(Decay::table_size(alpha));
    Decay::fill_table(alpha, table->data());
    kept = table;
  }
  return table;
}

// ----------------------------------------------------------------------------------------- update

// The compiled form of coldrow.RowUpdate.
struct Update {
  AnyUpdate any{};                         // its pointers are into what follows
  std::vector<std::string> scalar_states;  // names of the per-row float32 states, in order
  std::vector<std::string> vector_states;  // names of the element-wise ones
  PolicyBytes optimizer, rounding;
  std::shared_ptr<coldrow::AnyDecay> decay;
  PolicyBytes external_decay;                 // the struct of a decay compiled at run time
  std::shared_ptr<std::vector<float>> table;  // of a decay that reads its factors from one
  double table_alpha = 0.0;
  coldrow::reference::Update reference{};  // the same in float64, of built-in policies

  bool has_external() const {
    return any.optimizer_number < 0 || decay->number == coldrow::AnyDecay::kExternal;
  }

  void take_optimizer(const GivenPolicy& given, std::uintptr_t functions) {
    const auto declare = [&](int scalars, int vectors, const auto& name_of) {
      for (int i = 0; i < scalars + vectors; ++i) {
        (i < scalars ? scalar_states : vector_states).push_back(name_of(i));
      }
    };
    if (functions != 0) {
      const auto& k = *reinterpret_cast<const coldrow::host::OptimizerKernels*>(functions);
      any.optimizer_functions = &k;
      optimizer = policy_bytes(given.fields);
      declare(k.scalar_states, k.vector_states, [&](int i) { return k.state_names[i]; });
    } else {
      any.optimizer_number = number_of<coldrow::BuiltinOptimizers>(given);
      coldrow::with_type_at<coldrow::BuiltinOptimizers>(any.optimizer_number, [&](auto one) {
        using Optimizer = typename decltype(one)::type;
        const auto made = policy_of<Optimizer>(given);
        optimizer = policy_bytes(&made, sizeof made);
        reference.optimizer = made;
        take_values(given, reference.optimizer.fields);
        declare(Optimizer::scalar_states, Optimizer::vector_states,
                [](int i) { return coldrow::state_name<Optimizer>(i); });
      });
    }
    any.optimizer = optimizer->data();
  }

  void take_decay(const GivenPolicy& given, std::uintptr_t functions, bool epoch_gated) {
    decay = std::make_shared<coldrow::AnyDecay>();
    any.decay = decay.get();
    if (functions != 0) {
      external_decay = policy_bytes(given.fields);
      *decay = coldrow::AnyDecay::of(reinterpret_cast<const coldrow::ExternalDecay*>(functions),
                                     external_decay->data(), epoch_gated);
      return;
    }
    const int number = number_of<coldrow::BuiltinDecays>(given);
    coldrow::with_type_at<coldrow::BuiltinDecays>(number, [&](auto one) {
      using Decay = typename decltype(one)::type;
      auto made = policy_of<Decay>(given);
      if constexpr (coldrow::DecayByTable<Decay>) {
        if (Decay::table_size(made.alpha) > 0) {
          table_alpha = made.alpha;
          table = decay_table<Decay>(made.alpha);
          made.table = table->data();
          made.size = static_cast<std::int32_t>(table->size());
        }
      }
      *decay = coldrow::AnyDecay(made, epoch_gated);
      reference.decay = {made, epoch_gated};
      take_values(given, reference.decay.fields);
    });
  }

  void take_rounding(const GivenPolicy& given) {
    any.rounding_number = number_of<coldrow::BuiltinRoundings>(given);
    coldrow::with_type_at<coldrow::BuiltinRoundings>(any.rounding_number, [&](auto one) {
      const auto made = policy_of<typename decltype(one)::type>(given);
      rounding = policy_bytes(&made, sizeof made);
    });
    any.rounding = rounding->data();
  }
};

inline nb::class_<Update> bind_update(nb::module_& m) {
  using namespace nb::literals;
  return nb::class_<Update>(
             m, "Update",
             "The compiled form of coldrow.RowUpdate. Of each policy its name and fields, a dict; "
             "or, "
             "where it was compiled at run time, the bytes of its struct, with the address of its "
             "functions.")
      .def(
          "__init__",
          [](Update* self, const std::string& optimizer, nb::object optimizer_fields,
             std::uintptr_t optimizer_functions, const std::string& decay, nb::object decay_fields,
             std::uintptr_t decay_functions, bool epoch_gated, const std::string& rounding,
             nb::object rounding_fields, bool decay_state) {
            Update made;
            made.take_optimizer({"optimizer", optimizer, optimizer_fields}, optimizer_functions);
            made.take_decay({"decay", decay, decay_fields}, decay_functions, epoch_gated);
            made.take_rounding({"rounding", rounding, rounding_fields});
            made.any.decay_state = made.reference.decay_state = decay_state;
            new (self) Update(std::move(made));
          },
          nb::kw_only(), "optimizer"_a, "optimizer_fields"_a = nb::dict(),
          "optimizer_functions"_a = 0, "decay"_a = "none", "decay_fields"_a = nb::dict(),
          "decay_functions"_a = 0, "epoch_gated"_a = false, "rounding"_a = "nearest",
          "rounding_fields"_a = nb::dict(), "decay_state"_a = false)
      .def_prop_ro(
          "scalar_states", [](const Update& u) { return u.scalar_states; },
          "Names of the optimizer's state arrays of one float32 per row.")
      .def_prop_ro(
          "vector_states", [](const Update& u) { return u.vector_states; },
          "Names of its element-wise state arrays.");
}

}  // namespace coldrow_module
