// A stand-in for a CUDA device on the host, for tests: it runs the kernels themselves, compiled by a
// host compiler with COLDROW_SIMT defined. Include it before any coldrow header.
//
// Every thread of a block is a fiber. One fiber runs at a time, as far as it gets: to the next
// shuffle, barrier or the end; then the first that can go on. Which threads come first is settable:
// forward, a warp is as far ahead of the next as barriers let it be. Each is one of the orders a device
// may choose, so code that relies on another gives a wrong result here, always. What threads do
// where they meet is checked: all lanes named in a mask must come, to the same place in the source,
// and no thread may miss a barrier. Shared memory starts each block as NaNs and ends where it ends
// (so that a sanitizer sees accesses beyond it). Blocks run one after another.
#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump between fibers for a fault
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(COLDROW_SIMT)
#error "compile with -DCOLDROW_SIMT: coldrow's headers have to know"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorUnknown = 999
};

namespace simt {

using Site = std::source_location;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Which thread goes first, and which block.
struct Order {
  enum Kind { forward, reverse, random } kind = forward;
  unsigned seed = 0;
};

class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place to go on from. A fiber is entered by ucontext; later switches are jumps, because swapcontext
// makes a system call each time (a sanitizer understands that one alone).
struct Place {
  ucontext_t context{};
  jmp_buf jump{};
  bool entered = false;
};
[[gnu::noinline]] inline void go(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.context, &to.context);
#else
  if (_setjmp(from.jump) != 0) return;
  from.entered = true;
  if (to.entered) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

struct Fiber {
  enum State { ready, waiting, done };
  enum Meeting { none, lanes, block };

  Place place;
  std::unique_ptr<char[]> stack;
  State state = ready;
  unsigned number = 0;
  // What it waits for.
  Meeting meeting = none;
  unsigned mask = 0;
  Site site;
  // What it brings, from which lane it wants something (-1: a bit of every lane), what it got.
  std::uint64_t value = 0, got = 0;
  int from = 0;
};

class Block {
 public:
  static constexpr std::size_t kStack = 128 * 1024;

  Index3 thread_index() const { return {running_->number, 0, 0}; }

  void run(unsigned threads, const Order& order, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack = std::make_unique<char[]>(kStack);
    }
    count_ = threads;
    std::vector<unsigned> turns(threads);
    std::iota(turns.begin(), turns.end(), 0u);
    if (order.kind == Order::reverse) std::reverse(turns.begin(), turns.end());
    std::mt19937 random(order.seed);
    for (unsigned i = 0; i < threads; ++i) start(i);
    failure_ = nullptr;
    // The first that can go on does, so one warp may be far ahead of another.
    for (unsigned left = threads; left > 0;) {
      if (order.kind == Order::random && random() % 16 == 0) {
        std::shuffle(turns.begin(), turns.end(), random);
      }
      const auto next = std::find_if(turns.begin(), turns.end(),
                                     [&](unsigned i) { return fibers_[i]->state == Fiber::ready; });
      if (next == turns.end()) {
        throw Fault("threads wait for each other for ever: " + waiting());
      }
      running_ = fibers_[*next].get();
      go(scheduler_, running_->place);
      if (failure_) std::rethrow_exception(failure_);
      if (running_->state == Fiber::done) --left;
    }
  }

  // A shuffle, vote or warp barrier: the lanes in mask meet at site.
  std::uint64_t meet(unsigned mask, std::uint64_t value, int from, const Site& site) {
    Fiber& me = *running_;
    const unsigned lane = me.number % 32;
    if ((mask >> lane & 1u) == 0) throw Fault("a lane is not in its own mask, " + place(site));
    me.meeting = Fiber::lanes;
    me.mask = mask;
    me.site = site;
    me.value = value;
    me.from = from;
    me.state = Fiber::waiting;
    if (!all_there(mask, me)) {
      leave(me);
      return me.got;
    }
    const unsigned first = me.number - lane;
    for (unsigned l = 0; l < 32; ++l) {
      if ((mask >> l & 1u) == 0) continue;
      Fiber& other = *fibers_[first + l];
      if (other.from >= 0) {
        if (other.from > 31 || (mask >> other.from & 1u) == 0) {
          throw Fault("a shuffle reads a lane that is not in its mask, " + place(site));
        }
        other.got = fibers_[first + static_cast<unsigned>(other.from)]->value;
      } else {
        other.got = 0;
        for (unsigned k = 0; k < 32; ++k) {
          if ((mask >> k & 1u) != 0 && fibers_[first + k]->value != 0) other.got |= 1ull << k;
        }
      }
    }
    for (unsigned l = 0; l < 32; ++l) {
      if ((mask >> l & 1u) != 0) fibers_[first + l]->state = Fiber::ready;
    }
    // Who comes last does not go first: the others may.
    leave(me);
    return me.got;
  }

