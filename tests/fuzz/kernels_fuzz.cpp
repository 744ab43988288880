// The kernels on any batch: lookup, gradient of the weights, update. Every instruction set and number of
// threads must give the same bits; rows that no index names, and everything where a call is refused, must
// stay as they were; and numbers of moderate size must come out as the float64 reference has them.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "case.hpp"

namespace coldrow_fuzz {
namespace {

#define REQUIRE(condition, ...)                                                      \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not so: %s\n  ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                             \
      std::fprintf(stderr, "\n");                                                    \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

constexpr double kRound = 0x1p-24, kTiny = 1e-43;

struct Result {
  Array out, weight_gradients;
  std::vector<Memory> after;
  UpdateReport report{};
};

Result run(Case& c, const Kernels& k, int threads) {
  Result r;
  std::vector<AnyTable> args;
  for (TableCase& t : c.tables) r.after.push_back(t.memory);
  for (std::size_t t = 0; t < c.tables.size(); ++t) {
    c.tables[t].point_to(r.after[t]);
    args.push_back(c.tables[t].args);
    args.back().update.optimizer_functions = k.optimizer(args.back().update.optimizer_number);
  }
  std::vector<Feature> features = c.features;
  AnyBatch b = c.batch;
  b.tables = args.data();
  b.num_tables = static_cast<std::int32_t>(args.size());
  b.features = features.data();
  b.num_features = static_cast<std::int32_t>(features.size());
  b.threads = threads;
  const BatchProblem problem = k.check_batch(b);
  REQUIRE(problem.kind == BatchProblem::none, "problem %d at %ld", problem.kind,
          static_cast<long>(problem.position));
  const auto with_workspace = [](std::size_t bytes, const auto& f) {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    f(memory);
    std::free(memory);
  };

  const std::vector<Memory> before = r.after;
  r.out = Array(static_cast<std::size_t>(c.out_elements) * bytes_of(c.out_type));
  r.weight_gradients = Array(static_cast<std::size_t>(b.positions) * 4);
  with_workspace(k.lookup_bytes(b, c.read), [&](void* w) {
    k.lookup(b, c.read, r.out.data(), c.out_type, w);
    k.weight_gradients(b, c.read, c.grad.data(), c.grad_type, r.weight_gradients.as<float>(), w);
  });
  with_workspace(k.update_bytes(b), [&](void* w) {
    r.report =
        k.update(b, c.grad.data(), c.grad_type, c.on_nonfinite, c.check_step, c.check_only, w);
  });
  for (std::size_t t = 0; t < c.tables.size(); ++t) c.tables[t].point_to(c.tables[t].memory);
  return r;
}

// ------------------------------------------------------------------------------------------- same bits

// NaNs count as one: which of two a sum keeps is the compiler's choice.
bool same_numbers(const Array& a, const Array& b, NumericType type) {
  const auto n = static_cast<std::int64_t>(a.size() / bytes_of(type));
  if (a.size() != b.size()) return false;
  if (a.size() == 0 || std::memcmp(a.data(), b.data(), a.size()) == 0) return true;
  const std::size_t item = bytes_of(type);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::size_t at = static_cast<std::size_t>(i) * item;
    if (std::memcmp(a.data() + at, b.data() + at, item) == 0) continue;
    if (!std::isnan(get(a, type, i)) || !std::isnan(get(b, type, i))) return false;
  }
  return true;
}

void expect_same(const Case& c, const Result& a, const Result& b, const char* how) {
  REQUIRE(same_numbers(a.out, b.out, c.out_type), "lookup, %s", how);
  REQUIRE(same_numbers(a.weight_gradients, b.weight_gradients, NumericType::float32), "%s", how);
  for (std::size_t t = 0; t < c.tables.size(); ++t) {
    const Memory &x = a.after[t], &y = b.after[t];
    REQUIRE(same_numbers(x.weight, y.weight, c.tables[t].args.dtype), "weights, %s", how);
    REQUIRE(same_numbers(x.by_row, y.by_row, NumericType::float32), "rows' state, %s", how);
    for (std::size_t v = 0; v < x.vectors.size(); ++v) {
      REQUIRE(same_numbers(x.vectors[v], y.vectors[v], NumericType::float32), "state, %s", how);
    }
  }
  REQUIRE(a.report.refused == b.report.refused &&
              a.report.nonfinite.count == b.report.nonfinite.count &&
              a.report.stale.count == b.report.stale.count,
          "report, %s", how);
  REQUIRE(a.report.nonfinite.count == 0 || (a.report.nonfinite.row == b.report.nonfinite.row &&
                                            a.report.nonfinite.table == b.report.nonfinite.table),
          "first of the rows, %s", how);
}

// -------------------------------------------------------------------------------------- what is written

bool same_row(const TableCase& t, const Memory& a, const Memory& b, std::int64_t row) {
  const auto same = [&](const Array& x, const Array& y, std::size_t bytes, std::int64_t at) {
    return std::memcmp(x.data() + static_cast<std::size_t>(at) * bytes,
                       y.data() + static_cast<std::size_t>(at) * bytes, bytes) == 0;
  };
  const auto dim = static_cast<std::size_t>(t.args.dim);
  // (Records are compared where they lie in memory; passed backward, row 0 is the last.)
  const std::int64_t at = t.backward ? t.rows - 1 - row : row;
  bool equal = same(a.weight, b.weight, dim * bytes_of(t.args.dtype), row) &&
               same(a.by_row, b.by_row, static_cast<std::size_t>(t.record) * 4, at);
  for (std::size_t v = 0; v < a.vectors.size(); ++v) {
    equal = equal && same(a.vectors[v], b.vectors[v], dim * 4, row);
  }
  return equal;
}

std::int32_t prev_iter(TableCase& t, Memory& m, std::int64_t row) {
  t.point_to(m);
  return t.args.prev_iter[row * t.args.prev_iter_stride];
}

std::vector<std::set<std::int64_t>> touched_rows(const Case& c) {
  std::vector<std::set<std::int64_t>> rows(c.tables.size());
  for (const Feature& f : c.features) {
    for (std::int64_t p = f.first_position; p < f.first_position + f.positions; ++p) {
      rows[static_cast<std::size_t>(f.table)].insert(c.index(p));
    }
  }
  return rows;
}

void expect_written(Case& c, Result& r) {
  const auto touched = touched_rows(c);
  const auto step = static_cast<std::int32_t>(c.batch.step);
  std::int64_t skipped = 0, stale = 0;
  for (std::size_t t = 0; t < c.tables.size(); ++t) {
    TableCase& table = c.tables[t];
    Memory& after = r.after[t];
    for (std::int64_t row = 0; row < table.rows; ++row) {
      const bool same = same_row(table, table.memory, after, row);
      const std::int32_t was = prev_iter(table, table.memory, row);
      if (touched[t].count(row) == 0) {
        REQUIRE(same, "row %ld of table %zu, which no index names, changed", static_cast<long>(row),
                t);
        continue;
      }
      stale += was >= step;
      if (c.check_only || r.report.refused) {
        REQUIRE(same, "row %ld was written by a call that was refused", static_cast<long>(row));
        continue;
      }
      const bool done = prev_iter(table, after, row) == step;
      if (!done || (was == step && same)) {
        REQUIRE(same, "row %ld was left half done", static_cast<long>(row));
        ++skipped;
      }
      if (c.on_nonfinite == OnNonfinite::propagate) {
        REQUIRE(done, "row %ld was not updated", static_cast<long>(row));
      } else if (done && !same) {
        table.point_to(after);
        for (int s = 0; s < table.scalars; ++s) {
          REQUIRE(std::isfinite(table.args.scalars[s][row * table.args.scalar_strides[s]]),
                  "state of row %ld", static_cast<long>(row));
        }
      }
      // What lies between the arrays of a record is nobody's.
      const std::int64_t at = (table.backward ? table.rows - 1 - row : row) * table.record;
      const std::int64_t first = table.prev_at == 0 ? 1 + table.scalars : table.scalars;
      const std::int64_t last = table.prev_at == 0 ? table.record : table.record - 1;
      for (std::int64_t w = first; w < last; ++w) {
        REQUIRE(after.by_row.as<std::int32_t>()[at + w] == 0, "word %ld of the record",
                static_cast<long>(w));
      }
    }
    table.point_to(table.memory);
  }
  if (c.check_step) {
    REQUIRE(r.report.refused == (stale > 0 || (c.on_nonfinite == OnNonfinite::raise &&
                                               r.report.nonfinite.count > 0)),
            "%ld rows are not before the step", static_cast<long>(stale));
  }
  if (!c.check_only && !r.report.refused && c.on_nonfinite == OnNonfinite::skip) {
    REQUIRE(skipped >= r.report.nonfinite.count, "%ld rows were skipped, reported: %ld",
            static_cast<long>(skipped), static_cast<long>(r.report.nonfinite.count));
    REQUIRE(stale > 0 || skipped == r.report.nonfinite.count,
            "%ld rows were skipped, reported: %ld", static_cast<long>(skipped),
            static_cast<long>(r.report.nonfinite.count));
  }
  if (!c.wild) REQUIRE(stale == 0, "the case is not what it should be");
}

// ------------------------------------------------------------------------------------------- reference

// For each position: the output row's first element, and what the row is multiplied by.
template <class F>
void for_lookups(const Case& c, const F& f) {
  for (const Feature& feature : c.features) {
    const auto one = [&](std::int64_t p, std::int64_t out_row, std::int64_t length) {
      double scale = 1.0;
      if (c.batch.mean) scale = 1.0 / static_cast<double>(length);
      if (c.batch.per_sample_weights != nullptr) {
        scale = static_cast<double>(c.batch.per_sample_weights[p]);
      }
      f(feature, p, feature.out_offset + (out_row - feature.first_row) * feature.out_stride, scale);
    };
    for (std::int64_t b = feature.first_bag; b < feature.first_bag + feature.bags; ++b) {
      for (std::int64_t p = c.offset(b); p < c.offset(b + 1); ++p) {
        one(p, c.batch.pooled ? b : p, c.offset(b + 1) - c.offset(b));
      }
    }
  }
}

double read_factor(Case& c, const Feature& f, std::int64_t row) {
  if (!c.read) return 1.0;
  TableCase& t = c.tables[static_cast<std::size_t>(f.table)];
  return coldrow::reference::read_factor(t.expected, prev_iter(t, t.memory, row), c.batch.step,
                                         t.args.lr, c.batch.epoch_start);
}

void expect_lookup(Case& c, const Result& r) {
  const auto n = static_cast<std::size_t>(c.out_elements);
  std::vector<double> want(n), size(n), terms(n);
  for_lookups(c, [&](const Feature& f, std::int64_t p, std::int64_t at, double scale) {
    const TableCase& t = c.tables[static_cast<std::size_t>(f.table)];
    const double factor = read_factor(c, f, c.index(p));
    double dot = 0.0, most = 0.0;
    for (std::int64_t d = 0; d < f.dim; ++d) {
      const auto i = static_cast<std::size_t>(at + d);
      const double w = get(t.memory.weight, t.args.dtype, c.index(p) * f.dim + d);
      want[i] += scale * factor * w;
      size[i] += std::fabs(scale * w);
      terms[i] += 1.0;
      const double product = w * get(c.grad, c.grad_type, at + d);
      dot += product;
      most += std::fabs(product);
    }
    const double got = static_cast<double>(r.weight_gradients.as<float>()[p]);
    const double error = kRound * (f.dim / 16.0 + 16.0) * most + 1e-38;
    REQUIRE(std::fabs(got - factor * dot) <= error, "gradient of weight %ld: %g, expected %g",
            static_cast<long>(p), got, factor * dot);
  });
  for (std::size_t i = 0; i < n; ++i) {
    double error = kRound * (terms[i] + 8.0) * size[i] + 1e-38;
    error += spacing(c.out_type, std::fabs(want[i]) + error) / 2.0;
    const double got = get(r.out, c.out_type, static_cast<std::int64_t>(i));
    REQUIRE(std::fabs(got - want[i]) <= error, "output %zu: %g, expected %g", i, got, want[i]);
  }
}

// A table in float64, as the reference takes it.
struct Table64 {
  std::vector<double> weight, momentum1, momentum2, touches;
  std::vector<std::int64_t> prev_iter;

