// Lookup and update of several tables and features in one call, on the processor.
#pragma once

#include "call.hpp"
#include "tables.hpp"

namespace coldrow_module {

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
    const DType out_type = o.numeric();
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
    const DType grad_type = g.numeric();
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
    for (const FeatureArgs& f : call.features) {
      count += (call.batch.pooled ? f.bags : f.positions) * f.dim;
    }
    return count;
  }

  Scratch scratch_;
  std::mutex busy_;
};

}  // namespace coldrow_module
