#include <atomic>
#include <coldrow/host/parallel.hpp>

#include "../support.hpp"

namespace coldrow_test {
namespace {

TEST(Parallel, EachPartRunsOnce) {
  for (const int parts : {1, 2, 3, 8, 50}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(parts));
    host::parallel(parts, [&](int part) { ++runs[static_cast<std::size_t>(part)]; });
    for (const auto& count : runs) EXPECT_EQ(count.load(), 1) << parts;
  }
}

TEST(Parallel, PartsCoverEverythingInOrder) {
  for (const std::int64_t n : {0L, 1L, 2L, 7L, 1000L, (1L << 31) + 1, (1L << 40) + 3}) {
    for (const int parts : {1, 2, 3, 7, 64}) {
      EXPECT_EQ(host::part_begin(n, 0, parts), 0);
      EXPECT_EQ(host::part_begin(n, parts, parts), n);
      for (int part = 0; part < parts; ++part) {
        const std::int64_t size =
            host::part_begin(n, part + 1, parts) - host::part_begin(n, part, parts);
        EXPECT_GE(size, n / parts);
        EXPECT_LE(size, n / parts + 1);
      }
    }
  }
}

TEST(Parallel, WorkspaceMeasuresWhatItTakes) {
  const auto take = [](host::Workspace w, std::vector<char*>& pieces) {
    pieces = {w.take<char>(3), reinterpret_cast<char*>(w.take<double>(5)), w.take<char>(0),
              reinterpret_cast<char*>(w.take<std::uint32_t>(100))};
    return w.bytes();
  };
  std::vector<char*> pieces;
  const std::size_t bytes = take(host::Workspace(nullptr), pieces);
  EXPECT_EQ(pieces, std::vector<char*>(4, nullptr));

  alignas(64) char memory[1024];
  ASSERT_LE(bytes, sizeof memory);
  EXPECT_EQ(take(host::Workspace(memory), pieces), bytes);
  const std::size_t sizes[] = {3, 40, 0, 400};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ((pieces[i] - memory) % 64, 0) << "aligned for any type and its own cache lines";
    EXPECT_GE(pieces[i], i == 0 ? memory : pieces[i - 1] + sizes[i - 1]);
    EXPECT_LE(pieces[i] + sizes[i], memory + bytes);
  }
}

// Prefetching is a hint: an address that does not exist may be fetched.
TEST(Parallel, PrefetchNeverFaults) {
  host::prefetch(nullptr, 4096);
  host::prefetch(reinterpret_cast<const void*>(std::uintptr_t{0x10}), 4096);
}

}  // namespace
}  // namespace coldrow_test
