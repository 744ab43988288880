// Compiled, not run: the row update in kernels, by a warp and by one thread, for all weight types
// and roundings, every built-in decay through AnyDecay and two of them as themselves, and every
// optimizer.
#include <coldrow/policy/any_decay.hpp>
#include <coldrow/table/table.hpp>

using coldrow::Adagrad;
using coldrow::Adam;
using coldrow::AnyDecay;
using coldrow::bfloat16;
using coldrow::BiasCorrection;
using coldrow::CumulativeLinear;
using coldrow::EpochGated;
using coldrow::Exponential;
using coldrow::half;
using coldrow::LinearClipped;
using coldrow::Nearest;
using coldrow::PartialRowwiseAdam;
using coldrow::RowUpdate;
using coldrow::RowwiseAdagrad;
using coldrow::RowwiseRMSprop;
using coldrow::Serial;
using coldrow::SGD;
using coldrow::Stochastic;
using coldrow::Strided;
using coldrow::Table;
using coldrow::Warp;

template <class Update>
using TableOf = Table<typename Update::weight_type, typename Update::optimizer_type>;

// One warp per row.
template <class Update>
__global__ void update_by_warp(Update update, TableOf<Update> table,
                               const typename Update::grad_type* grad, int* skipped) {
  const std::int64_t r = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (r >= table.rows) return;
  const Warp warp;
  const bool done = update(warp, table.row(r), grad + r * table.dim, table.dim, table.key(r));
  if (!done && warp.rank() == 0) atomicAdd(skipped, 1);
}

// One thread per row.
template <class Update>
__global__ void update_by_thread(Update update, TableOf<Update> table,
                                 const typename Update::grad_type* grad, int* skipped) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= table.rows) return;
  const Serial thread;
  if (!update.finite(thread, table.row(r), grad + r * table.dim, table.dim)) {
    atomicAdd(skipped, 1);
    return;
  }
  update(thread, table.row(r), grad + r * table.dim, table.dim, table.key(r));
}

// What a read-charged forward multiplies each row by.
template <class Decay>
__global__ void read_factors(Decay decay, std::int32_t step, float lr,
                             Strided<std::int32_t> prev_iter, std::int64_t rows, float* out) {
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < rows) out[r] = read_factor(decay, step, prev_iter[r], lr);
}

#define INSTANTIATE_OPTIMIZER(Optimizer)                                                       \
  template __global__ void                                                                     \
  update_by_warp<RowUpdate<bfloat16, float, Optimizer, AnyDecay, Stochastic>>(                 \
      RowUpdate<bfloat16, float, Optimizer, AnyDecay, Stochastic>, Table<bfloat16, Optimizer>, \
      const float*, int*);

INSTANTIATE_OPTIMIZER(SGD)
INSTANTIATE_OPTIMIZER(RowwiseAdagrad)
INSTANTIATE_OPTIMIZER(Adagrad)
INSTANTIATE_OPTIMIZER(Adam<BiasCorrection::clock>)
INSTANTIATE_OPTIMIZER(Adam<BiasCorrection::row>)
INSTANTIATE_OPTIMIZER(PartialRowwiseAdam<BiasCorrection::clock>)
INSTANTIATE_OPTIMIZER(PartialRowwiseAdam<BiasCorrection::row>)

#define INSTANTIATE(Weight, Grad, Decay, Rounding)                                             \
  template __global__ void                                                                     \
  update_by_warp<RowUpdate<Weight, Grad, RowwiseRMSprop, Decay, Rounding>>(                    \
      RowUpdate<Weight, Grad, RowwiseRMSprop, Decay, Rounding>, Table<Weight, RowwiseRMSprop>, \
      const Grad*, int*);                                                                      \
  template __global__ void                                                                     \
  update_by_thread<RowUpdate<Weight, Grad, RowwiseRMSprop, Decay, Rounding>>(                  \
      RowUpdate<Weight, Grad, RowwiseRMSprop, Decay, Rounding>, Table<Weight, RowwiseRMSprop>, \
      const Grad*, int*);

INSTANTIATE(float, float, AnyDecay, Nearest)
INSTANTIATE(half, float, AnyDecay, Nearest)
INSTANTIATE(half, half, AnyDecay, Stochastic)
INSTANTIATE(bfloat16, float, AnyDecay, Stochastic)
INSTANTIATE(bfloat16, bfloat16, AnyDecay, Nearest)
INSTANTIATE(float, half, LinearClipped, Stochastic)
INSTANTIATE(float, bfloat16, EpochGated<CumulativeLinear>, Nearest)

template __global__ void read_factors<AnyDecay::AtStep>(AnyDecay::AtStep, std::int32_t, float,
                                                        Strided<std::int32_t>, std::int64_t,
                                                        float*);

// prepare() runs on the device too, so that a kernel can read the step and lr from memory (a graph
// that is captured once would freeze them otherwise).
template <class Optimizer, class Decay>
__global__ void update_at_step_in_memory(Optimizer optimizer, Decay decay, const std::int32_t* step,
                                         const double* lr, Table<bfloat16, Optimizer> table,
                                         const float* grad) {
  using Update = RowUpdate<bfloat16, float, Optimizer, Decay, Stochastic>;
  const Update update = Update::at(*step, *lr, optimizer, decay);
  update(Warp{}, table.row(blockIdx.x), grad + static_cast<std::int64_t>(blockIdx.x) * table.dim,
         table.dim, table.key(blockIdx.x));
}
#define INSTANTIATE_IN_MEMORY(Optimizer)                                                      \
  template __global__ void update_at_step_in_memory<Optimizer, Exponential>(                  \
      Optimizer, Exponential, const std::int32_t*, const double*, Table<bfloat16, Optimizer>, \
      const float*);

INSTANTIATE_IN_MEMORY(RowwiseRMSprop)
INSTANTIATE_IN_MEMORY(Adam<BiasCorrection::clock>)
