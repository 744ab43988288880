// Lookup and update of several tables and features in one call, on the processor.
#include "call.hpp"
#include "module.hpp"
#include "tables.hpp"

namespace coldrow_module {
namespace {

using namespace nb::literals;

class TableBatch : public Tables {
 public:
  using Tables::Tables;

  void lookup(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
              const std::vector<double>& lrs, nb::handle indices, nb::handle offsets,
              nb::handle per_sample_weights, nb::handle batch_sizes, const std::string& pooling,
              bool read, std::int64_t step, std::int64_t epoch_start, nb::handle out) {
    Call call = begin(weights, prev_iters, updates, read, indices, offsets, per_sample_weights,
                      batch_sizes, pooling);
    locate(call, lrs, read, step, epoch_start);
    const Array o = take_array(out, "out", Access::write);
    require_elements(o, elements(call));
    const NumericType out_type = o.numeric();
    Scratch scratch;
    void* workspace = scratch.reserve(kernels->lookup_bytes(call.batch, read));
    const Claim claim(memory_of(call), false);
    nb::gil_scoped_release release;
    kernels->lookup(call.batch, read, o.data, out_type, workspace);
  }

  void weight_gradients(nb::sequence weights, nb::sequence prev_iters, nb::sequence updates,
                        const std::vector<double>& lrs, nb::handle indices, nb::handle offsets,
                        nb::handle batch_sizes, const std::string& pooling, bool read,
                        std::int64_t step, std::int64_t epoch_start, nb::handle grad,
                        nb::handle out) {
    Call call = begin(weights, prev_iters, updates, read, indices, offsets, nb::none(), batch_sizes,
                      pooling);
    locate(call, lrs, read, step, epoch_start);
    const Array g = take_array(grad, "grad", Access::read);
    require_elements(g, elements(call));
    const NumericType grad_type = g.numeric();
    const Array o = take_weights_gradient(call, out);
    Scratch scratch;
    void* workspace = scratch.reserve(kernels->lookup_bytes(call.batch, read));
    const Claim claim(memory_of(call), false);
    nb::gil_scoped_release release;
    kernels->weight_gradients(call.batch, read, g.data, grad_type, static_cast<float*>(o.data),
                              workspace);
  }

  std::int64_t update(nb::sequence weights, nb::sequence states, nb::sequence prev_iters,
                      nb::sequence updates, const std::vector<double>& lrs, nb::handle indices,
                      nb::handle offsets, nb::handle per_sample_weights, nb::handle batch_sizes,
                      const std::string& pooling, std::int64_t step, std::int64_t epoch_start,
                      nb::handle grad, const std::string& on_nonfinite, bool check_only,
                      nb::handle clock, nb::handle nonfinite) {
    const std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) {
      throw std::runtime_error("these tables are being updated by another thread");
    }
    Call call = begin(weights, prev_iters, updates, true, indices, offsets, per_sample_weights,
                      batch_sizes, pooling, Access::write);
    locate(call, lrs, true, step, epoch_start);
    take_states(call, states, updates);
    const Array g = take_array(grad, "grad", Access::read);
    require_elements(g, elements(call));
    call.read.push_back(g);
    call.check_overlap(false);
    const Counters counters{Counters::take(clock, "clock"),
                            Counters::take(nonfinite, "nonfinite_rows")};
    const Claim claim(memory_of(call), true);
    counters.require_before(step);
    const std::int64_t skipped = run_update(call, g, on_nonfinite, false, check_only, scratch_);
    if (!check_only) counters.count(step, skipped);
    return skipped;
  }

 private:
  // Step and lr, then the batch's values: where features lie is known after that.
  static void locate(Call& call, const std::vector<double>& lrs, bool with_lrs, std::int64_t step,
                     std::int64_t epoch_start) {
    for (std::size_t t = 0; with_lrs && t < call.tables.size(); ++t) {
      call.tables[t].lr = to_lr(lrs.at(t));
    }
    finish(call, step, epoch_start);
    check_batch(call);
    if (!call.batch.pooled) flatten(call);
  }

  static std::int64_t elements(const Call& call) {
    std::int64_t count = 0;
    for (const Feature& f : call.features) {
      count += (call.batch.pooled ? f.bags : f.positions) * f.dim;
    }
    return count;
  }

  Scratch scratch_;
  std::mutex busy_;
};

}  // namespace

void bind_table_batch(nb::module_& m) {
  nb::class_<TableBatch>(m, "TableBatch", "Tables and features of a table-batched module.")
      .def(nb::init<std::vector<std::string>, std::vector<std::uint64_t>, std::vector<std::int32_t>,
                    std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           "names"_a, "keys"_a, "feature_tables"_a, "row_offsets"_a = std::vector<std::int64_t>(),
           "col_offsets"_a = std::vector<std::int64_t>())
      .def("lookup", &TableBatch::lookup, "weights"_a, "prev_iters"_a, "updates"_a, "lrs"_a,
           "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "out"_a.none())
      .def("weight_gradients", &TableBatch::weight_gradients, "weights"_a, "prev_iters"_a,
           "updates"_a, "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "batch_sizes"_a.none(),
           "pooling"_a, "read"_a, "step"_a, "epoch_start"_a, "grad"_a.none(), "out"_a.none())
      .def("update", &TableBatch::update, "weights"_a, "states"_a, "prev_iters"_a, "updates"_a,
           "lrs"_a, "indices"_a.none(), "offsets"_a.none(), "per_sample_weights"_a.none(),
           "batch_sizes"_a.none(), "pooling"_a, "step"_a, "epoch_start"_a, "grad"_a.none(),
           "on_nonfinite"_a, "check_only"_a = false, "clock"_a.none() = nb::none(),
           "nonfinite"_a.none() = nb::none());
}

}  // namespace coldrow_module
