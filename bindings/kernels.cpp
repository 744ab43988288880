// The kernels of the Python module, compiled once per instruction set (COLDROW_ABI names the
// build). No standard library container or algorithm is used here: an inline function shared with
// other builds could end up with this build's instructions.
#include "kernels.hpp"

#include <coldrow/coldrow.hpp>

namespace coldrow_module {
namespace {

using namespace coldrow;

const void* optimizer(int number) {
  return with_type_at<BuiltinOptimizers>(number, [](auto one) -> const void* {
    static constexpr auto functions = host::OptimizerKernels::of<typename decltype(one)::type>();
    return &functions;
  });
}

BatchProblem check_batch(const AnyBatch& b) { return host::check_batch(b); }

std::size_t lookup_bytes(const AnyBatch& b, bool read) { return host::lookup_bytes(b, read); }

void lookup(const AnyBatch& b, bool read, void* out, NumericType out_type, void* workspace) {
  host::lookup(b, read, out, out_type, workspace);
}

void weight_gradients(const AnyBatch& b, bool read, const void* grad, NumericType grad_type,
                      float* out, void* workspace) {
  host::weight_gradients(b, read, grad, grad_type, out, workspace);
}

std::size_t update_bytes(const AnyBatch& b) { return host::update_bytes(b); }

UpdateReport update(const AnyBatch& b, const void* grad, NumericType grad_type,
                    OnNonfinite on_nonfinite, bool check_step, bool check_only, void* workspace) {
  host::UpdateOptions options;
  options.on_nonfinite = on_nonfinite == OnNonfinite::propagate ? coldrow::OnNonfinite::propagate
                                                                : coldrow::OnNonfinite::skip;
  options.refuse_nonfinite = on_nonfinite == OnNonfinite::raise;
  options.refuse_stale = check_step;
  options.check_only = check_only;
  return host::update(b, grad, grad_type, options, workspace);
}

float factor(const AnyUpdate& u, std::int32_t prev_iter, std::int32_t step, double lr,
             std::int32_t epoch_start, bool read) {
  const auto& any = *static_cast<const AnyDecay*>(u.decay);
  const auto decay = prepare(any, read ? step - 1 : step, lr, epoch_start);
  const float lr32 = static_cast<float>(lr);
  return read ? read_factor(decay, step, prev_iter, lr32)
              : touch_factor(decay, step, prev_iter, lr32);
}

}  // namespace

#define COLDROW_STRING_(x) #x
#define COLDROW_STRING(x) COLDROW_STRING_(x)
#define COLDROW_JOIN_(a, b) a##b
#define COLDROW_JOIN(a, b) COLDROW_JOIN_(a, b)

// kernels_<build>
extern const Kernels COLDROW_JOIN(kernels_, COLDROW_ABI);
const Kernels COLDROW_JOIN(kernels_, COLDROW_ABI) = {COLDROW_STRING(COLDROW_ABI),
                                                     optimizer,
                                                     check_batch,
                                                     lookup_bytes,
                                                     lookup,
                                                     weight_gradients,
                                                     update_bytes,
                                                     update,
                                                     factor};

}  // namespace coldrow_module
