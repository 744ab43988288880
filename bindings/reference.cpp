// The float64 reference (coldrow/reference.hpp), for tests.
#include "call.hpp"
#include "module.hpp"

namespace coldrow_module {
namespace {

using namespace nb::literals;

const coldrow::reference::Update& reference_of(const Update& update) {
  if (!update.has_external()) return update.reference;
  const char* const which = update.any.optimizer_number < 0 ? "optimizer" : "decay";
  bad_value(std::string(which) +
            ": compiled at run time, so the float64 reference does not know it");
}

void reference_apply(const Update& update, nb::handle weight, nb::handle grad, nb::handle indices,
                     nb::dict state, std::int64_t step, double lr, std::int64_t epoch_start) {
  const auto take = [](nb::handle h, const char* name, Access access, const char* dtype,
                       std::initializer_list<std::int64_t> shape) {
    Array a = take_array(h, name, access);
    a.require_shape(shape, "see the docstring");
    a.require_dtype(dtype);
    a.require_contiguous();
    return a;
  };
  const Array w = take(weight, "weight", Access::write, "float64", {-1, -1});
  const std::int64_t rows = w.shape[0], dim = w.shape[1];
  const Array i = take(indices, "indices", Access::read, "int64", {-1});
  const Array g = take(grad, "grad", Access::read, "float64", {i.shape[0], dim});
  coldrow::reference::State s{};
  const Array p = take(state["prev_iter"], "prev_iter", Access::write, "int64", {rows});
  s.prev_iter = static_cast<std::int64_t*>(p.data);
  const auto take_all = [&](const std::vector<std::string>& names, bool by_row) {
    for (const std::string& name : names) {
      const char* n = name.c_str();
      const Array a = by_row ? take(state[n], n, Access::write, "float64", {rows})
                             : take(state[n], n, Access::write, "float64", {rows, dim});
      *s.named(n) = static_cast<double*>(a.data);
    }
  };
  const coldrow::reference::Update& reference = reference_of(update);
  take_all(update.scalar_states, true);
  take_all(update.vector_states, false);
  const auto* index = static_cast<const std::int64_t*>(i.data);
  for (std::int64_t k = 0; k < i.shape[0]; ++k) {
    if (index[k] < 0 || index[k] >= rows) bad_index("indices: out of range");
  }
  coldrow::reference::apply(reference, static_cast<double*>(w.data), dim, s,
                            static_cast<const double*>(g.data), index, i.shape[0], step, lr,
                            epoch_start);
}

}  // namespace

void bind_reference(nb::module_& m) {
  m.def("reference_apply", &reference_apply, "update"_a, "weight"_a.none(), "grad"_a.none(),
        "indices"_a.none(), "state"_a, "step"_a, "lr"_a, "epoch_start"_a,
        "The float64 reference of one step: weight float64 [rows, dim], grad float64 [n, dim], "
        "indices int64 [n]; state: a dict of prev_iter int64 [rows] and the optimizer's arrays, "
        "float64 [rows], or [rows, dim] where element-wise.");
  m.def(
      "reference_read_factor",
      [](const Update& u, std::int64_t prev_iter, std::int64_t step, double lr,
         std::int64_t epoch_start) {
        return coldrow::reference::read_factor(reference_of(u), prev_iter, step, lr, epoch_start);
      },
      "update"_a, "prev_iter"_a.none(), "step"_a, "lr"_a, "epoch_start"_a,
      "The float64 reference of what a read-charged forward multiplies a row by.");
}

}  // namespace coldrow_module
