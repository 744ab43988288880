// The extension module coldrow._core: checks arguments, then calls the kernels of this machine.
//
// Two front doors, one engine: TableBatch (several tables and features, pooled or not) and the
// functional apply/read, which are a batch of one table whose every index is a bag of its own.
// Everything is checked before anything is written.
#include "module.hpp"

#include <pthread.h>

#include <cstdlib>

#include "call.hpp"

namespace coldrow_module {

const char* const kMemory = "CPU memory";

void require_reachable(const char* name, int device_type, int device_id) {
  if (device_type == nb::device::cpu::value || device_type == 3 /* pinned host memory */) return;
  const std::string place = device_type == nb::device::cuda::value
                                ? "cuda:" + std::to_string(device_id)
                                : "device type " + std::to_string(device_type);
  throw nb::value_error(
      (std::string(name) + ": is on " + place + ", accepted: cpu, as the arrays before it")
          .c_str());
}

NB_MODULE(_core, m) {
  m.doc() = "Compiled part of coldrow. Private: use the functions and classes of `coldrow`.";
  // Caches and modules still alive at exit are no leak; the leak tests ask for the report.
  nb::set_leak_warnings(std::getenv("COLDROW_LEAK_WARNINGS") != nullptr);
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    Claim::forget_all();
  });
  bind_update(m);
  bind_functional(m);
  bind_table_batch(m);
  bind_reference(m);
  bind_runtime(m);
}

}  // namespace coldrow_module
