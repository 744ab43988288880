#include "tensor.hpp"

#include <cstring>
#include <unordered_map>

namespace coldrow_module {
namespace {

using nb::dlpack::dltensor;
using nb::dlpack::dtype_code;

// The DLPack C exchange API, https://dmlc.github.io/dlpack: a table of C functions that a tensor
// type publishes. Only the layout of version 1 is used; only one function is called.
struct ExchangeApi {
  std::uint32_t major, minor;
  const ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, dltensor* out);
  void* current_stream;
};

const ExchangeApi* find_exchange_api(PyTypeObject* type) {
  nb::object capsule = nb::steal(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!capsule.is_valid() || !PyCapsule_CheckExact(capsule.ptr())) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) PyErr_Clear();
  return api != nullptr && api->major == 1 && api->view_from_object != nullptr ? api : nullptr;
}

// Looked up once per type. The types are kept alive, so that an address is never reused.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  static auto* known = new std::unordered_map<PyTypeObject*, const ExchangeApi*>();
  const auto found = known->find(type);
  if (found != known->end()) return found->second;
  Py_INCREF(type);
  return (*known)[type] = find_exchange_api(type);
}

std::string python_type_name(nb::handle h) { return nb::cast<std::string>(nb::str(h.type())); }

constexpr nb::dlpack::dtype type_of(dtype_code code, std::uint8_t bits) {
  return {static_cast<std::uint8_t>(code), bits, 1};
}
constexpr auto kFloat32 = type_of(dtype_code::Float, 32), kFloat16 = type_of(dtype_code::Float, 16);
constexpr auto kBfloat16 = type_of(dtype_code::Bfloat, 16);
constexpr auto kInt32 = type_of(dtype_code::Int, 32), kInt64 = type_of(dtype_code::Int, 64);

void fill(Array& a, const dltensor& t) {
  require_reachable(a.name, t.device.device_type, t.device.device_id);
  a.device = t.device.device_id;
  if (t.ndim > 4) {
    throw nb::value_error((std::string(a.name) + ": has " + std::to_string(t.ndim) +
                           " dimensions, accepted: at most 2")
                              .c_str());
  }
  a.dtype = t.dtype;
  a.item_size = t.dtype.bits * t.dtype.lanes / 8;
  a.ndim = t.ndim;
  std::int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    a.shape[i] = t.shape[i];
    a.strides[i] = t.strides != nullptr ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  a.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  if (a.data == nullptr && a.size() > 0) {
    throw nb::value_error((std::string(a.name) +
                           ": has no memory behind it (a fake or meta tensor?), accepted: an array "
                           "in " +
                           kMemory)
                              .c_str());
  }
  if (a.size() > 0 && a.item_size > 0 &&
      reinterpret_cast<std::uintptr_t>(a.data) % a.item_size != 0) {
    throw nb::value_error((std::string(a.name) +
                           ": is not aligned to its element size, accepted: aligned memory (copy "
                           "it first)")
                              .c_str());
  }
  for (int i = 0; i < a.ndim; ++i) {
    if (a.strides[i] == 0 && a.shape[i] > 1 && a.size() > 0) {
      throw nb::value_error((std::string(a.name) + ": has stride 0 in dimension " +
                             std::to_string(i) +
                             " (a broadcast or expanded array), accepted: an array whose elements "
                             "are distinct; copy it first")
                                .c_str());
    }
  }
}

template <class NdArray>
bool fill_from_ndarray(Array& a, nb::handle object) {
  NdArray array;
  if (!nb::try_cast<NdArray>(object, array, false)) return false;
  std::int64_t shape[4], strides[4];
  const int ndim = static_cast<int>(array.ndim());
  for (int i = 0; i < ndim && i < 4; ++i) {
    shape[i] = static_cast<std::int64_t>(array.shape(i));
    strides[i] = array.stride(i);
  }
  dltensor t;
  t.data = const_cast<void*>(static_cast<const void*>(array.data()));
  t.device = {array.device_type(), array.device_id()};
  t.ndim = ndim;
  t.dtype = array.dtype();
  t.shape = shape;
  t.strides = strides;
  fill(a, t);
  a.owner = nb::borrow(object);
  return true;
}

