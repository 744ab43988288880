// The sorts of a batch's entries. CUB is in this translation unit alone.
#include <coldrow/device/radix_sort.cuh>

COLDROW_INSTANTIATE_RADIX_SORT(std::uint32_t, std::uint32_t)
COLDROW_INSTANTIATE_RADIX_SORT(std::uint32_t, std::uint64_t)
COLDROW_INSTANTIATE_RADIX_SORT(std::uint64_t, std::uint64_t)