  // __syncthreads(): all threads of the block meet at site.
  void barrier(const Site& site) {
    Fiber& me = *running_;
    me.meeting = Fiber::block;
    me.site = site;
    me.state = Fiber::waiting;
    for (unsigned i = 0; i < count_; ++i) {
      const Fiber& other = *fibers_[i];
      if (other.state == Fiber::done) throw Fault("a thread missed the barrier, " + place(site));
      if (other.state != Fiber::waiting || other.meeting != Fiber::block) {
        leave(me);
        return;
      }
      if (!same(other.site, site)) throw Fault("barriers at different places, " + place(site));
    }
    for (unsigned i = 0; i < count_; ++i) fibers_[i]->state = Fiber::ready;
    leave(me);
  }

 private:
  static bool same(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           std::strcmp(a.file_name(), b.file_name()) == 0;
  }
  static std::string place(const Site& site) {
    return std::string(site.file_name()) + ":" + std::to_string(site.line());
  }

  bool all_there(unsigned mask, const Fiber& me) const {
    const unsigned first = me.number / 32 * 32;
    for (unsigned l = 0; l < 32; ++l) {
      if ((mask >> l & 1u) == 0) continue;
      if (first + l >= count_)
        throw Fault("a mask names lanes that there are not, " + place(me.site));
      const Fiber& other = *fibers_[first + l];
      if (other.state == Fiber::done) {
        throw Fault("a lane ended that others wait for, " + place(me.site));
      }
      if (other.state != Fiber::waiting || other.meeting != Fiber::lanes) return false;
      if (other.mask != mask || !same(other.site, me.site)) {
        if ((other.mask & mask) == mask || !same(other.site, me.site)) {
          throw Fault("lanes meet at different places, " + place(me.site) + " and " +
                      place(other.site));
        }
        return false;
      }
    }
    return true;
  }

  std::string waiting() const {
    std::string out;
    for (unsigned i = 0; i < count_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state == Fiber::waiting) {
        out += "thread " + std::to_string(i) + " at " + place(fiber.site) + "; ";
      }
    }
    return out.substr(0, 500);
  }

  void leave(Fiber& me) { go(me.place, scheduler_); }

  static void enter(unsigned high, unsigned low) {
    auto* block = reinterpret_cast<Block*>(static_cast<std::uintptr_t>(high) << 32 | low);
    try {
      (*block->body_)();
    } catch (...) {
      block->failure_ = std::current_exception();
    }
    block->running_->state = Fiber::done;
    go(block->running_->place, block->scheduler_);  // for good
  }

  void start(unsigned i) {
    Fiber& fiber = *fibers_[i];
    fiber.state = Fiber::ready;
    fiber.meeting = Fiber::none;
    fiber.number = i;
    fiber.place.entered = false;
    getcontext(&fiber.place.context);
    fiber.place.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.place.context.uc_stack.ss_size = kStack;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&fiber.place.context, reinterpret_cast<void (*)()>(&Block::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  unsigned count_ = 0;
  Place scheduler_;
  Fiber* running_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
};

// What a graph is captured to: work to be done at each replay.
using Recording = std::vector<std::function<void()>>;

struct Device {
  Block block;
  Recording* recording = nullptr;  // while a stream is captured
  Order order;
  Index3 block_index, block_size, grid_size;
  unsigned char* shared = nullptr;
  std::int64_t launches = 0;
  cudaError_t last_error = cudaSuccess;  // of a call of the runtime, until somebody asks
};

inline Device& device() {
  static Device& one = *new Device;  // fibers may outlive static objects
  return one;
}

}  // namespace simt

inline cudaError_t cudaGetLastError() {
  return std::exchange(simt::device().last_error, cudaSuccess);
}

namespace simt {

// Sets the order for as long as it lives.
class WithOrder {
 public:
  explicit WithOrder(const Order& order) : before_(device().order) { device().order = order; }
  ~WithOrder() { device().order = before_; }
  WithOrder(const WithOrder&) = delete;
  WithOrder& operator=(const WithOrder&) = delete;

