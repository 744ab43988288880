// Who works on which tables. Calls release the GIL while they run, so two threads can meet in one table:
// readers may, one who writes waits for the others, and they for him.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <vector>

namespace coldrow_module {

class Claim {
 public:
  struct Range {
    const char *begin, *end;
  };

  // Waits, without the GIL, until the memory is free for this use.
  Claim(std::vector<Range> ranges, bool write) : ranges_(std::move(ranges)), write_(write) {
    Board& b = board();
    {
      const std::lock_guard lock(b.mutex);
      if (!taken(b)) {
        b.active.push_back(this);
        return;
      }
    }
    const nanobind::gil_scoped_release release;  // taken back after the mutex is given back
    std::unique_lock lock(b.mutex);
    b.freed.wait(lock, [&] { return !taken(b); });
    b.active.push_back(this);
  }

  ~Claim() {
    Board& b = board();
    {
      const std::lock_guard lock(b.mutex);
      b.active.erase(std::remove(b.active.begin(), b.active.end(), this), b.active.end());
    }
    b.freed.notify_all();
  }

  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

  // In a forked child: the threads that held claims are not there.
  static void forget_all() { new (&board()) Board; }

 private:
  struct Board {
    std::mutex mutex;
    std::condition_variable freed;
    std::vector<const Claim*> active;
  };

  static Board& board() {
    static Board* const b = new Board;  // never destroyed: threads may outlive the module
    return *b;
  }

  bool taken(const Board& b) const {
    return std::any_of(b.active.begin(), b.active.end(), [&](const Claim* other) {
      if (!write_ && !other->write_) return false;
      for (const Range& mine : ranges_) {
        for (const Range& theirs : other->ranges_) {
          if (mine.begin < theirs.end && theirs.begin < mine.end) return true;
        }
      }
      return false;
    });
  }

  std::vector<Range> ranges_;
  bool write_;
};

}  // namespace coldrow_module
