// A warp on the host: lanes that meet in sum(). Between two meetings the lanes run one after the
// other, each as far as it gets, which is one of the orders that a GPU may choose. Only one lane
// runs at a time, so a row update that relies on another order gives a wrong result here, always.
#pragma once

#include <deque>
#include <ostream>
#include <semaphore>
#include <thread>
#include <vector>

namespace coldrow_test {

enum class LaneOrder { first_lane_first, last_lane_first };
inline void PrintTo(LaneOrder order, std::ostream* out) {
  *out << (order == LaneOrder::first_lane_first ? "first lane first" : "last lane first");
}

class HostWarp {
 public:
  // What one lane sees; a coldrow::Group.
  template <int Block>
  struct Lane {
    static constexpr int block = Block;
    HostWarp* warp;
    int number;
    int rank() const { return number; }
    int size() const { return warp->size_; }
    float sum(float x) const { return warp->meet(number, x); }
  };

  explicit HostWarp(int size, LaneOrder order = LaneOrder::first_lane_first)
      : size_(size), order_(order), given_(static_cast<std::size_t>(size)) {}

  // Runs body(group) in every lane.
  template <int Block, class Body>
  void run(const Body& body) {
    turns_.clear();
    for (int place = 0; place < size_; ++place) turns_.emplace_back(place == 0 ? 1 : 0);
    std::vector<std::thread> threads;
    for (int place = 0; place < size_; ++place) {
      threads.emplace_back([this, place, &body] {
        wait(place);
        body(Lane<Block>{this, turned(place)});
        pass(place);
      });
    }
    for (std::thread& t : threads) t.join();
  }

 private:
  // From a lane's place in the order to its number, and back.
  int turned(int i) const { return order_ == LaneOrder::first_lane_first ? i : size_ - 1 - i; }

  float meet(int number, float x) {
    const int place = turned(number);
    given_[static_cast<std::size_t>(number)] = x;
    if (place == size_ - 1) total_ = butterfly();
    pass(place);
    wait(place);
    return total_;
  }

  // The order of a warp's shuffles: x[i] += x[i xor distance], from the largest distance on.
  float butterfly() const {
    std::vector<float> x = given_;
    for (int distance = size_ / 2; distance > 0; distance /= 2) {
      const std::vector<float> old = x;
      for (int i = 0; i < size_; ++i) {
        x[static_cast<std::size_t>(i)] += old[static_cast<std::size_t>(i ^ distance)];
      }
    }
    return x[0];
  }

  void wait(int place) { turns_[static_cast<std::size_t>(place)].acquire(); }
  void pass(int place) { turns_[static_cast<std::size_t>((place + 1) % size_)].release(); }

  int size_;
  LaneOrder order_;
  std::vector<float> given_;
  float total_ = 0.0f;
  std::deque<std::binary_semaphore> turns_;
};

}  // namespace coldrow_test
