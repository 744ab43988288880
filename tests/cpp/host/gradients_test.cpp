#include <coldrow/host/gradients.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

using host::GradientRows;
using host::PlainEntry;
using host::ScaledEntry;

float added(float sum, float scale, float x) { return std::fma(scale, x, sum); }

// The sum of one column as table/run.hpp says it, written out. terms: scale and gradient of each entry.
float expected_sum(const std::vector<std::pair<float, float>>& terms) {
  const auto n = terms.size();
  const auto in_order = [&](std::size_t begin, std::size_t end) {
    float sum = 0.0f;
    for (std::size_t i = begin; i < end; ++i) sum = added(sum, terms[i].first, terms[i].second);
    return sum;
  };
  if (n <= 128) return in_order(0, n);
  std::vector<float> sums;  // of the parts
  for (std::size_t i = 0; i < n; i += 64) sums.push_back(in_order(i, std::min(n, i + 64)));
  if (sums.size() > 64) {
    const std::size_t size = (sums.size() + 63) / 64;
    std::vector<float> slices;
    for (std::size_t i = 0; i < sums.size(); i += size) {
      slices.push_back(0.0f);
      for (std::size_t k = i; k < std::min(sums.size(), i + size); ++k) slices.back() += sums[k];
    }
    sums = slices;
  }
  float sum = 0.0f;
  for (const float s : sums) sum += s;
  return sum;
}

// A run of `length` over ten gradient rows that end where memory does.
template <class Entry, class G>
struct Case {
  int dim;
  Feature feature{};
  std::vector<G> values;
  AtPageEnd<G> memory;
  GradientRows<G> grads;
  std::vector<Entry> run;
  std::vector<float> expected;

  Case(int d, int length, Random& random)
      : dim(d),
        values(random.numbers<G>(10 * d)),
        memory(values),
        grads{memory.data(), &feature, 1},
        run(static_cast<std::size_t>(length)) {
    feature.out_stride = dim;
    for (Entry& e : run) {
      e.out_row = static_cast<std::uint32_t>(random.below(10));
      if constexpr (!std::same_as<Entry, PlainEntry>) {
        e.scale = static_cast<float>(random.below(1000)) / 700.0f - 0.5f;
      }
    }
    for (int c = 0; c < dim; ++c) {
      std::vector<std::pair<float, float>> terms;
      for (const Entry& e : run) {
        const auto g =
            values[e.out_row * static_cast<std::size_t>(dim) + static_cast<std::size_t>(c)];
        terms.push_back({e.scale, static_cast<float>(value_of(g))});
      }
      expected.push_back(expected_sum(terms));
    }
  }
  Case(const Case&) = delete;

  void expect(const float* sum, const char* of) const {
    for (int c = 0; c < dim; ++c) {
      ASSERT_EQ(sum[c], expected[static_cast<std::size_t>(c)])
          << of << ", dim " << dim << ", length " << run.size() << ", column " << c;
    }
  }
  void expect_all_ways() const {
    const auto length = static_cast<std::int64_t>(run.size());
    const auto stride = static_cast<std::size_t>((dim + 15) / 16 * 16);
    std::vector<float> scratch(stride);
    expect(host::sum_run(grads, run.data(), length, dim, scratch.data()), "any width");
    host::with_width(dim, [&](auto width) {
      scratch.assign(stride, -1.0f);
      expect(host::sum_run<decltype(width)::value>(grads, run.data(), length, dim, scratch.data()),
             "its width");
    });
    if (length <= kLongRun) return;
    const int count = host::slices_of(length);
    ASSERT_LE(count, kMaxParts);
    std::vector<float> slices(static_cast<std::size_t>(count) * stride);
    for (int s = count - 1; s >= 0; --s) {
      host::sum_slice(grads, run.data(), length, s, dim, slices.data());
    }
    expect(host::sum_slices(count, dim, slices.data()), "slices");
  }
};

template <class Entry, class G>
void expect_sums(int dim, int length) {
  Random random(static_cast<std::uint64_t>(1000 * dim + length));
  Case<Entry, G>(dim, length, random).expect_all_ways();
}

TEST(Gradients, EveryWidth) {
  for (int dim = 1; dim <= 140; ++dim) {
    for (const int length : {1, 3, 130}) {
      expect_sums<ScaledEntry, float>(dim, length);
      expect_sums<PlainEntry, float>(dim, length);
      expect_sums<ScaledEntry, half>(dim, length);
      expect_sums<PlainEntry, bfloat16>(dim, length);
    }
  }
}

// Around the lengths at which a run is cut otherwise.
TEST(Gradients, EveryLength) {
  for (const int dim : {1, 16, 21, 128, 150}) {
    for (const int length :
         {2, 64, 127, 128, 129, 191, 192, 193, 1000, 4095, 4096, 4097, 8192, 8193, 20000}) {
      expect_sums<ScaledEntry, float>(dim, length);
      expect_sums<PlainEntry, half>(dim, length);
    }
  }
}

// An output row belongs to the last feature of the table that begins at or before it.
TEST(Apply, GradientRowsAreFoundByFeature) {
  std::vector<float> data(100);
  std::vector<Feature> features(3);
  features[0].first_row = 2;
  features[0].out_offset = 10;
  features[0].out_stride = 4;
  features[1].first_row = 5;
  features[1].out_offset = 40;
  features[1].out_stride = 2;
  features[2].first_row = 9;
  features[2].out_offset = 60;
  features[2].out_stride = 7;
  const GradientRows<float> rows{data.data(), features.data(), 3};
  EXPECT_EQ(rows.row(2) - data.data(), 10);
  EXPECT_EQ(rows.row(4) - data.data(), 18);
  EXPECT_EQ(rows.row(5) - data.data(), 40);
  EXPECT_EQ(rows.row(10) - data.data(), 67);
}

}  // namespace
}  // namespace coldrow_test
