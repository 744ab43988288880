// Who works on which tables, pages, threads, builds: what Python asks of the running module.
#include <sys/mman.h>

#include <memory>

#include "call.hpp"
#include "module.hpp"

namespace coldrow_module {
namespace {

using namespace nb::literals;

// A claim on tables while Python code works on them: with HeldTables(weights, write): ...
class HeldTables {
 public:
  HeldTables(nb::sequence weights, bool write) : write_(write) {
    for (nb::handle weight : weights) {
      AnyTable table{};
      Call call;
      take_weight(call, table, weight, write ? Access::write : Access::read);
      call.tables.push_back(table);
      const auto range = memory_of(call);
      ranges_.insert(ranges_.end(), range.begin(), range.end());
    }
  }
  void enter() { claim_ = std::make_unique<Claim>(ranges_, write_); }
  void exit() { claim_.reset(); }

 private:
  std::vector<Claim::Range> ranges_;
  bool write_;
  std::unique_ptr<Claim> claim_;
};

// From two such pages on. A system that has none, or does not grant them, is no error.
bool advise_huge_pages(nb::handle array) {
  const Array a = take_array(array, "array", Access::write);
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(a.data);
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(a.size() * a.item_size);
  const std::uintptr_t from = (begin + kPage - 1) / kPage * kPage, to = end / kPage * kPage;
#if defined(MADV_HUGEPAGE)
  return a.contiguous() && to > from + kPage &&
         madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace

void bind_runtime(nb::module_& m) {
  nb::class_<HeldTables>(m, "HeldTables",
                         "Tables that other threads' calls leave alone while this is entered.")
      .def(nb::init<nb::sequence, bool>(), "weights"_a, "write"_a)
      .def("__enter__", [](HeldTables& held) { held.enter(); })
      .def("__exit__", [](HeldTables& held, nb::args) { held.exit(); });

  m.def("advise_huge_pages", &advise_huge_pages, "array"_a.none(),
        "Ask for 2 MiB pages under an array's memory, before it is first written; whether it was "
        "granted.");
  m.def("threads", [] { return threads_for(INT_MAX, 1); }, "Threads a large call would use now.");
  m.def(
      "builds",
      [] {
        std::vector<std::string> names;
        for (auto k = available_kernels(); *k != nullptr; ++k) names.push_back((*k)->name);
        return names;
      },
      "Instruction-set builds this machine can run, best first.");
  m.def("build", [] { return std::string(kernels->name); }, "The build in use.");
  m.def(
      "use_build",
      [](const std::string& name) {
        for (auto k = available_kernels(); *k != nullptr; ++k) {
          if (name == (*k)->name) {
            kernels = *k;
            return;
          }
        }
        bad_value("build: got '" + name + "', accepted: one of builds()");
      },
      "name"_a, "Use another build; results do not change. For tests.");
}

}  // namespace coldrow_module