 private:
  Order before_;
};

inline unsigned char* shared_memory() { return device().shared; }

inline void launch(int blocks, int threads, std::size_t shared_bytes,
                   const std::function<void()>& body) {
  Device& d = device();
  if (d.recording != nullptr) {
    d.recording->push_back([=] { launch(blocks, threads, shared_bytes, body); });
    return;
  }
  if (blocks < 1 || threads < 1 || threads > 1024 || shared_bytes > 48 * 1024) {
    throw Fault("no such launch: " + std::to_string(blocks) + " blocks of " +
                std::to_string(threads) + " threads, " + std::to_string(shared_bytes) + " bytes");
  }
  ++d.launches;
  d.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  d.block_size = {static_cast<unsigned>(threads), 1, 1};
  std::vector<unsigned> turns(static_cast<std::size_t>(blocks));
  std::iota(turns.begin(), turns.end(), 0u);
  std::mt19937 random(d.order.seed + static_cast<unsigned>(d.launches));
  if (d.order.kind == Order::reverse) std::reverse(turns.begin(), turns.end());
  if (d.order.kind == Order::random) std::shuffle(turns.begin(), turns.end(), random);
  const std::size_t bytes = (shared_bytes + 15) / 16 * 16;
  const std::unique_ptr<void, void (*)(void*)> shared(
      bytes == 0 ? nullptr : std::aligned_alloc(16, bytes), std::free);
  d.shared = static_cast<unsigned char*>(shared.get());
  for (const unsigned b : turns) {
    d.block_index = {b, 0, 0};
    if (bytes > 0) std::memset(d.shared, 0xff, bytes);
    Order order = d.order;
    order.seed = static_cast<unsigned>(random());
    d.block.run(static_cast<unsigned>(threads), order, body);
  }
  d.shared = nullptr;
}

template <class T>
std::uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// In place of CUB: stable, by the low `bits` bits, ending in either buffer as its passes of 8 bits
// would; everything else that it may write is overwritten.
template <class Key, class Payload>
cudaError_t radix_sort_pairs(void* temp, std::size_t& temp_bytes, Key* const (&keys)[2],
                             Payload* const (&payloads)[2], std::int64_t count, int bits,
                             bool& in_second, cudaStream_t) {
  const std::size_t need = 1000;
  if (temp == nullptr) {
    temp_bytes = need;
    return cudaSuccess;
  }
  if (temp_bytes < need || bits < 1) return cudaErrorInvalidValue;
  in_second = (bits + 7) / 8 % 2 == 1;
  if (device().recording != nullptr) {
    device().recording->push_back(
        [=, k0 = keys[0], k1 = keys[1], p0 = payloads[0], p1 = payloads[1]] {
          Key* const both_keys[2] = {k0, k1};
          Payload* const both_payloads[2] = {p0, p1};
          std::size_t bytes = need;
          bool second = false;
          radix_sort_pairs(temp, bytes, both_keys, both_payloads, count, bits, second, nullptr);
        });
    return cudaSuccess;
  }
  std::memset(temp, 0xee, need);
  const auto n = static_cast<std::size_t>(count);
  const Key mask =
      bits >= static_cast<int>(8 * sizeof(Key)) ? static_cast<Key>(~Key{0}) : (Key{1} << bits) - 1;
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return (keys[0][a] & mask) < (keys[0][b] & mask);
  });
  std::vector<Key> k(n);
  std::vector<Payload> p(n);
  for (std::size_t i = 0; i < n; ++i) {
    k[i] = keys[0][order[i]];
    p[i] = payloads[0][order[i]];
  }
  const int to = in_second ? 1 : 0;
  std::memset(static_cast<void*>(keys[1 - to]), 0xee, n * sizeof(Key));
  std::memset(static_cast<void*>(payloads[1 - to]), 0xee, n * sizeof(Payload));
  std::copy(k.begin(), k.end(), keys[to]);
  std::copy(p.begin(), p.end(), payloads[to]);
  return cudaSuccess;
}

}  // namespace simt

// ------------------------------------------------------------------------- the language's own names

#define threadIdx (::simt::device().block.thread_index())
#define blockIdx (::simt::device().block_index)
#define blockDim (::simt::device().block_size)
#define gridDim (::simt::device().grid_size)

inline unsigned lane_number() { return threadIdx.x % 32u; }

inline void __syncthreads(const simt::Site site = simt::Site::current()) {
  simt::device().block.barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const simt::Site site = simt::Site::current()) {
  simt::device().block.meet(mask, 0, -1, site);
}
inline unsigned __ballot_sync(unsigned mask, bool x,
                              const simt::Site site = simt::Site::current()) {
  return static_cast<unsigned>(simt::device().block.meet(mask, x ? 1 : 0, -1, site));
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32,
              const simt::Site site = simt::Site::current()) {
  const int lane = static_cast<int>(lane_number());
  const int source = (lane & ~(width - 1)) + (from & (width - 1));
  return simt::from_bits<T>(simt::device().block.meet(mask, simt::to_bits(x), source, site));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with, const simt::Site site = simt::Site::current()) {
  const int source = static_cast<int>(lane_number()) ^ with;
  return simt::from_bits<T>(simt::device().block.meet(mask, simt::to_bits(x), source, site));
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by, const simt::Site site = simt::Site::current()) {
  const int lane = static_cast<int>(lane_number());
  const int source = lane >= by ? lane - by : lane;
  return simt::from_bits<T>(simt::device().block.meet(mask, simt::to_bits(x), source, site));
}

template <class T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}
template <class T>
T atomicMin(T* to, T x) {
  const T before = *to;
  *to = std::min(before, x);
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
