// The device drivers on a device, against the host's. nvcc's build runs where there is a GPU and needs
// neither GoogleTest nor Python; compute-sanitizer looks at it too. The same cases run on the stand-in
// (COLDROW_SIMT), which shows that they are right.
//
//   drivers_gpu [--quick] [case ...]     no case: all; exit 77: no device
#if defined(COLDROW_SIMT)
#include "simt_runtime.hpp"

#include <coldrow/device/radix_sort.cuh>
#endif

#include <cstdio>
#include <memory>

#include "tables.hpp"

namespace coldrow_test {
namespace {

#if defined(COLDROW_SIMT)
constexpr int kScale = 1;  // how many times as large batches are
#else
constexpr int kScale = 30;
#endif
bool quick = false;  // small ones there too, under a sanitizer
int scale() { return quick ? 2 : kScale; }

int failures = 0;
#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      std::printf("%s:%d: failed: %s (%s)\n", __FILE__, __LINE__, #condition, where.c_str()); \
      ++failures;                                                                             \
      return;                                                                                 \
    }                                                                                         \
  } while (false)

void need(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#define NEED(call) need((call), #call)

// ------------------------------------------------------------------------------- memory of a device

int shift = 0;  // arrays begin so many elements after an address that suits all accesses

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::int64_t count) : count_(static_cast<std::size_t>(count)) {
    const auto before = std::same_as<T, unsigned char> ? 0 : static_cast<std::size_t>(shift);
    NEED(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes() + before * sizeof(T) + 1));
    data_ = memory_ + before;
  }
  explicit DeviceArray(const std::vector<T>& values)
      : DeviceArray(static_cast<std::int64_t>(values.size())) {
    set(values);
  }
  DeviceArray(DeviceArray&& other) noexcept
      : count_(std::exchange(other.count_, 0)),
        memory_(std::exchange(other.memory_, nullptr)),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(memory_); }

  T* data() const { return data_; }
  std::size_t bytes() const { return count_ * sizeof(T); }
  void set(const std::vector<T>& values) {
    NEED(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<T> get() const {
    std::vector<T> out(count_);
    NEED(cudaMemcpy(out.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  std::size_t count_;
  T* memory_ = nullptr;
  T* data_ = nullptr;
};

template <class T>
std::vector<T> one(T value) {
  return std::vector<T>(1, value);
}

device::Machine this_machine() {
  cudaDeviceProp properties;
  NEED(cudaGetDeviceProperties(&properties, 0));
  return {properties.multiProcessorCount};
}

template <class W, class O>
struct DeviceTable {
  DeviceArray<W> weight;
  DeviceArray<std::int32_t> records;
  std::vector<DeviceArray<float>> vectors;
  Table<W, O> view;

  explicit DeviceTable(TestTable<W, O>& t) : weight(t.weight), records(t.records), view(t.view()) {
    view.weight = weight.data();
    view.prev_iter.data = records.data() + t.kScalars;
    for (int s = 0; s < t.kScalars; ++s) {
      view.scalars[s].data = reinterpret_cast<float*>(records.data()) + s;
    }
    for (int v = 0; v < t.kVectors; ++v) {
      vectors.emplace_back(t.vectors[static_cast<std::size_t>(v)]);
      view.vectors[v] = vectors.back().data();
    }
  }
  void get(TestTable<W, O>& to) const {
    to.weight = weight.get();
    to.records = records.get();
    for (std::size_t v = 0; v < vectors.size(); ++v) to.vectors[v] = vectors[v].get();
  }
};

// A batch as the drivers take it. What its features' positions are is left for the device to find.
template <class Index>
struct BatchOnDevice {
  DeviceArray<Index> indices, offsets;
  DeviceArray<float> weights;
  DeviceArray<Feature> features;
  DeviceArray<std::int32_t> by_table, first_feature, numbers;
  device::Batch batch;
  std::int64_t out_size;

  static std::vector<Feature> unlocated(const TestBatch<Index>& test) {
    std::vector<Feature> out = test.features;
    for (Feature& f : out) {
      if (!test.spec.offsets) continue;
      f.first_position = f.positions = -77;
      if (!test.spec.pooled) f.first_row = f.out_offset = f.out_stride = -77;
    }
    return out;
  }
  explicit BatchOnDevice(const TestBatch<Index>& test)
      : indices(test.indices),
        offsets(test.offsets),
        weights(test.weights),
        features(unlocated(test)),
        by_table(static_cast<std::int64_t>(test.features.size())),
        first_feature(static_cast<std::int64_t>(test.spec.rows.size() + 1)),
        numbers(static_cast<std::int64_t>(test.features.size())),
        out_size(test.out_size) {
    std::vector<std::int32_t> grouped(test.features.size()), first(test.spec.rows.size() + 1);
    device::group_features(test.features.data(), static_cast<std::int32_t>(test.features.size()),
                           static_cast<std::int32_t>(test.spec.rows.size()), grouped.data(),
                           first.data());
    by_table.set(grouped);
    first_feature.set(first);
    std::vector<std::int32_t> all(test.features.size());
    for (std::size_t f = 0; f < all.size(); ++f) all[f] = static_cast<std::int32_t>(f);
    numbers.set(all);
    batch.indices = {indices.data(), sizeof(Index) == 8};
    if (test.spec.offsets) batch.offsets = {offsets.data(), sizeof(Index) == 8};
    batch.bags = test.bags;
    batch.positions = test.positions();
    batch.pooled = test.spec.pooled;
    batch.mean = test.spec.mean;
    batch.per_sample_weights = test.spec.weighted ? weights.data() : nullptr;
  }
};

// ------------------------------------------------------------------------------- tables in training

template <class W, class Optimizer, class Rounding>
class Training {
 public:
  using Update = RowUpdate<W, float, Optimizer, AnyDecay, Rounding>;
  using Tables = std::vector<TestTable<W, Optimizer>>;

  DeviceArray<std::int64_t> clock, epoch_start;
  DeviceArray<double> lr;
  DeviceArray<device::Report> report;

  Training(Tables& tables, const Optimizer& optimizer, const AnyDecay& decay,
           const Rounding& rounding, const StepSpec& step)
      : clock(one<std::int64_t>(step.step - 1)),
        epoch_start(one<std::int64_t>(step.epoch_start)),
        lr(one(step.lr)),
        report(one(device::Report{})),
        count_(static_cast<std::int32_t>(tables.size())),
        infos_(count_),
        base_(count_ + 1),
        views_(count_),
        numbers_(count_),
        recipes_(count_),
        reads_(count_),
        updates_(count_),
        read_steps_(count_) {
    std::vector<device::TableInfo> infos;
    std::vector<std::int64_t> base{0};
    std::vector<Table<W, Optimizer>> views;
    std::vector<std::int32_t> numbers;
    for (auto& t : tables) {
      tables_.push_back(std::make_unique<DeviceTable<W, Optimizer>>(t));
      const auto& view = tables_.back()->view;
      infos.push_back({view.weight, t.rows, t.dim, {view.prev_iter.data, view.prev_iter.stride}});
      base.push_back(base.back() + t.rows);
      views.push_back(view);
      numbers.push_back(static_cast<std::int32_t>(numbers.size()));
      extent_.widest = max_of(extent_.widest, t.dim);
    }
    const device::Recipe<Update> recipe{optimizer,         decay,      rounding, step.decay_state,
                                        step.on_nonfinite, {lr.data()}};
    infos_.set(infos);
    base_.set(base);
    views_.set(views);
    numbers_.set(numbers);
    recipes_.set(std::vector<device::Recipe<Update>>(tables.size(), recipe));
    reads_.set(std::vector<device::ReadRecipe<AnyDecay>>(tables.size(), {decay, {lr.data()}}));
    // (Kernels copy these whole, gaps between fields included: initcheck would complain.)
    NEED(cudaMemset(updates_.data(), 0, updates_.bytes()));
    NEED(cudaMemset(read_steps_.data(), 0, read_steps_.bytes()));
    extent_.total_rows = base.back();
    extent_.num_tables = count_;
    extent_.machine = this_machine();
  }

  // Memory for a backward of such batches; taken before anything is captured.
  template <class Index>
  DeviceArray<unsigned char> workspace(const BatchOnDevice<Index>& b) {
    return DeviceArray<unsigned char>(static_cast<std::int64_t>(spaces(b, nullptr).bytes));
  }

  // Puts a backward and update on the stream.
  template <class Index, class G>
  void backward(cudaStream_t stream, const BatchOnDevice<Index>& b, const DeviceArray<G>& grad,
                const DeviceArray<unsigned char>& memory, int check = 0) {
    const Spaces s = spaces(b, memory.data());
    device::Queue queue(stream);
    const device::Layout layout = layout_of(b);
    const device::Gradient gradient{grad.data(), kNumericType<G>};
    device::Report* const r = report.data();
    device::begin_batch(queue, r, true);
    device::check_batch(queue, b.batch, layout, r, s.extent.machine);
    device::prepare_updates(queue, {{clock.data()}, {epoch_start.data()}}, recipes_.data(),
                            numbers_.data(), count_, updates_.data(), r);
    const auto sorted = device::segment(queue, b.batch, layout, s.extent, s.segments, r);
    device::sum_long_runs(queue, layout, s.extent, gradient, sorted, s.segments.runs, s.apply, r);
    const device::TableGroup<Update> group{views_.data(), numbers_.data(), updates_.data(), count_};
    if (check != 0) {
      device::apply(queue, group, layout, s.extent, gradient, sorted, s.segments.runs, s.apply,
                    static_cast<device::Pass>(check), r);
    }
    device::apply(queue, group, layout, s.extent, gradient, sorted, s.segments.runs, s.apply,
                  device::Pass::update, r);
    device::finish_batch(queue, b.batch, layout, r, clock.data());
    NEED(queue.error);
  }

  // Puts a forward on the stream, charged when read or not; and the gradient of the weights.
  template <class Index, class Out>
  void forward(cudaStream_t stream, const BatchOnDevice<Index>& b, bool read,
               const DeviceArray<Out>& out, const DeviceArray<std::int32_t>& first_block,
               const DeviceArray<float>* grad, const DeviceArray<float>* weight_gradient) {
    device::Queue queue(stream);
    const device::Layout layout = layout_of(b);
    const device::FeatureGroup group{b.numbers.data(), layout.num_features};
    const device::Machine machine = this_machine();
    device::Report* const r = report.data();
    device::begin_batch(queue, r, true);
    device::check_batch(queue, b.batch, layout, r, machine);
    device::prepare_reads(queue, {{clock.data()}, {epoch_start.data()}}, reads_.data(), count_,
                          read_steps_.data(), r);
    const auto put = [&]<class Read>(const Read* reads) {
      device::lookup<W>(queue, group, b.batch, layout, reads, r, out.data(), kNumericType<Out>,
                        b.out_size, first_block.data(), machine);
      if (grad == nullptr) return;
      device::weight_gradients<W>(queue, group, b.batch, layout, reads, r, grad->data(),
                                  NumericType::float32, weight_gradient->data(), first_block.data(),
                                  machine);
    };
    if (read) {
      put(static_cast<const device::ReadStep<AnyDecay>*>(read_steps_.data()));
    } else {
      put(static_cast<const device::ReadStored*>(nullptr));
    }
    device::finish_batch(queue, b.batch, layout, r, nullptr);
    NEED(queue.error);
  }

  // The tables as they are by now.
  Tables get(const Tables& like) const {
    NEED(cudaDeviceSynchronize());
    Tables out = like;
    for (std::size_t t = 0; t < out.size(); ++t) tables_[t]->get(out[t]);
    return out;
  }
  device::Report found() const {
    NEED(cudaDeviceSynchronize());
    return report.get()[0];
  }

 private:
  struct Spaces {
    device::Extent extent;
    device::SegmentSpace segments;
    device::ApplySpace apply;
    std::size_t bytes;
  };
  template <class Index>
  Spaces spaces(const BatchOnDevice<Index>& b, unsigned char* memory) const {
    Spaces s;
    s.extent = extent_;
    s.extent.positions = b.batch.positions;
    s.extent.scaled = b.batch.mean || b.batch.per_sample_weights != nullptr;
    std::size_t sort_bytes = 0;
    NEED(device::radix_sort_bytes(s.extent, sort_bytes));
    device::Workspace w(memory);
    s.segments = device::take_segment_space(w, s.extent, sort_bytes);
    s.apply = device::take_apply_space(w, s.extent,
                                       device::choose_apply<Update>(s.extent).workspace_floats);
    s.bytes = w.bytes();
    return s;
  }
  template <class Index>
  device::Layout layout_of(const BatchOnDevice<Index>& b) const {
    return {infos_.data(),
            base_.data(),
            count_,
            b.features.data(),
            static_cast<std::int32_t>(b.features.bytes() / sizeof(Feature)),
            b.by_table.data(),
            b.first_feature.data()};
  }

  std::int32_t count_;
  std::vector<std::unique_ptr<DeviceTable<W, Optimizer>>> tables_;
  DeviceArray<device::TableInfo> infos_;
  DeviceArray<std::int64_t> base_;
  DeviceArray<Table<W, Optimizer>> views_;
  DeviceArray<std::int32_t> numbers_;
  DeviceArray<device::Recipe<Update>> recipes_;
  DeviceArray<device::ReadRecipe<AnyDecay>> reads_;
  DeviceArray<Update> updates_;
  DeviceArray<device::ReadStep<AnyDecay>> read_steps_;
  device::Extent extent_;
};

// ------------------------------------------------------------------------------------------- input

AnyDecay linear() { return LinearClipped{0.125f, 0.25f}; }
const RowwiseRMSprop kRmsprop{1e-6f, 0.75f};

// Two tables of two features each, widths of all kinds, bags of all lengths; a table of three rows,
// whose runs are long.
BatchSpec mixed(int times) {
  BatchSpec spec = shared_tables();
  spec.rows[2] *= times;
  for (auto& bags : spec.bags) bags *= times;
  return spec;
}
// More tables and features than a warp has lanes, of all widths; some bags, some none.
BatchSpec many_tables() {
  BatchSpec spec;
  for (int t = 0; t < 75; ++t) {
    spec.rows.push_back(3 + t % 5);
    spec.dims.push_back(1 + (t * 37) % 70);
    spec.feature_tables.push_back((t * 7) % 75);
    spec.bags.push_back(t % 4);
  }
  return spec;
}
// Output rows and gradients lie at multiples of 16 bytes, if rows have such a size, or do not.
BatchSpec of_width(int dim, int times, bool spread = true) {
  BatchSpec spec;
  spec.gap = spread ? 8 : 3;
  spec.rows = {40 * std::int64_t{times}};
  spec.dims = {dim};
  spec.feature_tables = {0};
  spec.bags = {30 * std::int64_t{times}};
  return spec;
}
std::string name_of(const BatchSpec& spec, std::uint64_t seed) {
  return "dim " + std::to_string(spec.dims[0]) + ", " + std::to_string(spec.rows.size()) +
         " tables, pooled " + std::to_string(spec.pooled) + ", mean " + std::to_string(spec.mean) +
         ", weighted " + std::to_string(spec.weighted) + ", seed " + std::to_string(seed);
}
StepSpec a_step() {
  StepSpec step;
  step.step = 12;
  step.lr = 0.125;
  step.epoch_start = 8;
  return step;
}
template <class W, class O>
std::vector<TestTable<W, O>> touched_tables(const BatchSpec& spec, Random& random) {
  auto tables = test_tables<W, O>(spec, random);
  for (auto& t : tables) t.touch(10, random);
  return tables;
}
template <class Index>
TestBatch<Index> exact_batch(const BatchSpec& spec, Random& random) {
  TestBatch<Index> batch(spec, random);
  if (!spec.pooled) flatten_unpooled(batch);
  for (float& w : batch.weights) w = static_cast<float>(random.below(9) - 4) / 4.0f;
  return batch;
}
template <class W, class O>
bool same(const std::vector<TestTable<W, O>>& a, const std::vector<TestTable<W, O>>& b) {
  for (std::size_t t = 0; t < a.size(); ++t) {
    if (!(a[t] == b[t])) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------- cases

template <class W, class O>
bool near(const std::vector<TestTable<W, O>>& a, const std::vector<TestTable<W, O>>& b,
          double tolerance) {
  const auto close = [&](double x, double y) {
    return std::fabs(x - y) <= tolerance * max_of(1.0, std::fabs(y));
  };
  for (std::size_t t = 0; t < a.size(); ++t) {
    constexpr int kRecord = TestTable<W, O>::kRecord;
    for (std::size_t i = 0; i < a[t].weight.size(); ++i) {
      if (!close(value_of(a[t].weight[i]), value_of(b[t].weight[i]))) return false;
    }
    for (std::size_t i = 0; i < a[t].records.size(); ++i) {
      const auto x = a[t].records[i], y = b[t].records[i];
      if (i % kRecord == kRecord - 1 ? x != y
                                     : !close(float_of(static_cast<std::uint32_t>(x)),
                                              float_of(static_cast<std::uint32_t>(y)))) {
        return false;
      }
    }
    for (std::size_t v = 0; v < a[t].vectors.size(); ++v) {
      for (std::size_t i = 0; i < a[t].vectors[v].size(); ++i) {
        if (!close(a[t].vectors[v][i], b[t].vectors[v][i])) return false;
      }
    }
  }
  return true;
}

// Where sums are exact the device gives the host's bits; where the policy uses transcendental
// functions, which a device has of its own, it comes near.
template <class W, class G, class Rounding, class O>
void update_equals_host(const BatchSpec& spec, const O& optimizer, const Rounding& rounding,
                        std::uint64_t seed) {
  const std::string where = name_of(spec, seed);
  Random random(seed);
  auto tables = touched_tables<W, O>(spec, random);
  const auto batch = exact_batch<std::int32_t>(spec, random);
  const auto grad = exact_gradients<G>(batch.out_size, random);
  StepSpec step = a_step();
  step.decay_state = seed % 2 == 0;
  using Update = typename Training<W, O, Rounding>::Update;
  auto expected = tables;
  host_update(batch, expected, grad.data(),
              Update::at(step.step, step.lr, optimizer, linear(), rounding, step.decay_state,
                         step.epoch_start));
  Training<W, O, Rounding> training(tables, optimizer, linear(), rounding, step);
  const BatchOnDevice<std::int32_t> on_device(batch);
  const DeviceArray<G> gradient(grad);
  const auto memory = training.workspace(on_device);
  training.backward(nullptr, on_device, gradient, memory);
  if constexpr (std::same_as<O, Adam<BiasCorrection::row>>) {
    CHECK(near(training.get(tables), expected, 1e-5));
  } else {
    CHECK(same(training.get(tables), expected));
  }
  CHECK(training.clock.get()[0] == step.step);
  CHECK(training.found().kind == device::Refusal::none);
}

// (Under a sanitizer some widths do.)
std::vector<int> widths() {
  if (quick) return {3, 50, 128, 257};
  return {1, 3, 8, 16, 17, 32, 50, 64, 100, 128, 130, 256, 257, 1024};
}

void updates() {
  for (const int dim : widths()) {
    const auto u = static_cast<std::uint64_t>(dim);
    for (const bool spread : {false, true}) {
      if (!spread && dim % 4 != 0) continue;
      const BatchSpec spec = of_width(dim, dim > 200 ? min_of(scale(), 4) : scale(), spread);
      update_equals_host<float, float>(spec, kRmsprop, Nearest{}, u);
      update_equals_host<half, half>(spec, kRmsprop, Stochastic{u}, u + 1);
      update_equals_host<coldrow::bfloat16, coldrow::bfloat16>(spec, kRmsprop, Stochastic{7}, u);
    }
  }
  for (const int how : {0, 1, 2, 3}) {
    BatchSpec spec = mixed(scale());
    spec.weighted = how == 1;
    spec.pooled = how != 2;
    spec.offsets = how != 3;
    const auto seed = static_cast<std::uint64_t>(how);
    update_equals_host<float, float>(spec, kRmsprop, Nearest{}, seed);
    update_equals_host<float, half>(spec, Adam<BiasCorrection::row>{}, Nearest{}, seed);
    update_equals_host<float, coldrow::bfloat16>(spec, Adagrad{}, Nearest{}, seed);
    update_equals_host<half, float>(spec, SGD{}, Stochastic{5}, seed);
  }
  for (const bool pooled : {false, true}) {
    BatchSpec spec = many_tables();
    spec.pooled = pooled;
    update_equals_host<float, float>(spec, kRmsprop, Nearest{}, 1);
  }
}

// Nothing, one index, runs about the lengths at which they are cut, a run that is the batch, rows of
// which only the workspace holds the sums.
void odd_sizes() {
  for (const int n : {0, 1, 2, 31, 127, 128, 129, 192, 193, 1025, 9000, 70000}) {
    if (n > 10000 && scale() < 10) continue;
    BatchSpec spec = of_width(20, 1);
    spec.rows = {1 + n % 2};
    spec.bags = {n};
    spec.offsets = false;
    update_equals_host<float, float>(spec, kRmsprop, Nearest{}, static_cast<std::uint64_t>(n));
  }
  update_equals_host<float, float>(of_width(13000, 1), kRmsprop, Nearest{}, 1);
  if (!quick) {
    // So many that the one block which adds up the warps' counts goes round more than once.
    BatchSpec spec = of_width(4, 1);
    spec.rows = {300'000};
    spec.bags = {2'200'000};
    spec.offsets = false;
    update_equals_host<half, half>(spec, kRmsprop, Nearest{}, 1);
  }

  // As much shared memory as a block may have without asking for more.
  const std::string where = "shared memory";
  const auto launch_for = [](int dim) {
    using Update = Training<float, RowwiseRMSprop, Nearest>::Update;
    return device::choose_apply<Update>({1000, 1000, 1, dim, false, this_machine()}).launch;
  };
  int dim = 4096;
  while (launch_for(dim).threads < device::kThreads) --dim;
  CHECK(launch_for(dim).shared_bytes > device::kMaxShared - 256);
  update_equals_host<float, float>(of_width(dim, 1), kRmsprop, Nearest{}, 2);
}

template <class W, class Out>
void lookup_equals_host(const BatchSpec& spec, std::uint64_t seed) {
  for (const bool read : {false, true}) {
    const std::string where = name_of(spec, seed) + (read ? ", read" : ", touch");
    Random random(seed);
    auto tables = touched_tables<W, RowwiseRMSprop>(spec, random);
    auto batch = exact_batch<std::int64_t>(spec, random);
    const auto grad = exact_gradients<float>(batch.out_size, random);
    const StepSpec step = a_step();
    const AnyDecay decay = linear();
    std::vector<Out> expected(static_cast<std::size_t>(batch.out_size));
    std::vector<float> expected_gradient(static_cast<std::size_t>(batch.positions()));
    host_lookup(batch, tables, read ? &decay : nullptr, step.step - 1, step.lr, step.epoch_start,
                expected, &grad, &expected_gradient);
    Training<W, RowwiseRMSprop, Nearest> training(tables, kRmsprop, decay, {}, step);
    const BatchOnDevice<std::int64_t> on_device(batch);
    const DeviceArray<Out> out(std::vector<Out>(expected.size()));
    const DeviceArray<std::int32_t> first_block(static_cast<std::int64_t>(batch.features.size()) +
                                                1);
    const DeviceArray<float> gradient(grad);
    const DeviceArray<float> weight_gradient(batch.positions());
    training.forward(nullptr, on_device, read, out, first_block, &gradient, &weight_gradient);
    CHECK(training.found().kind == device::Refusal::none);
    CHECK(same_bits(out.get(), expected));
    const auto got = weight_gradient.get();
    for (std::size_t p = 0; p < got.size(); ++p) {
      CHECK(std::fabs(got[p] - expected_gradient[p]) <=
            1e-5f * max_of(1.0f, std::fabs(expected_gradient[p])));
    }
  }
}

void lookups() {
  for (const int dim : widths()) {
    const auto seed = static_cast<std::uint64_t>(dim);
    lookup_equals_host<float, float>(of_width(dim, scale()), seed);
    lookup_equals_host<half, half>(of_width(dim, scale()), seed);
    lookup_equals_host<coldrow::bfloat16, float>(of_width(dim, scale()), seed);
  }
  for (const int how : {0, 1, 2, 3}) {
    BatchSpec spec = mixed(scale());
    spec.weighted = how == 1;
    spec.mean = how == 2;
    spec.pooled = how != 3;
    lookup_equals_host<float, coldrow::bfloat16>(spec, static_cast<std::uint64_t>(how));
  }
  for (const bool pooled : {false, true}) {
    BatchSpec spec = many_tables();
    spec.pooled = pooled;
    lookup_equals_host<half, float>(spec, 1);
  }
}

// Arrays that are views into others: aligned to their own type, and to nothing more.
void views() {
  shift = 1;
  const auto aligned = [](int*) { shift = 0; };
  const std::unique_ptr<int, decltype(aligned)> back(&shift, aligned);
  for (const int dim : {1, 8, 50, 128, 256}) {
    const auto u = static_cast<std::uint64_t>(dim);
    const BatchSpec spec = of_width(dim, 2);
    update_equals_host<float, half>(spec, kRmsprop, Nearest{}, u);
    update_equals_host<half, coldrow::bfloat16>(spec, Adagrad{}, Stochastic{u}, u);
    update_equals_host<coldrow::bfloat16, float>(spec, SGD{}, Stochastic{7}, u);
    lookup_equals_host<float, half>(spec, u);
    lookup_equals_host<coldrow::bfloat16, coldrow::bfloat16>(spec, u);
  }
  update_equals_host<float, float>(mixed(2), kRmsprop, Nearest{}, 3);
  lookup_equals_host<half, float>(mixed(2), 3);
}

// Gradients whose sums are not exact: each run gives the same bits, and they are near the host's.
void repeats() {
  for (const bool mean : {false, true}) {
    BatchSpec spec = mixed(scale());
    spec.mean = mean;
    spec.rows[0] = 4;  // long runs
    const std::string where = name_of(spec, 3);
    Random random(3);
    auto tables = touched_tables<coldrow::bfloat16, RowwiseRMSprop>(spec, random);
    const TestBatch<std::int32_t> batch(spec, random);
    const auto grad = random.numbers<float>(batch.out_size);
    const BatchOnDevice<std::int32_t> on_device(batch);
    const DeviceArray<float> gradient(grad);
    auto first = tables;
    for (int run = 0; run < 8; ++run) {
      Training<coldrow::bfloat16, RowwiseRMSprop, Stochastic> training(tables, kRmsprop, linear(),
                                                                       Stochastic{9}, a_step());
      const auto memory = training.workspace(on_device);
      training.backward(nullptr, on_device, gradient, memory);
      const auto got = training.get(tables);
      if (run == 0) first = got;
      CHECK(same(got, first));
    }
    auto expected = tables;
    const StepSpec step = a_step();
    host_update(
        batch, expected, grad.data(),
        Training<coldrow::bfloat16, RowwiseRMSprop, Stochastic>::Update::at(
            step.step, step.lr, kRmsprop, linear(), Stochastic{9}, false, step.epoch_start));
    for (std::size_t t = 0; t < tables.size(); ++t) {
      for (std::size_t i = 0; i < expected[t].weight.size(); ++i) {
        const double a = value_of(first[t].weight[i]), b = value_of(expected[t].weight[i]);
        // One unit of bfloat16: the same random bits, a value that may lie on the other side of them.
        CHECK(std::fabs(a - b) <= 0x1p-7 * max_of(0x1p-6, std::fabs(b)));
      }
      CHECK(first[t].records.size() == expected[t].records.size());
    }
  }
}

// A forward and a backward captured once, without allocating or waiting; replays see the clock, the
// learning rate, indices and gradients that are in memory by then, and a refused batch in between
// writes nothing.
void graphs() {
  const std::string where = "graph";
  Random random(4);
  const BatchSpec spec = mixed(scale());
  auto tables = touched_tables<float, RowwiseRMSprop>(spec, random);
  auto batch = exact_batch<std::int32_t>(spec, random);
  StepSpec step = a_step();
  const AnyDecay decay = linear();
  Training<float, RowwiseRMSprop, Nearest> training(tables, kRmsprop, decay, {}, step);
  const BatchOnDevice<std::int32_t> on_device(batch);
  const DeviceArray<float> gradient(std::vector<float>(static_cast<std::size_t>(batch.out_size)));
  const DeviceArray<float> out(std::vector<float>(static_cast<std::size_t>(batch.out_size)));
  const DeviceArray<std::int32_t> first_block(static_cast<std::int64_t>(batch.features.size()) + 1);
  const auto memory = training.workspace(on_device);
  // A device loads kernels when they are first launched, which it could not do in a capture.
  training.forward(nullptr, on_device, true, out, first_block, nullptr, nullptr);
  {
    Training<float, RowwiseRMSprop, Nearest> other(tables, kRmsprop, decay, {}, step);
    other.backward(nullptr, on_device, gradient, memory,
                   static_cast<int>(device::Pass::check_both));
    NEED(cudaDeviceSynchronize());
  }
  cudaStream_t stream;
  NEED(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  NEED(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  training.forward(stream, on_device, true, out, first_block, nullptr, nullptr);
  training.backward(stream, on_device, gradient, memory,
                    static_cast<int>(device::Pass::check_both));
  NEED(cudaStreamEndCapture(stream, &graph));
  NEED(cudaGraphInstantiate(&exec, graph, 0));

  auto expected = tables;
  const auto replay = [&](const std::vector<std::int32_t>& indices, double lr,
                          const std::vector<float>& grad) {
    training.lr.set(one(lr));
    const_cast<DeviceArray<std::int32_t>&>(on_device.indices).set(indices);
    const_cast<DeviceArray<float>&>(gradient).set(grad);
    NEED(cudaDeviceSynchronize());
    NEED(cudaGraphLaunch(exec, stream));
    NEED(cudaDeviceSynchronize());
  };
  for (int n = 0; n < 5; ++n) {
    // (Rotated within each feature, so that each index stays in its table.)
    for (const Feature& f : batch.features) {
      if (f.positions < 2) continue;
      auto* const first = batch.indices.data() + f.first_position;
      const auto last = first[f.positions - 1];
      for (std::int64_t i = f.positions - 1; i > 0; --i) first[i] = first[i - 1];
      first[0] = last;
    }
    const double lr = 0.125 / (1 << n);
    const auto grad = exact_gradients<float>(batch.out_size, random);
    std::vector<float> expected_out(out.get());
    host_lookup(batch, expected, &decay, step.step - 1 + n, lr, step.epoch_start, expected_out);
    host_update(batch, expected, grad.data(),
                Training<float, RowwiseRMSprop, Nearest>::Update::at(
                    step.step + n, lr, kRmsprop, decay, {}, false, step.epoch_start));
    replay(batch.indices, lr, grad);
    CHECK(same_bits(out.get(), expected_out));
    CHECK(same(training.get(tables), expected));
    CHECK(training.clock.get()[0] == step.step + n);
    if (n == 2) {
      auto bad = batch.indices;
      bad[11] = -1;
      replay(bad, lr, grad);
      CHECK(same(training.get(tables), expected));
      CHECK(training.clock.get()[0] == step.step + n);
      CHECK(training.found().kind == device::Refusal::index_range);
      CHECK(training.found().position == 11);
    }
  }
  NEED(cudaGraphExecDestroy(exec));
  NEED(cudaGraphDestroy(graph));
  NEED(cudaStreamDestroy(stream));
}

// A batch that is refused writes nothing; what is wrong with it is written down.
void refusals() {
  const std::string where = "refusals";
  Random random(5);
  const BatchSpec spec = mixed(scale());
  auto tables = touched_tables<float, RowwiseRMSprop>(spec, random);
  const TestBatch<std::int64_t> good(spec, random);
  const auto good_grad = random.numbers<float>(good.out_size);
  const auto run = [&](const TestBatch<std::int64_t>& batch, const std::vector<float>& grad,
                       int check, StepSpec step, device::Report& report) {
    Training<float, RowwiseRMSprop, Nearest> training(tables, kRmsprop, linear(), {}, step);
    const BatchOnDevice<std::int64_t> on_device(batch);
    const DeviceArray<float> gradient(grad);
    const auto memory = training.workspace(on_device);
    training.backward(nullptr, on_device, gradient, memory, check);
    report = training.found();
    const bool ticked = training.clock.get()[0] == step.step;
    return std::pair(same(training.get(tables), tables), ticked);
  };
  using Written = std::pair<bool, bool>;
  const Written nothing{true, false};
  device::Report report{};
  for (const std::int64_t value : {std::int64_t{-1}, std::int64_t{1} << 40, INT64_MIN}) {
    auto batch = good;
    batch.indices.back() = value;
    batch.indices[9] = value;
    CHECK(run(batch, good_grad, 0, a_step(), report) == nothing);
    CHECK(report.kind == device::Refusal::index_range);
    CHECK(report.position == 9 && report.value == value && report.refused == 1);
  }
  auto batch = good;
  batch.offsets[3] = 1 << 30;
  CHECK(run(batch, good_grad, 0, a_step(), report) == nothing);
  CHECK(report.kind == device::Refusal::offsets_decrease && report.position == 4);
  batch = good;
  batch.offsets.back() += 1;
  CHECK(run(batch, good_grad, 0, a_step(), report) == nothing);
  CHECK(report.kind == device::Refusal::offsets_end);

  const auto both = static_cast<int>(device::Pass::check_both);
  auto grad = good_grad;
  grad[static_cast<std::size_t>(good.out_element(good.lookups[7], 0))] = kInff;
  CHECK(run(good, grad, both, a_step(), report) == nothing);
  CHECK(report.kind == device::Refusal::nonfinite_row && report.bad_rows >= 1);
  // Under skip that row alone is left.
  CHECK(run(good, grad, 0, a_step(), report) == Written(false, true));
  CHECK(report.nonfinite_rows >= 1);
  StepSpec early = a_step();
  early.step = 3;
  CHECK(run(good, good_grad, both, early, report) == nothing);
  CHECK(report.kind == device::Refusal::stale_row && report.value >= 3);
}

// What the host composes comes to the device whole, in several launches where it is long.
void uploads() {
  for (const std::size_t count : {1u, 3071u, 3072u, 3073u, 10000u}) {
    const std::string where = std::to_string(count) + " bytes";
    std::vector<unsigned char> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<unsigned char>(i * 7 + i / 256);
    const DeviceArray<unsigned char> target(std::vector<unsigned char>(count, 0xee));
    device::Queue queue(nullptr);
    device::upload(queue, target.data(), bytes.data(), count);
    NEED(queue.error);
    CHECK(target.get() == bytes);
  }
}

// One call's error is not the next one's, though the runtime remembers it until it is asked.
void errors() {
  const std::string where = "errors";
  void* none = nullptr;
  device::Queue failed(nullptr);
  failed.add(cudaMalloc(&none, std::size_t{1} << 60));
  CHECK(failed.error == cudaErrorMemoryAllocation);
  const DeviceArray<device::Report> report(one(device::Report{}));
  device::Queue queue(nullptr);
  device::begin_batch(queue, report.data(), true);
  CHECK(queue.error == cudaSuccess);
  CHECK(report.get()[0].batches == 1);
}

// Two streams at work at once, each with tables and memory of its own, nobody waiting in between.
void streams() {
  const std::string where = "streams";
  struct Side {
    cudaStream_t stream;
    std::vector<TestTable<float, RowwiseRMSprop>> tables, expected;
    TestBatch<std::int32_t> batch;
    std::vector<float> grad;
    Training<float, RowwiseRMSprop, Nearest> training;
    BatchOnDevice<std::int32_t> on_device;
    DeviceArray<float> gradient;
    DeviceArray<unsigned char> memory;
    explicit Side(Random random)
        : tables(touched_tables<float, RowwiseRMSprop>(mixed(scale()), random)),
          expected(tables),
          batch(exact_batch<std::int32_t>(mixed(scale()), random)),
          grad(exact_gradients<float>(batch.out_size, random)),
          training(tables, kRmsprop, linear(), {}, a_step()),
          on_device(batch),
          gradient(grad),
          memory(training.workspace(on_device)) {
      NEED(cudaStreamCreate(&stream));
    }
  };
  Side sides[2] = {Side(Random(6)), Side(Random(7))};
  NEED(cudaDeviceSynchronize());
  const int steps = quick ? 2 : 10;
  for (int n = 0; n < steps; ++n) {
    for (Side& s : sides) s.training.backward(s.stream, s.on_device, s.gradient, s.memory);
  }
  for (Side& s : sides) {
    for (int n = 0; n < steps; ++n) {
      const StepSpec step = a_step();
      host_update(s.batch, s.expected, s.grad.data(),
                  Training<float, RowwiseRMSprop, Nearest>::Update::at(
                      step.step + n, step.lr, kRmsprop, linear(), {}, false, step.epoch_start));
    }
    CHECK(same(s.training.get(s.tables), s.expected));
    NEED(cudaStreamDestroy(s.stream));
  }
}

// The sorts of all three kinds of entries, by the bits asked for alone, stable.
template <class Key, class Payload>
void sorts_pairs(std::int64_t n, int bits) {
  const std::string where = std::to_string(n) + " keys of " + std::to_string(bits) + " bits";
  Random random(static_cast<std::uint64_t>(n) + 64u * static_cast<std::uint64_t>(bits));
  std::vector<Key> keys;
  std::vector<Payload> payloads;
  for (std::int64_t i = 0; i < n; ++i) {
    keys.push_back(static_cast<Key>(random.bits64() >> (64 - bits)) & static_cast<Key>(~Key{0}));
    if (i % 3 == 0 && i > 0) keys.back() = keys[static_cast<std::size_t>(random.below(i))];
    payloads.push_back(static_cast<Payload>(i));
  }
  const DeviceArray<Key> k0(keys), k1(n);
  const DeviceArray<Payload> p0(payloads), p1(n);
  Key* const both_keys[2] = {k0.data(), k1.data()};
  Payload* const both_payloads[2] = {p0.data(), p1.data()};
  std::size_t bytes = 0;
  bool second = false;
  NEED(
      device::radix_sort_pairs(nullptr, bytes, both_keys, both_payloads, n, bits, second, nullptr));
  const DeviceArray<unsigned char> temp(static_cast<std::int64_t>(bytes));
  NEED(device::radix_sort_pairs(temp.data(), bytes, both_keys, both_payloads, n, bits, second,
                                nullptr));
  NEED(cudaDeviceSynchronize());
  const auto got_keys = (second ? k1 : k0).get();
  const auto got_payloads = (second ? p1 : p0).get();
  for (std::size_t i = 0; i < got_keys.size(); ++i) {
    CHECK(got_keys[i] == keys[static_cast<std::size_t>(got_payloads[i])]);
    if (i == 0) continue;
    CHECK(got_keys[i - 1] < got_keys[i] ||
          (got_keys[i - 1] == got_keys[i] && got_payloads[i - 1] < got_payloads[i]));
  }
}

void sorts() {
  for (const std::int64_t n : {1, 2, 1000, 20000 * scale()}) {
    for (const int bits : {1, 7, 8, 20, 24, 32}) {
      sorts_pairs<std::uint32_t, std::uint32_t>(n, bits);
      sorts_pairs<std::uint32_t, std::uint64_t>(n, bits);
      sorts_pairs<std::uint64_t, std::uint64_t>(n, bits);
    }
    sorts_pairs<std::uint64_t, std::uint64_t>(n, 33);
    sorts_pairs<std::uint64_t, std::uint64_t>(n, 40);
  }
}

// Rows whose elements lie beyond 2^32, and a table of more than 2^32 rows (keys of 64 bits) which is
// not there but for its rows' numbers.
void far_rows() {
  const std::string where = "far rows";
  constexpr std::int64_t kRows = 70'000'000;
  constexpr int kDim = 64;
  std::size_t unused = 0, total = 0;
  NEED(cudaMemGetInfo(&unused, &total));
  const std::size_t bytes = kRows * (kDim * sizeof(half) + 8);
  if (unused < bytes + (std::size_t{1} << 30)) {
    std::printf("far_rows: not run, needs %zu bytes of device memory\n", bytes);
    return;
  }
  Random random(8);
  std::vector<TestTable<half, RowwiseRMSprop>> none;
  Training<half, RowwiseRMSprop, Nearest> training(none, kRmsprop, linear(), {}, {});
  const DeviceArray<half> weight(kRows * kDim);
  const DeviceArray<std::int32_t> records(kRows * 2);
  NEED(cudaMemset(weight.data(), 0, weight.bytes()));
  NEED(cudaMemset(records.data(), 0, records.bytes()));
  using Update = RowUpdate<half, float, RowwiseRMSprop, AnyDecay, Nearest>;
  Table<half, RowwiseRMSprop> table;
  table.weight = weight.data();
  table.rows = kRows;
  table.dim = kDim;
  table.prev_iter = {records.data() + 1, 2};
  table.scalars[0] = {reinterpret_cast<float*>(records.data()), 2};

  BatchSpec spec = of_width(kDim, 1);
  spec.rows = {kRows};
  spec.bags = {8};
  spec.offsets = false;
  TestBatch<std::int64_t> batch(spec, random);
  batch.indices = {kRows - 1, 0, 67'200'001, kRows - 1, 1, 33'600'000, 3, kRows - 2};
  const auto grad = exact_gradients<float>(batch.out_size, random);
  for (const std::int64_t before : {std::int64_t{0}, std::int64_t{5} << 32}) {
    // Rows of an empty table before this one push the keys up.
    NEED(cudaMemset(records.data(), 0, records.bytes()));
    const BatchOnDevice<std::int64_t> b(batch);
    const DeviceArray<float> gradient(grad);
    const DeviceArray<device::TableInfo> info(
        one(device::TableInfo{weight.data(), kRows, kDim, {records.data() + 1, 2}}));
    const DeviceArray<std::int64_t> base(std::vector<std::int64_t>{before, before + kRows});
    const DeviceArray<Table<half, RowwiseRMSprop>> tables(one(table));
    const DeviceArray<Update> update(one(Update::at(1, 0.5, kRmsprop)));
    const device::Layout layout{info.data(),       base.data(),           1, b.features.data(), 1,
                                b.by_table.data(), b.first_feature.data()};
    const device::Extent extent{batch.positions(), before + kRows, 1, kDim, false, this_machine()};
    std::size_t sort_bytes = 0;
    NEED(device::radix_sort_bytes(extent, sort_bytes));
    device::SegmentSpace segments;
    device::ApplySpace space;
    const auto take = [&](device::Workspace w) {
      segments = device::take_segment_space(w, extent, sort_bytes);
      space = device::take_apply_space(w, extent,
                                       device::choose_apply<Update>(extent).workspace_floats);
      return static_cast<std::int64_t>(w.bytes());
    };
    const DeviceArray<unsigned char> memory(take(device::Workspace(nullptr)));
    take(device::Workspace(memory.data()));
    device::Queue queue(nullptr);
    const device::Gradient g{gradient.data(), NumericType::float32};
    device::Report* const report = training.report.data();
    device::begin_batch(queue, report, true);
    device::check_batch(queue, b.batch, layout, report, extent.machine);
    const auto sorted = device::segment(queue, b.batch, layout, extent, segments, report);
    device::sum_long_runs(queue, layout, extent, g, sorted, segments.runs, space, report);
    device::apply(queue,
                  device::TableGroup<Update>{tables.data(), b.numbers.data(), update.data(), 1},
                  layout, extent, g, sorted, segments.runs, space, device::Pass::update, report);
    NEED(queue.error);
    NEED(cudaDeviceSynchronize());
    CHECK(training.found().found == device::kNothing);
    for (const std::int64_t r : batch.indices) {
      std::int32_t record[2];
      NEED(cudaMemcpy(record, records.data() + 2 * r, sizeof record, cudaMemcpyDeviceToHost));
      CHECK(record[1] == 1);
      double square = 0.0;
      for (int c = 0; c < kDim; ++c) {
        double sum = 0.0;
        for (std::size_t i = 0; i < batch.indices.size(); ++i) {
          if (batch.indices[i] == r) {
            sum += value_of(grad[i * static_cast<std::size_t>(batch.features[0].out_stride) +
                                 static_cast<std::size_t>(c)]);
          }
        }
        square += sum * sum;
      }
      CHECK(std::fabs(float_of(static_cast<std::uint32_t>(record[0])) - 0.25 * square / kDim) <=
            1e-6);
    }
    // And no other row: a neighbour of each.
    std::int32_t record[2];
    NEED(cudaMemcpy(record, records.data() + 2 * (kRows - 3), sizeof record,
                    cudaMemcpyDeviceToHost));
    CHECK(record[0] == 0 && record[1] == 0);
  }
}

struct Case {
  const char* name;
  void (*run)();
};
constexpr Case kCases[] = {
    {"updates", updates}, {"odd_sizes", odd_sizes}, {"lookups", lookups},   {"views", views},
    {"repeats", repeats}, {"graphs", graphs},       {"refusals", refusals}, {"uploads", uploads},
    {"errors", errors},   {"streams", streams},     {"sorts", sorts},       {"far_rows", far_rows}};

int run(const std::vector<std::string>& names) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device was found: nothing was run\n");
    return 77;
  }
  cudaDeviceProp properties;
  NEED(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, compute capability %d.%d, %d multiprocessors\n", properties.name,
              properties.major, properties.minor, properties.multiProcessorCount);
  int done = 0;
  for (const Case& c : kCases) {
    bool asked = names.empty();
    for (const auto& name : names) asked = asked || name == c.name;
    if (!asked) continue;
    const int before = failures;
    try {
      c.run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", c.name, error.what());
      ++failures;
    }
    std::printf("%-10s %s\n", c.name, failures == before ? "passed" : "FAILED");
    ++done;
  }
  if (done == 0) {
    std::printf("no such case\n");
    return 2;
  }
  std::printf("%d cases, %d failures\n", done, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace coldrow_test

int main(int argc, char** argv) {
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--quick") {
      coldrow_test::quick = true;
    } else {
      names.emplace_back(argv[i]);
    }
  }
  return coldrow_test::run(names);
}
