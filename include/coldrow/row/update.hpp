// The one formula. For a row touched at step t by a summed gradient g, with D columns:
//
//     I         = t - prev_iter                                  (first touch: 1)
//     shrink    = decay(I, lr)
//     state'    = optimizer(state, g, mean_d(g^2))               (decay_state: of shrink * state)
//     w'        = round(shrink * w - element(g))                 (one fma per element)
//     prev_iter = t
//
// Source: Li & Lyu, "Adaptive Regularization" (ICLR 2026), as generalised by coldrow's policies.
// Everything that trains a row (host drivers, device kernels, your own kernels) calls this.
#pragma once

#include "../policy/decay.hpp"
#include "../policy/optimizer.hpp"
#include "group.hpp"
#include "lanes.hpp"

COLDROW_BEGIN

// Steps are counted in int32: 2^31 - 1 is the last.
inline constexpr std::int32_t kLastStep = INT32_MAX;

// Pointers to one row and its state.
template <Numeric Weight, OptimizerPolicy Optimizer>
struct Row {
  static constexpr int kScalars = max_of(1, Optimizer::scalar_states);
  static constexpr int kVectors = max_of(1, Optimizer::vector_states);

  Weight* weight;            // [D]
  std::int32_t* prev_iter;   // step of the last touch, 0 before the first
  float* scalars[kScalars];  // one float each
  float* vectors[kVectors];  // [D] each
};

// What to do with a row whose gradient is not finite, judged on the new state (so that a finite
// gradient whose square overflows counts), or whose decay is no factor in [0, 1].
enum class OnNonfinite : std::int32_t { skip, propagate };

// Steps since the last touch as of `step`. (It would be below zero only if somebody wrote prev_iter
// by hand; that counts as no gap.)
COLDROW_HD std::int32_t gap_at(std::int32_t step, std::int32_t prev_iter) {
  // (Of no more than 32 bits, for vectors: where prev_iter is before step, the difference fits.)
  const auto gap = static_cast<std::uint32_t>(step) - static_cast<std::uint32_t>(prev_iter);
  const auto capped = static_cast<std::int32_t>(min_of<std::uint32_t>(gap, INT32_MAX));
  return prev_iter < step ? capped : 0;
}

// The factor of a touch at `step`.
template <DecayPolicy Decay>
COLDROW_HD float touch_factor(const Decay& decay, std::int32_t step, std::int32_t prev_iter,
                              float lr) {
  return prev_iter == 0 ? first_touch(decay, lr) : decay(gap_at(step, prev_iter), lr);
}

// The factors of K rows after their gaps as of `step`, and `never` for rows never touched. What a row does
// not need is computed too, so that the loops become vectors.
template <int K, DecayPolicy Decay>
COLDROW_HD void factors_at(const Decay& decay, std::int32_t step,
                           const std::int32_t (&prev_iter)[K], float lr, float never,
                           float (&out)[K]) {
  std::int32_t gap[K];
  float touched[K];
  COLDROW_LANES
  for (int i = 0; i < K; ++i) gap[i] = prev_iter[i] == 0 ? 1 : gap_at(step, prev_iter[i]);
  factors(decay, gap, lr, touched);
  COLDROW_LANES
  for (int i = 0; i < K; ++i) out[i] = prev_iter[i] == 0 ? never : touched[i];
}

// touch_factor() of K rows.
template <int K, DecayPolicy Decay>
COLDROW_HD void touch_factors(const Decay& decay, std::int32_t step,
                              const std::int32_t (&prev_iter)[K], float lr, float (&shrink)[K]) {
  if constexpr (K == 1) {
    shrink[0] = touch_factor(decay, step, prev_iter[0], lr);
  } else {
    factors_at(decay, step, prev_iter, lr, first_touch(decay, lr), shrink);
  }
}

// The factor that a read-charged forward before `step` multiplies a row by. `decay` is prepared as
// of step - 1. Rows never touched read as stored. (step is wide because there is a read after the
// last step too.)
template <DecayPolicy Decay>
COLDROW_HD float read_factor(const Decay& decay, std::int64_t step, std::int32_t prev_iter,
                             float lr) {
  const auto clock = static_cast<std::int32_t>(step - 1);
  return prev_iter == 0 ? 1.0f : decay(gap_at(clock, prev_iter), lr);
}

// read_factor() of K rows.
template <int K, DecayPolicy Decay>
COLDROW_HD void read_factors(const Decay& decay, std::int64_t step,
                             const std::int32_t (&prev_iter)[K], float lr, float (&factor)[K]) {
  factors_at(decay, static_cast<std::int32_t>(step - 1), prev_iter, lr, 1.0f, factor);
}

// The update of one step, as a function of a row. It is a plain value: made by at(), constant from then on,
// without memory of its own. So threads may share one, or copy it, without any lock; what they must not
// share at one time is a row. (A decay's table, CumulativeLinear's, is only read.)
template <Numeric Weight, Numeric Grad, OptimizerPolicy Optimizer, DecayPolicy Decay,
          RoundingPolicy Rounding>
