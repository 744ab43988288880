// The row update inside a kernel of your own: here one that computes a gradient, instead of reading
// one, and trains the row with it in the same pass over memory.
//
// Rows are pulled toward a target, d/dw of |w - target|^2 / 2. A warp takes a row: it puts the gradient
// in shared memory and calls the RowUpdate that everything else in coldrow calls. Afterwards the
// host does the same with one thread per row, and the bits must agree.
//
//   nvcc -std=c++20 -fmad=false -arch=sm_90 -I include examples/07_own_cuda_kernel.cu
//
// -fmad=false: the formulas say themselves where a product and a sum are one operation.
#include <coldrow/policy/any_decay.hpp>
#include <coldrow/table/table.hpp>
#include <cstdio>
#include <cstring>
#include <vector>

// Bits that agree need sums that do: of the mean of squares, which a warp adds in another order than
// one thread does. With gradients that are small multiples of 1/8 both orders are exact.
using Update = coldrow::RowUpdate<float, float, coldrow::RowwiseRMSprop, coldrow::LinearClipped,
                                  coldrow::Nearest>;
using Table = coldrow::Table<float, coldrow::RowwiseRMSprop>;

constexpr int kDim = 64;
constexpr int kWarps = 4;  // to a block

__host__ __device__ float target(std::int64_t row, int column) {
  return static_cast<float>((row + column) % 9 - 4) / 8.0f;
}

// One step for every row of the table. (A clock and lr that a captured graph should follow would be
// read from memory: Update::at() runs on the device too.)
__global__ void pull(Update update, Table table) {
  __shared__ float gradients[kWarps][kDim];
  const coldrow::Warp warp;
  const int number = static_cast<int>(threadIdx.x / 32);
  const std::int64_t r = static_cast<std::int64_t>(blockIdx.x) * kWarps + number;
  if (r >= table.rows) return;
  const auto row = table.row(r);
  for (int c = warp.rank(); c < kDim; c += warp.size()) {
    gradients[number][c] = row.weight[c] - target(r, c);
  }
  __syncwarp();  // lanes read what others wrote
  update(warp, row, gradients[number], kDim, table.key(r));
}

struct Record {  // a row's state, in one cache line
  float momentum1 = 0.0f;
  std::int32_t prev_iter = 0;
};

Table view(float* weight, Record* records, std::int64_t rows) {
  Table table;
  table.weight = weight;
  table.rows = rows;
  table.dim = kDim;
  table.prev_iter = {&records->prev_iter, 2};
  table.scalars[0] = {&records->momentum1, 2};
  return table;
}

#define CHECK(call)                                              \
  do {                                                           \
    const cudaError_t error = (call);                            \
    if (error != cudaSuccess) {                                  \
      std::printf("%s: %s\n", #call, cudaGetErrorString(error)); \
      return 1;                                                  \
    }                                                            \
  } while (false)

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device was found: nothing was run\n");
    return 77;
  }
  constexpr std::int64_t rows = 1001;
  std::vector<float> weight(rows * kDim);
  std::vector<Record> records(rows);
  for (std::size_t i = 0; i < weight.size(); ++i) {
    weight[i] = static_cast<float>(static_cast<int>(i % 17) - 8) / 8.0f;
  }
  float* device_weight = nullptr;
  Record* device_records = nullptr;
  const std::size_t weight_bytes = weight.size() * sizeof(float);
  const std::size_t record_bytes = records.size() * sizeof(Record);
  CHECK(cudaMalloc(&device_weight, weight_bytes));
  CHECK(cudaMalloc(&device_records, record_bytes));
  CHECK(cudaMemcpy(device_weight, weight.data(), weight_bytes, cudaMemcpyHostToDevice));
  CHECK(cudaMemset(device_records, 0, record_bytes));

  const auto update = Update::at(1, 0.125, {}, {0.5f, 0.1f});
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  pull<<<blocks, 32 * kWarps>>>(update, view(device_weight, device_records, rows));
  CHECK(cudaGetLastError());
  std::vector<float> got(weight.size());
  std::vector<Record> got_records(records.size());
  CHECK(cudaMemcpy(got.data(), device_weight, weight_bytes, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(got_records.data(), device_records, record_bytes, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(device_weight));
  CHECK(cudaFree(device_records));

  const Table table = view(weight.data(), records.data(), rows);
  for (std::int64_t r = 0; r < rows; ++r) {
    float gradient[kDim];
    for (int c = 0; c < kDim; ++c) gradient[c] = table.row(r).weight[c] - target(r, c);
    update(coldrow::Serial{}, table.row(r), gradient, kDim, table.key(r));
  }
  const bool same = std::memcmp(got.data(), weight.data(), weight_bytes) == 0 &&
                    std::memcmp(got_records.data(), records.data(), record_bytes) == 0;
  std::printf("%lld rows of %d: device and host %s\n", static_cast<long long>(rows), kDim,
              same ? "agree in every bit" : "DISAGREE");
  return same ? 0 : 1;
}
