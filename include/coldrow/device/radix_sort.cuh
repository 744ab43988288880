// The one thing taken from CUB: its stable radix sort, which alone costs more to compile than the rest.
// Include this header in a single translation unit and instantiate what is used there
// (COLDROW_INSTANTIATE_RADIX_SORT); others see the declarations in sort.cuh.
#pragma once

#include "sort.cuh"

#if !defined(COLDROW_SIMT)
#include <cub/device/device_radix_sort.cuh>
#endif

COLDROW_BEGIN

namespace device {

// Sorts count pairs by bits [0, bits) of their keys, stably. Pairs may end in either pair of arrays:
// in_second says in which. With temp == nullptr only says in temp_bytes what it needs.
template <class Key, class Payload>
cudaError_t radix_sort_pairs(void* temp, std::size_t& temp_bytes, Key* const (&keys)[2],
                             Payload* const (&payloads)[2], std::int64_t count, int bits,
                             bool& in_second, cudaStream_t stream) {
#if defined(COLDROW_SIMT)
  return simt::radix_sort_pairs(temp, temp_bytes, keys, payloads, count, bits, in_second, stream);
#else
  cub::DoubleBuffer<Key> key_buffers(keys[0], keys[1]);
  cub::DoubleBuffer<Payload> payload_buffers(payloads[0], payloads[1]);
  const cudaError_t error =
      cub::DeviceRadixSort::SortPairs(temp, temp_bytes, key_buffers, payload_buffers,
                                      static_cast<std::int32_t>(count), 0, bits, stream);
  in_second = key_buffers.selector == 1;
  if (error == cudaSuccess && key_buffers.selector != payload_buffers.selector) {
    return cudaErrorUnknown;
  }
  return error;
#endif
}

}  // namespace device

#define COLDROW_INSTANTIATE_RADIX_SORT(Key, Payload)                                         \
  template cudaError_t coldrow::device::radix_sort_pairs<Key, Payload>(                      \
      void*, std::size_t&, Key* const(&)[2], Payload* const(&)[2], std::int64_t, int, bool&, \
      cudaStream_t);

COLDROW_END
