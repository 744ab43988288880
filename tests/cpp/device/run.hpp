// A test batch and its tables as a caller of the device drivers has them, and the same through the
// host drivers. "Device memory" is the host's: what a driver may not touch is beyond a page that
// faults, what it must not rely on is filled with NaNs.
#pragma once

#include "simt.hpp"

#include <coldrow/device/radix_sort.cuh>

#include "../support.hpp"
#include "tables.hpp"

namespace coldrow_test {

inline std::vector<simt::Order> all_orders() {
  return {{simt::Order::forward, 0},
          {simt::Order::reverse, 0},
          {simt::Order::random, 1},
          {simt::Order::random, 2}};
}

inline constexpr device::Machine kMachine{2};

// Memory for a workspace, aligned as a device allocator's, full of NaNs, with guards around.
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    const std::size_t rounded = (bytes + 255) / 256 * 256;
    base_ = static_cast<unsigned char*>(std::aligned_alloc(256, rounded + 512));
    std::memset(base_, 0xff, rounded + 512);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { std::free(base_); }
  void* data() const { return base_ + 256; }
  bool intact() const {
    for (std::size_t i = 0; i < 256; ++i) {
      if (base_[i] != 0xff || base_[256 + bytes_ + i] != 0xff) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_;
  unsigned char* base_;
};

// Memory of any size, of which only what is touched exists.
template <class T>
class VirtualMemory {
 public:
  explicit VirtualMemory(std::int64_t count) : bytes_(static_cast<std::size_t>(count) * sizeof(T)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(p);
  }
  VirtualMemory(const VirtualMemory&) = delete;
  VirtualMemory& operator=(const VirtualMemory&) = delete;
  ~VirtualMemory() { munmap(static_cast<void*>(data_), bytes_); }
  T* data() const { return data_; }

 private:
  std::size_t bytes_;
  T* data_;
};

// The descriptors of a batch. The features' positions are left for the device to find, where there
// are offsets.
template <class Index>
struct DeviceBatch {
  std::vector<device::TableInfo> infos;
  std::vector<std::int64_t> base;
  std::vector<Feature> features;
  std::vector<std::int32_t> by_table, first_feature, all_features;
  device::Layout layout;
  device::Batch batch;
  device::Extent extent;
  device::Report report{};

  template <class W, class Optimizer>
  DeviceBatch(const TestBatch<Index>& test, std::vector<TestTable<W, Optimizer>>& tables)
      : base(test.table_base), features(test.features) {
    const auto num_tables = static_cast<std::int32_t>(tables.size());
    const auto num_features = static_cast<std::int32_t>(features.size());
    std::int64_t rows = 0;
    for (auto& t : tables) {
      infos.push_back({t.weight.data(), t.rows, t.dim, {t.records.data() + t.kScalars, t.kRecord}});
      rows += t.rows;
      extent.widest = std::max(extent.widest, t.dim);
    }
    base.push_back(rows);
    by_table.resize(features.size());
    first_feature.resize(tables.size() + 1);
    all_features.resize(features.size());
    std::iota(all_features.begin(), all_features.end(), 0);
    device::group_features(features.data(), num_features, num_tables, by_table.data(),
                           first_feature.data());
    if (test.spec.offsets) {
      for (Feature& f : features) {
        f.first_position = f.positions = -77;
        if (!test.spec.pooled) f.first_row = f.out_offset = f.out_stride = -77;
      }
    }
    layout = {infos.data(), base.data(),     num_tables,          features.data(),
              num_features, by_table.data(), first_feature.data()};
    batch.indices = integers(test.indices);
    if (test.spec.offsets) batch.offsets = integers(test.offsets);
    batch.bags = test.bags;
    batch.positions = test.positions();
    batch.pooled = test.spec.pooled;
    batch.mean = test.spec.mean;
    batch.per_sample_weights = test.spec.weighted ? test.weights.data() : nullptr;
    extent.positions = batch.positions;
    extent.total_rows = rows;
    extent.num_tables = num_tables;
    extent.scaled = test.spec.mean || test.spec.weighted;
    extent.machine = kMachine;
  }
};

// ------------------------------------------------------------------------------------------- update

// One backward and update through the device drivers, clock and lr in "device memory". Returns the
// clock afterwards.
template <class Update, class Index, class G, class W, class Optimizer, class Decay, class Rounding>
std::int64_t device_update(std::vector<TestTable<W, Optimizer>>& tables, const G* grad,
                           const StepSpec& spec, const Optimizer& optimizer, const Decay& decay,
                           const Rounding& rounding, DeviceBatch<Index>& d) {
  std::int64_t clock = spec.step - 1;
  const std::int64_t epoch_start = spec.epoch_start;
  const double lr = spec.lr;
  const auto count = static_cast<std::int32_t>(tables.size());
  std::vector<Table<W, Optimizer>> views;
  std::vector<std::int32_t> numbers;
  std::vector<device::Recipe<Update>> recipes;
  for (auto& t : tables) {
    numbers.push_back(static_cast<std::int32_t>(views.size()));
    views.push_back(t.view());
    recipes.push_back({optimizer, decay, rounding, spec.decay_state, spec.on_nonfinite, {&lr}});
  }
  const DeviceMemory update_memory(tables.size() * sizeof(Update));
  auto* const updates = static_cast<Update*>(update_memory.data());

  device::Queue queue(nullptr);
  std::size_t sort_bytes = 0;
  queue.add(device::radix_sort_bytes(d.extent, sort_bytes));
  device::SegmentSpace segments;
  device::ApplySpace space;
  const auto take = [&](device::Workspace w) {
    segments = device::take_segment_space(w, d.extent, sort_bytes);
    space = device::take_apply_space(w, d.extent,
                                     device::choose_apply<Update>(d.extent).workspace_floats);
    return w.bytes();
  };
  const DeviceMemory memory(take(device::Workspace(nullptr)));
  take(device::Workspace(memory.data()));

  device::begin_batch(queue, &d.report, true);
  device::check_batch(queue, d.batch, d.layout, &d.report, kMachine);
  device::prepare_updates(queue, {{&clock}, {&epoch_start}}, recipes.data(), numbers.data(), count,
                          updates, &d.report);
  const device::Entries sorted =
      device::segment(queue, d.batch, d.layout, d.extent, segments, &d.report);
  const device::Gradient gradient{grad, kNumericType<G>};
  device::sum_long_runs(queue, d.layout, d.extent, gradient, sorted, segments.runs, space,
                        &d.report);
  const device::TableGroup<Update> group{views.data(), numbers.data(), updates, count};
  if (spec.check != 0) {
    device::apply(queue, group, d.layout, d.extent, gradient, sorted, segments.runs, space,
                  static_cast<device::Pass>(spec.check), &d.report);
  }
  device::apply(queue, group, d.layout, d.extent, gradient, sorted, segments.runs, space,
                device::Pass::update, &d.report);
  device::finish_batch(queue, d.batch, d.layout, &d.report, &clock);
  EXPECT_EQ(queue.error, cudaSuccess);
  EXPECT_TRUE(memory.intact() && update_memory.intact()) << "written beside the workspace";
  return clock;
}

}  // namespace coldrow_test