  Table64(TableCase& t, Memory& m) {
    t.point_to(m);
    for (std::int64_t i = 0; i < t.rows * t.args.dim; ++i) {
      weight.push_back(get(m.weight, t.args.dtype, i));
    }
    for (std::int64_t r = 0; r < t.rows; ++r) {
      prev_iter.push_back(t.args.prev_iter[r * t.args.prev_iter_stride]);
    }
    for (int s = 0; s < t.scalars; ++s) {
      for (std::int64_t r = 0; r < t.rows; ++r) {
        named(t.state_names[s]).push_back(t.args.scalars[s][r * t.args.scalar_strides[s]]);
      }
    }
    for (int v = 0; v < t.vectors; ++v) {
      const float* from = t.args.vectors[v];
      named(t.state_names[t.scalars + v]).assign(from, from + t.rows * t.args.dim);
    }
    t.point_to(t.memory);
  }
  std::vector<double>& named(const char* name) {
    return std::strcmp(name, "touches") == 0     ? touches
           : std::strcmp(name, "momentum1") == 0 ? momentum1
                                                 : momentum2;
  }
  coldrow::reference::State state() {
    return {prev_iter.data(), momentum1.data(), momentum2.data(), touches.data()};
  }
};

// The roundings of one step are counted as in tests/cpp/optimizers.hpp, where the factor may be any: of
// one below 1 the 5 roundings of numbers up to 1 are 5/factor of its own.
void expect_update(Case& c, Result& r, std::size_t which) {
  TableCase& t = c.tables[which];
  const std::int64_t dim = t.args.dim;
  std::vector<std::int64_t> rows;
  std::vector<double> grad;
  for_lookups(c, [&](const Feature& f, std::int64_t p, std::int64_t at, double scale) {
    if (static_cast<std::size_t>(f.table) != which) return;
    std::size_t i = 0;
    while (i < rows.size() && rows[i] != c.index(p)) ++i;
    if (i == rows.size()) {
      rows.push_back(c.index(p));
      grad.resize(grad.size() + static_cast<std::size_t>(dim));
    }
    for (std::int64_t d = 0; d < dim; ++d) {
      grad[i * static_cast<std::size_t>(dim) + static_cast<std::size_t>(d)] +=
          scale * get(c.grad, c.grad_type, at + d);
    }
  });
  Table64 before(t, t.memory), want = before, size = before, got(t, r.after[which]);
  const auto apply = [&](Table64& to, const std::vector<double>& g) {
    coldrow::reference::apply(t.expected, to.weight.data(), dim, to.state(), g.data(), rows.data(),
                              static_cast<std::int64_t>(rows.size()), c.batch.step, t.args.lr,
                              c.batch.epoch_start);
  };
  apply(want, grad);
  std::vector<double> magnitudes = grad;
  for (double& g : magnitudes) g = std::fabs(g);
  size.weight.assign(size.weight.size(), 0.0);
  for (double& m : size.momentum1) m = std::fabs(m);
  apply(size, magnitudes);

  for (const std::int64_t row : rows) {
    const std::int64_t last = before.prev_iter[static_cast<std::size_t>(row)];
    const double factor =
        t.expected.decay(last != 0 ? c.batch.step - last : 1, last, t.args.lr, c.batch.epoch_start);
    REQUIRE(got.prev_iter[static_cast<std::size_t>(row)] == c.batch.step, "row %ld",
            static_cast<long>(row));
    const bool fades = t.args.update.decay_state && factor < 1.0;
    if (fades && factor < 1e-3) continue;  // its roundings are not small beside it
    const double faded = fades ? 1.0 + 5.0 / factor : 0.0;
    const double of_state = kRound * (10.0 + static_cast<double>(dim) / 16.0 + faded);
    const auto near = [&](const char* name, double a, double b, double error) {
      REQUIRE(std::fabs(a - b) <= error || a == b, "%s of row %ld: %.9g, expected %.9g within %.3g",
              name, static_cast<long>(row), a, b, error);
    };
    for (const char* name : {"momentum1", "momentum2", "touches"}) {
      const auto &a = got.named(name), &b = want.named(name), &s = size.named(name);
      if (a.empty()) continue;
      const std::int64_t each = a.size() == got.prev_iter.size() ? 1 : dim;
      for (auto i = static_cast<std::size_t>(row * each);
           i < static_cast<std::size_t>((row + 1) * each); ++i) {
        near(name, a[i], b[i], of_state * s[i] + kTiny);
      }
    }
    for (auto i = static_cast<std::size_t>(row * dim);
         i < static_cast<std::size_t>((row + 1) * dim); ++i) {
      const double w = want.weight[i];
      double error = (1.5 * of_state + kRound * (10.0 + 1.5 * faded)) * std::fabs(size.weight[i]);
      error += kRound * (std::fabs(w) + 5.0 * std::fabs(before.weight[i])) + kTiny;
      const Format format = format_of(t.args.dtype);
      if (t.args.dtype != NumericType::float32) {
        if (std::fabs(w) + error > std::ldexp(1.9, format.max_exponent))
          continue;  // perhaps infinite
        const double unit = spacing(t.args.dtype, std::fabs(w) + error);
        error +=
            t.args.update.rounding_number == coldrow::BuiltinRoundings::number<coldrow::Stochastic>
                ? unit
                : unit / 2.0;
      }
      near("weight", got.weight[i], w, error);
    }
  }
}

// The factor alone, for any clock and earlier touch: from 0 to 1, and the reference's.
void expect_factor(const Case& c, Bytes& in) {
  for (const TableCase& t : c.tables) {
    const auto step = static_cast<std::int32_t>(std::min<std::int64_t>(c.batch.step, INT32_MAX));
    const auto prev =
        static_cast<std::int32_t>(in.raw<std::uint32_t>() % static_cast<std::uint32_t>(step));
    const bool read = in.flag();
    float base = 0.0f;
    for (auto k = available_kernels(); *k != nullptr; ++k) {
      const float f = (*k)->factor(t.args.update, prev, step, t.args.lr, c.batch.epoch_start, read);
      REQUIRE(f >= 0.0f && f <= 1.0f, "factor %g", static_cast<double>(f));
      REQUIRE(k == available_kernels() || f == base, "another build has another factor");
      base = f;
    }
    const double want =
        read ? coldrow::reference::read_factor(t.expected, prev, step, t.args.lr,
                                               c.batch.epoch_start)
             : t.expected.decay(prev != 0 ? step - prev : 1, prev, t.args.lr, c.batch.epoch_start);
    const double error = std::max({want > 1e-4 ? 2e-6 * want : 1e-9, 5.0 * kRound});
    REQUIRE(std::fabs(static_cast<double>(base) - want) <= error,
            "factor %g, expected %g: decay %d, gated %d, prev_iter %d, step %d, epoch %d, read %d",
            static_cast<double>(base), want, t.decay->number, t.decay->epoch_gated, prev, step,
            c.batch.epoch_start, read);
  }
}

}  // namespace
}  // namespace coldrow_fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace coldrow_fuzz;
  Bytes in(data, size);
  Case c(in);
  const Kernels* const* all = available_kernels();
  std::size_t builds = 0;
  while (all[builds] != nullptr) ++builds;

  Result base = run(c, *all[0], 1);
  expect_same(c, base, run(c, *all[0], c.threads), "other threads");
  expect_same(c, base, run(c, *all[in.raw<std::uint8_t>() % builds], c.threads), "another build");
  expect_written(c, base);
  if (!c.wild) {
    expect_lookup(c, base);
    if (!c.check_only && !base.report.refused) {
      for (std::size_t t = 0; t < c.tables.size(); ++t) expect_update(c, base, t);
    }
    expect_factor(c, in);
  }
  return 0;
}
