// The device drivers. In order, all on one stream:
//
//   forward    begin_batch, check_batch, [prepare_reads], lookup per weight type, finish_batch
//   backward   begin_batch, check_batch, prepare_updates, segment, sum_long_runs,
//              [apply with a checking Pass], apply per Update type, finish_batch with the clock
//
// The host gives memory and sizes and waits for nothing. table_batch.cuh has this sequence as calls.
#pragma once

#include "apply.cuh"
#include "lookup.cuh"
#include "sort.cuh"
#include "table_batch.cuh"
