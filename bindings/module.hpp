// What each file of this folder adds to the module coldrow._core.
#pragma once

#include <nanobind/nanobind.h>

namespace coldrow_module {

void bind_functional(nanobind::module_& m);   // functional.cpp: apply, apply_steps, read, factor
void bind_table_batch(nanobind::module_& m);  // table_batch.cpp: TableBatch
void bind_reference(nanobind::module_& m);  // reference.cpp: reference_apply, reference_read_factor
void bind_runtime(nanobind::module_& m);    // runtime.cpp: HeldTables, pages, threads, builds

}  // namespace coldrow_module
