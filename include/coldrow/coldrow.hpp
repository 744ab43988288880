// All of coldrow that host and device code share, and the host drivers.
//
//   numeric/  storage types, conversion, random bits       policy/  optimizer, decay, rounding
//   row/      the one formula, over a group of threads      table/   views of tables and batches
//   host/     sort, update and lookup over many rows, and over several tables in one call
#pragma once

#include "host/apply.hpp"
#include "host/lookup.hpp"
#include "host/rows.hpp"
#include "host/table_batch.hpp"
#include "host/update_of.hpp"
#include "policy/any_decay.hpp"
#include "row/update.hpp"
