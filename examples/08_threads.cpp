// Training from several std::threads: each trains the rows that are its own, and all share one RowUpdate
// and one table. No lock is needed: an update is constant once made, and a row is read and written by the
// thread that trains it alone. Which thread trains a row changes no bit of it.
#include <coldrow/coldrow.hpp>
#include <cstdio>
#include <thread>
#include <vector>

using namespace coldrow;

constexpr std::int64_t kRows = 1000;
constexpr int kDim = 32, kSteps = 20;
using Update = RowUpdate<bfloat16, float, RowwiseRMSprop, CumulativeLinear, Stochastic>;

struct Memory {
  std::vector<bfloat16> weight = std::vector<bfloat16>(kRows * kDim);
  std::vector<std::int32_t> prev_iter = std::vector<std::int32_t>(kRows);
  std::vector<float> momentum1 = std::vector<float>(kRows);

  Table<bfloat16, RowwiseRMSprop> table() {
    return {weight.data(), kRows, kDim, {prev_iter.data()}, {{momentum1.data()}}, {}, {}};
  }
};

// One step of the rows that belong to thread `mine` of `threads`.
void train(const Update& update, const Table<bfloat16, RowwiseRMSprop>& table, int mine,
           int threads) {
  for (std::int64_t r = mine; r < table.rows; r += threads) {
    if ((r + update.step) % 3 == 0) continue;  // not in this step's batch
    float grad[kDim];
    for (int d = 0; d < kDim; ++d) grad[d] = static_cast<float>((r + d * update.step) % 7 - 3);
    update(Serial{}, table.row(r), grad, kDim, table.key(r));
  }
}

Memory trained_by(int threads) {
  Memory memory;
  const auto table = memory.table();
  for (std::int32_t step = 1; step <= kSteps; ++step) {
    const Update update = Update::at(step, 0.02, {}, {.alpha = 0.01}, {.seed = 7});
    std::vector<std::thread> workers;
    for (int mine = 0; mine < threads; ++mine) {
      workers.emplace_back([&, mine] { train(update, table, mine, threads); });
    }
    for (std::thread& worker : workers) worker.join();  // before the next step begins
  }
  return memory;
}

int main() {
  const Memory one = trained_by(1), four = trained_by(4);
  bool same = one.momentum1 == four.momentum1 && one.prev_iter == four.prev_iter;
  for (std::size_t i = 0; i < one.weight.size(); ++i) {
    same = same && one.weight[i].bits == four.weight[i].bits;
  }
  std::printf("1 thread and 4: %s\n", same ? "the same bits" : "other bits");
  return same && one.weight[0].bits != 0 ? 0 : 1;
}