// A buffer's strides may be left out although they were asked for (NumPy's datetime64 scalars do so),
// and nanobind would read through the null pointer. A memoryview of it has them.
nb::object as_memoryview_if_only_a_buffer(nb::handle object) {
  if (nb::hasattr(object, "__dlpack__")) return nb::borrow(object);
  nb::object view = nb::steal(PyMemoryView_FromObject(object.ptr()));
  if (view.is_valid()) return view;
  PyErr_Clear();
  return nb::borrow(object);
}

// NumPy exports no bfloat16 (an ml_dtypes extension type) over DLPack: look at its bits instead.
nb::object as_bits_if_bfloat16(nb::handle object) {
  if (!nb::hasattr(object, "dtype") || !nb::hasattr(object, "view")) return {};
  nb::object dtype = object.attr("dtype");
  if (!nb::hasattr(dtype, "name")) return {};
  nb::object name = dtype.attr("name");
  if (!nb::isinstance<nb::str>(name) || nb::cast<std::string>(name) != "bfloat16") return {};
  return object.attr("view")("uint16");
}

}  // namespace

std::string Array::dtype_name() const {
  std::string name;
  switch (static_cast<dtype_code>(dtype.code)) {
    case dtype_code::Int:
      name = "int";
      break;
    case dtype_code::UInt:
      name = "uint";
      break;
    case dtype_code::Float:
      name = "float";
      break;
    case dtype_code::Bfloat:
      name = "bfloat";
      break;
    case dtype_code::Complex:
      name = "complex";
      break;
    case dtype_code::Bool:
      return "bool";
    default:
      return "dtype code " + std::to_string(dtype.code);
  }
  name += std::to_string(dtype.bits);
  if (dtype.lanes != 1) name += "x" + std::to_string(dtype.lanes);
  return name;
}

std::int64_t Array::size() const {
  std::int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool Array::contiguous() const {
  std::int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != dense) return size() == 0;
    dense *= shape[i];
  }
  return true;
}