struct RowUpdate {
  using weight_type = Weight;
  using grad_type = Grad;
  using optimizer_type = Optimizer;
  using RowType = Row<Weight, Optimizer>;

  PreparedOptimizer<Optimizer> optimizer;
  Prepared<Decay> decay{};
  Rounding rounding{};
  float lr = 0.0f;
  std::int32_t step = 0;
  bool decay_state = false;
  OnNonfinite on_nonfinite = OnNonfinite::skip;

  // The update of one step. lr is rounded to float32 for the arithmetic; the policies are prepared
  // here.
  static COLDROW_HD RowUpdate at(std::int32_t step, double lr, const Optimizer& optimizer = {},
                                 const Decay& decay = {}, const Rounding& rounding = {},
                                 bool decay_state = false, std::int32_t epoch_start = 0) {
    return {coldrow::prepare(optimizer, step, lr),
            coldrow::prepare(decay, step, lr, epoch_start),
            rounding,
            static_cast<float>(lr),
            step,
            decay_state};
  }

  // Would this row be updated with finite numbers? Writes nothing.
  template <Group G>
  COLDROW_HD bool finite(const G& group, const RowType& row, const Grad* grad, int dim) const {
    return finite(group, planned(group, row, grad, dim), 0, row, grad, dim);
  }

  // Updates the row in place. grad: the row's gradients summed, [dim]. key names the row for
  // stochastic rounding (its step is set here). Returns false where nothing was written because the
  // gradient was not finite.
  template <Group G>
  COLDROW_HD bool operator()(const G& group, const RowType& row, const Grad* grad, int dim,
                             ElementKey key) const {
    return write(group, planned(group, row, grad, dim), 0, row, grad, dim, key);
  }

  // The three stages of an update, for a driver that has many rows in hand: read() each, decide() for
  // all of them at once, write() each.

  using Evaluated = PreparedOptimizer<Optimizer>;
  using RowStep = decltype(std::declval<const Evaluated&>().row(static_cast<float*>(nullptr), 0.0f,
                                                                0.0f, std::int32_t{}));
  // What K rows each need but once, side by side: a compiler makes vectors of a loop over them.
  template <int K>
  struct Plans {
    std::int32_t prev_iter[K];
    float square_sum[K];                  // of the gradient
    float scalars[RowType::kScalars][K];  // as stored; once decided, as they will be
    float shrink[K], shrink_state[K];
    RowStep row[K];
    std::int32_t finite[K];  // 1 or 0, but for the elements
  };

  template <Group G, int K>
  COLDROW_HD void read(const G& group, const RowType& row, const Grad* grad, int dim, Plans<K>& p,
                       int i) const {
    constexpr int N = G::block;
    // The state is read before the group meets in sum(): after that its first member may write it.
    p.prev_iter[i] = *row.prev_iter;
    for (int s = 0; s < Optimizer::scalar_states; ++s) p.scalars[s][i] = *row.scalars[s];
    Lanes<N> squares, g;
    broadcast(squares, 0.0f);
    int c = group.rank() * N;
    for (; c + N <= dim; c += group.size() * N) {
      load(g, grad + c);
      multiply_add(squares, g, g);
    }
    if (c < dim) {
      load_partial(g, grad + c, dim - c);
      multiply_add(squares, g, g);
    }
    p.square_sum[i] = group.sum(sum(squares));
  }

  // Once p.shrink has the touch_factors().
  template <int K>
  COLDROW_HD void decide(int dim, Plans<K>& p) const {
    for (int i = 0; i < K; ++i) p.shrink_state[i] = decay_state ? p.shrink[i] : 1.0f;
    COLDROW_LANES
    for (int i = 0; i < K; ++i) {
      const float mean_square = p.square_sum[i] / static_cast<float>(dim);
      float scalars[RowType::kScalars] = {};
      for (int s = 0; s < Optimizer::scalar_states; ++s)
        scalars[s] = p.shrink_state[i] * p.scalars[s][i];
      p.row[i] = optimizer.row(scalars, mean_square, lr, step);
      // (A factor that is NaN is not in [0, 1] either.)
      bool finite = is_finite(mean_square) & (p.shrink[i] >= 0.0f) & (p.shrink[i] <= 1.0f);
      finite &= p.row[i].finite();
      for (int s = 0; s < Optimizer::scalar_states; ++s) {
        finite &= is_finite(scalars[s]);
        p.scalars[s][i] = scalars[s];
      }
      p.finite[i] = finite;
    }
  }

  // Is row i of `p` to be finite, elements included?
  template <Group G, int K>
  COLDROW_HD bool finite(const G& group, const Plans<K>& p, int i, const RowType& row,
                         const Grad* grad, int dim) const {
    if constexpr (kElementsFinite<Evaluated>) {
      return p.finite[i] != 0;
    } else {
      return p.finite[i] != 0 && finite_elements(group, plan(p, i), row, grad, dim);
    }
  }

