// The sort of a batch's entries, without CUB's headers: radix_sort.cuh has the definition.
#pragma once

#include "segment.cuh"

COLDROW_BEGIN

namespace device {

template <class Key, class Payload>
cudaError_t radix_sort_pairs(void* temp, std::size_t& temp_bytes, Key* const (&keys)[2],
                             Payload* const (&payloads)[2], std::int64_t count, int bits,
                             bool& in_second, cudaStream_t stream);

// Calls f(key, payload) with values of the types that a batch's entries have.
template <class F>
auto with_entry_types(const Extent& e, const F& f) {
  // (A scaled payload is moved as 8 bytes; what is in them is nobody's business here.)
  if (wide_keys(e)) return f(std::uint64_t{}, std::uint64_t{});
  if (scaled_payloads(e)) return f(std::uint32_t{}, std::uint64_t{});
  return f(std::uint32_t{}, std::uint32_t{});
}

// Bytes of temporary memory for the sort of such a batch.
inline cudaError_t radix_sort_bytes(const Extent& e, std::size_t& bytes) {
  bytes = 0;
  if (e.positions == 0) return cudaSuccess;
  return with_entry_types(e, [&](auto key, auto payload) {
    decltype(key)* const keys[2] = {nullptr, nullptr};
    decltype(payload)* const payloads[2] = {nullptr, nullptr};
    bool in_second = false;
    return radix_sort_pairs(nullptr, bytes, keys, payloads, e.positions, key_bits(e), in_second,
                            nullptr);
  });
}

// Step two: sorts space.entries[0]; returns where the sorted entries are.
inline Entries sort_entries(Queue& queue, const Extent& e, const SegmentSpace& space) {
  bool in_second = false;
  if (e.positions > 0 && queue.error == cudaSuccess) {
    queue.add(with_entry_types(e, [&](auto key, auto payload) {
      using Key = decltype(key);
      using Payload = decltype(payload);
      Key* const keys[2] = {static_cast<Key*>(space.entries[0].keys),
                            static_cast<Key*>(space.entries[1].keys)};
      Payload* const payloads[2] = {static_cast<Payload*>(space.entries[0].payloads),
                                    static_cast<Payload*>(space.entries[1].payloads)};
      std::size_t bytes = space.sort_temp_bytes;
      return radix_sort_pairs(space.sort_temp, bytes, keys, payloads, e.positions, key_bits(e),
                              in_second, queue.stream);
    }));
  }
  return space.entries[in_second ? 1 : 0];
}

// From a checked batch to its runs: all three steps. Returns the sorted entries.
inline Entries segment(Queue& queue, const Batch& batch, const Layout& layout, const Extent& e,
                       const SegmentSpace& space, const Report* report) {
  linearise(queue, batch, layout, e, space, report);
  const Entries sorted = sort_entries(queue, e, space);
  find_runs(queue, layout, e, sorted, space, report);
  return sorted;
}

}  // namespace device

COLDROW_END
