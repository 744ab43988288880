// The compiled form of coldrow.RowUpdate, and errors as Python raises them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <coldrow/policy/decay.hpp>
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

// ----------------------------------------------------------------------------------------- update

// The products of CumulativeLinear for one alpha, kept while an update uses them.
inline std::shared_ptr<std::vector<float>> cumulative_table(double alpha) {
  static std::mutex mutex;
  static std::map<double, std::weak_ptr<std::vector<float>>> tables;
  const std::lock_guard lock(mutex);
  auto& kept = tables[alpha];
  auto table = kept.lock();
  if (!table) {
    table = std::make_shared<std::vector<float>>(coldrow::CumulativeLinear::table_size(alpha));
    coldrow::CumulativeLinear::fill_table(alpha, table->data());
    kept = table;
  }
  return table;
}

// The fields of a policy compiled at run time, aligned for any of them.
using PolicyBytes = std::shared_ptr<std::vector<std::max_align_t>>;

inline PolicyBytes policy_bytes(const nb::bytes& given) {
  auto bytes =
      std::make_shared<std::vector<std::max_align_t>>(given.size() / sizeof(std::max_align_t) + 1);
  std::memcpy(bytes->data(), given.c_str(), given.size());
  return bytes;
}

// The compiled form of coldrow.RowUpdate.
struct Update {
  UpdateArgs args{};
  std::vector<std::string> scalar_states;  // names of the per-row float32 states, in order
  std::vector<std::string> vector_states;  // names of the element-wise ones
  std::shared_ptr<std::vector<float>> table;
  PolicyBytes optimizer_policy, decay_policy;
};

// What the module's kernels say of the optimizer's state. (Each module has its own.)
StateArgs state_of(const UpdateArgs& update);

// external_*: address of the compiled policy's functions, with the bytes of its fields.
inline Update make_update(const std::string& optimizer, double eps, double beta1, double beta2,
                          std::uintptr_t external_optimizer, const nb::bytes& optimizer_policy,
                          const std::string& decay, bool epoch_gated, double alpha,
                          double min_shrinkage, double weight_decay, double half_life,
                          std::uintptr_t external_decay, const nb::bytes& decay_policy,
                          const std::string& rounding, std::uint64_t seed, bool decay_state) {
  Update u;
  UpdateArgs& args = u.args;
  args.optimizer = choice<OptimizerKind>(
      "optimizer", optimizer,
      {{"sgd", OptimizerKind::sgd},
       {"rowwise_rmsprop", OptimizerKind::rowwise_rmsprop},
       {"rowwise_adagrad", OptimizerKind::rowwise_adagrad},
       {"adagrad", OptimizerKind::adagrad},
       {"adam", OptimizerKind::adam},
       {"adam_by_touches", OptimizerKind::adam_by_touches},
       {"partial_rowwise_adam", OptimizerKind::partial_rowwise_adam},
       {"partial_rowwise_adam_by_touches", OptimizerKind::partial_rowwise_adam_by_touches},
       {"external", OptimizerKind::external}});
  args.eps = eps;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.external_optimizer = reinterpret_cast<const void*>(external_optimizer);
  u.optimizer_policy = policy_bytes(optimizer_policy);
  args.optimizer_policy = u.optimizer_policy->data();
  args.decay = choice<DecayName>("decay", decay,
                                 {{"none", DecayName::none},
                                  {"linear_clipped", DecayName::linear_clipped},
                                  {"cumulative_linear", DecayName::cumulative_linear},
                                  {"exponential", DecayName::exponential},
                                  {"constant", DecayName::constant},
                                  {"epoch_reset", DecayName::epoch_reset},
                                  {"external", DecayName::external}});
  args.epoch_gated = epoch_gated;
  args.alpha = alpha;
  args.min_shrinkage = min_shrinkage;
  args.weight_decay = weight_decay;
  args.half_life = half_life;
  args.external_decay = reinterpret_cast<const void*>(external_decay);
  u.decay_policy = policy_bytes(decay_policy);
  args.decay_policy = u.decay_policy->data();
  args.decay_state = decay_state;
  args.rounding = choice<RoundingKind>(
      "rounding", rounding,
      {{"nearest", RoundingKind::nearest}, {"stochastic", RoundingKind::stochastic}});
  args.seed = seed;
  if (args.decay == DecayName::cumulative_linear &&
      coldrow::CumulativeLinear::table_size(alpha) > 0) {
    u.table = cumulative_table(alpha);
    args.decay_table = u.table->data();
    args.decay_table_size = static_cast<std::int32_t>(u.table->size());
  }
  if ((args.optimizer == OptimizerKind::external) != (external_optimizer != 0) ||
      (args.decay == DecayName::external) != (external_decay != 0)) {
    bad_value("external: accepted: an address where the policy was compiled at run time");
  }
  const StateArgs state = state_of(args);
  for (int i = 0; i < state.scalar_states + state.vector_states; ++i) {
    (i < state.scalar_states ? u.scalar_states : u.vector_states).push_back(state.names[i]);
  }
  return u;
}

inline nb::class_<Update> bind_update(nb::module_& m) {
  using namespace nb::literals;
  return nb::class_<Update>(m, "Update", "The compiled form of coldrow.RowUpdate.")
      .def(
          "__init__",
          [](Update* self, const std::string& optimizer, double eps, double beta1, double beta2,
             std::uintptr_t external_optimizer, const nb::bytes& optimizer_policy,
             const std::string& decay, bool epoch_gated, double alpha, double min_shrinkage,
             double weight_decay, double half_life, std::uintptr_t external_decay,
             const nb::bytes& decay_policy, const std::string& rounding, std::uint64_t seed,
             bool decay_state) {
            new (self) Update(make_update(optimizer, eps, beta1, beta2, external_optimizer,
                                          optimizer_policy, decay, epoch_gated, alpha,
                                          min_shrinkage, weight_decay, half_life, external_decay,
                                          decay_policy, rounding, seed, decay_state));
          },
          nb::kw_only(), "optimizer"_a, "eps"_a = 0.0, "beta1"_a = 0.0, "beta2"_a = 0.0,
          "external_optimizer"_a = 0, "optimizer_policy"_a = nb::bytes("", 0), "decay"_a,
          "epoch_gated"_a = false, "alpha"_a = 0.0, "min_shrinkage"_a = 0.0, "weight_decay"_a = 0.0,
          "half_life"_a = 0.0, "external_decay"_a = 0, "decay_policy"_a = nb::bytes("", 0),
          "rounding"_a, "seed"_a = 0, "decay_state"_a = false)
      .def_prop_ro(
          "scalar_states", [](const Update& u) { return u.scalar_states; },
          "Names of the optimizer's state arrays of one float32 per row.")
      .def_prop_ro(
          "vector_states", [](const Update& u) { return u.vector_states; },
          "Names of its element-wise state arrays.");
}

}  // namespace coldrow_module