  // Writes row i of `p`; returns what operator() does.
  template <Group G, int K>
  COLDROW_HD bool write(const G& group, const Plans<K>& p, int i, const RowType& row,
                        const Grad* grad, int dim, ElementKey key) const {
    constexpr int N = G::block;
    const bool good = finite(group, p, i, row, grad, dim);
    if (!good && on_nonfinite == OnNonfinite::skip) return false;
    const Plan of_row = plan(p, i);
    key.step = step;
    int c = group.rank() * N;
    for (; c + N <= dim; c += group.size() * N) columns<N>(of_row, row, grad, c, N, key);
    if (c < dim) columns<N>(of_row, row, grad, c, dim - c, key);
    if (group.rank() == 0) {
      for (int s = 0; s < Optimizer::scalar_states; ++s) *row.scalars[s] = p.scalars[s][i];
      *row.prev_iter = step;
    }
    return true;
  }

 private:
  template <Group G>
  COLDROW_HD Plans<1> planned(const G& group, const RowType& row, const Grad* grad, int dim) const {
    Plans<1> p;
    read(group, row, grad, dim, p, 0);
    touch_factors(decay, step, p.prev_iter, lr, p.shrink);
    decide(dim, p);
    return p;
  }

  // What the elements of a row need.
  struct Plan {
    float shrink;
    float shrink_state;
    RowStep row;
  };
  template <int K>
  COLDROW_HD Plan plan(const Plans<K>& p, int i) const {
    return {p.shrink[i], p.shrink_state[i], p.row[i]};
  }

  template <int N, class T>
  static COLDROW_INLINE void get(const T* source, int count, float (&out)[N]) {
    Lanes<N> lanes;
    if (count == N) {
      load(lanes, source);
    } else {
      load_partial(lanes, source, count);
    }
    to_array(lanes, out);
  }

  // What the optimizer makes of N columns: amounts to subtract, and the element-wise state.
  template <int N>
  struct Elements {
    float amount[N];
    float vectors[RowType::kVectors][N];
  };

  // Columns [c, c + count) of the row; count is N but at the end of the row.
  template <int N>
  COLDROW_INLINE void elements(const Plan& p, const RowType& row, const Grad* grad, int c,
                               int count, Elements<N>& e) const {
    get(grad + c, count, e.amount);
    for (int s = 0; s < Optimizer::vector_states; ++s) get(row.vectors[s] + c, count, e.vectors[s]);
    COLDROW_LANES
    for (int k = 0; k < N; ++k) {
      float state[RowType::kVectors];
      for (int s = 0; s < Optimizer::vector_states; ++s)
        state[s] = p.shrink_state * e.vectors[s][k];
      e.amount[k] = optimizer.element(p.row, e.amount[k], state);
      for (int s = 0; s < Optimizer::vector_states; ++s) e.vectors[s][k] = state[s];
    }
  }

  template <int N>
  COLDROW_INLINE void columns(const Plan& p, const RowType& row, const Grad* grad, int c, int count,
                              const ElementKey& key) const {
    Elements<N> e;
    elements(p, row, grad, c, count, e);
    float w[N];
    get(row.weight + c, count, w);
    COLDROW_LANES
    for (int k = 0; k < N; ++k) w[k] = math::fma(p.shrink, w[k], -e.amount[k]);
    std::uint32_t random16[N] = {};
    if constexpr (Rounding::needs_random) rounding.template random<N>(key, c, random16);
    const auto put = [&](const float (&x)[N], const auto& how, auto* target) {
      if (count == N) {
        store(x, how, random16, target + c);
      } else {
        store_partial(x, how, random16, target + c, count);
      }
    };
    put(w, rounding, row.weight);
    for (int s = 0; s < Optimizer::vector_states; ++s) put(e.vectors[s], Nearest{}, row.vectors[s]);
  }

  // Whether every element would come out finite, for optimizers that do not promise it.
  template <Group G>
  COLDROW_HD bool finite_elements(const G& group, const Plan& p, const RowType& row,
                                  const Grad* grad, int dim) const {
    constexpr int N = G::block;
    bool finite = true;
    for (int c = group.rank() * N; c < dim; c += group.size() * N) {
      const int count = min_of(N, dim - c);
      Elements<N> e;
      elements(p, row, grad, c, count, e);
      COLDROW_LANES
      for (int k = 0; k < N; ++k) {
        bool good = is_finite(e.amount[k]);
        for (int s = 0; s < Optimizer::vector_states; ++s) {
          good = good && is_finite(e.vectors[s][k]);
        }
        finite = finite && (k >= count || good);
      }
    }
    return group.sum(finite ? 0.0f : 1.0f) == 0.0f;
  }
};

COLDROW_END