std::string Array::describe() const {
  std::string s = dtype_name() + "[";
  for (int i = 0; i < ndim; ++i) s += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

void Array::require_shape(std::initializer_list<std::int64_t> want, const char* what) const {
  bool ok = static_cast<int>(want.size()) == ndim;
  int i = 0;
  for (const std::int64_t n : want) {
    ok = ok && (n < 0 || shape[i] == n);
    ++i;
  }
  if (!ok) {
    std::string sizes;
    i = 0;
    for (const std::int64_t n : want) {
      sizes += (i++ > 0 ? ", " : "") + (n < 0 ? std::string("any") : std::to_string(n));
    }
    throw nb::value_error((std::string(name) + ": got " + describe() + ", accepted: shape [" +
                           sizes + "] (" + what + ")")
                              .c_str());
  }
}

void Array::require_contiguous() const {
  if (!contiguous()) {
    throw nb::value_error((std::string(name) + ": " + describe() +
                           " is not contiguous, accepted: a contiguous (row-major) array")
                              .c_str());
  }
}

NumericType Array::numeric() const {
  if (dtype == kFloat32) return NumericType::float32;
  if (dtype == kFloat16) return NumericType::float16;
  if (dtype == kBfloat16) return NumericType::bfloat16;
  throw nb::type_error(
      (std::string(name) + ": got dtype " + dtype_name() + ", accepted: float32, float16, bfloat16")
          .c_str());
}

IndexType Array::integer() const {
  if (dtype == kInt32) return IndexType::i32;
  if (dtype == kInt64) return IndexType::i64;
  throw nb::type_error(
      (std::string(name) + ": got dtype " + dtype_name() + ", accepted: int32, int64").c_str());
}

void Array::require_dtype(const char* accepted) const {
  if (dtype_name() != accepted) {
    throw nb::type_error(
        (std::string(name) + ": got dtype " + dtype_name() + ", accepted: " + accepted).c_str());
  }
}

Array take_array(nb::handle given, const char* name, Access access) {
  Array a;
  a.name = name;
  if (const ExchangeApi* api = exchange_api(Py_TYPE(given.ptr()))) {
    dltensor t;
    if (api->view_from_object(given.ptr(), &t) != 0) {
      PyErr_Clear();
      const nb::str device(nb::object(given.attr("device")));
      throw nb::value_error((std::string(name) + ": has no memory to be read (device " +
                             device.c_str() + "), accepted: an array in " + kMemory)
                                .c_str());
    }
    fill(a, t);
    return a;
  }
  if (nb::object bits = as_bits_if_bfloat16(given); bits.is_valid()) {
    a = take_array(bits, name, access);
    a.dtype = kBfloat16;
    return a;
  }
  const std::string type = python_type_name(given);
  const nb::object object = as_memoryview_if_only_a_buffer(given);
  // A torch too old for the exchange API exports no tensor that requires grad; its callers here
  // have checked that writing is meant.
  if (type.find("torch") != std::string::npos && nb::hasattr(object, "detach")) {
    const nb::object detached = object.attr("detach")();
    if (fill_from_ndarray<nb::ndarray<>>(a, detached)) return a;
  }
  if (access == Access::write && type.find("jax") != std::string::npos) {
    throw nb::type_error((std::string(name) + ": got " + type +
                          ", which is immutable, accepted: a writable array (torch, NumPy, CuPy)")
                             .c_str());
  }
  const bool is_array = nb::ndarray_check(object);
  const bool taken =
      is_array && (access == Access::write ? fill_from_ndarray<nb::ndarray<>>(a, object)
                                           : fill_from_ndarray<nb::ndarray<nb::ro>>(a, object));
  if (!taken) {
    Array readable;
    readable.name = name;
    if (is_array && access == Access::write &&
        fill_from_ndarray<nb::ndarray<nb::ro>>(readable, object)) {
      throw nb::value_error(
          (std::string(name) + ": is read-only, accepted: a writable array").c_str());
    }
    throw nb::type_error((std::string(name) + ": got " + type +
                          ", accepted: a torch tensor, or a NumPy, CuPy or other DLPack array")
                             .c_str());
  }
  return a;
}

void require_disjoint(const Array& a, const Array& b) {
  if (a.size() == 0 || b.size() == 0) return;
  const auto low = [](const Array& x) {
    auto p = reinterpret_cast<std::intptr_t>(x.data);
    for (int i = 0; i < x.ndim; ++i) {
      if (x.strides[i] < 0) p += x.strides[i] * (x.shape[i] - 1) * x.item_size;
    }
    return p;
  };
  const auto high = [](const Array& x) {
    auto p = reinterpret_cast<std::intptr_t>(x.data) + x.item_size;
    for (int i = 0; i < x.ndim; ++i) {
      if (x.strides[i] > 0) p += x.strides[i] * (x.shape[i] - 1) * x.item_size;
    }
    return p;
  };
  if (high(a) <= low(b) || high(b) <= low(a)) return;
  if (a.ndim == 1 && b.ndim == 1 && a.strides[0] != 0 &&
      a.strides[0] * a.item_size == b.strides[0] * b.item_size) {
    const std::int64_t stride = std::abs(a.strides[0] * a.item_size);
    const std::int64_t apart =
        ((low(b) - low(a)) % stride + stride) % stride;  // of b's elements after a's
    if (apart >= a.item_size && apart + b.item_size <= stride) return;
  }
  throw nb::value_error((std::string(a.name) + " and " + b.name +
                         ": share memory, accepted: arrays that do not overlap")
                            .c_str());
}

}  // namespace coldrow_module
