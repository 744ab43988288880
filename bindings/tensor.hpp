// Arrays from Python, without copying: torch through its DLPack C exchange API, everything else
// that speaks DLPack or the buffer protocol through nanobind.
//
// An Array is only a view; the Python object must outlive it. Every check throws an exception that
// names the argument, what was given and what is accepted.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "kernels.hpp"

namespace coldrow_module {

namespace nb = nanobind;

enum class Access { read, write };

struct Array {
  const char* name = "";
  void* data = nullptr;
  nb::dlpack::dtype dtype{};
  int ndim = 0;
  std::int64_t shape[4] = {};
  std::int64_t strides[4] = {};  // in elements
  std::int64_t item_size = 0;
  int device = 0;    // number of the device, where the module's arrays are on one
  nb::object owner;  // keeps a borrowed view alive

  std::int64_t size() const;
  bool contiguous() const;
  std::string dtype_name() const;  // "float32", "bfloat16", ...
  std::string describe() const;    // "float32[10, 4]"

  // Throw unless the array is what is asked for.
  void require_shape(std::initializer_list<std::int64_t> shape, const char* what) const;  // -1: any
  void require_contiguous() const;
  NumericType numeric() const;  // float32, float16, bfloat16
  IndexType integer() const;    // int32, int64
  void require_dtype(const char* accepted) const;
};

// Which memory the kernels of this module work in: each module defines both. device_type and
// device_id are DLPack's; require_reachable() throws unless the kernels can follow such pointers.
extern const char* const kMemory;
void require_reachable(const char* name, int device_type, int device_id);

Array take_array(nb::handle object, const char* name, Access access);

// Throws ValueError if two arrays share a byte. 1-D arrays interleaved with equal strides may share
// a range without sharing a byte.
void require_disjoint(const Array& a, const Array& b);

}  // namespace coldrow_module
