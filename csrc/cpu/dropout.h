// The counter-based dropout of ticketops/ops/dropout.py, bit for bit.
#pragma once

#include "cpu/simd.h"

namespace ticketops::TICKETOPS_ISA {

template <typename T>
TICKETOPS_INLINE T mix(T x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The key of a row, from which `drop` derives the random word of each column. A row is a row of a matrix, or one
// query's row of one head's attention weights.
TICKETOPS_INLINE uint32_t row_key(const Dropout& dropout, int64_t row) {
  return mix(static_cast<uint32_t>(row) + static_cast<uint32_t>(dropout.seed)) ^
         static_cast<uint32_t>(dropout.seed >> 32);
}

// The keys of the rows row, row + step, row + 2 step, ..., one in each lane.
TICKETOPS_INLINE Word row_keys(const Dropout& dropout, int64_t row, int64_t step) {
  const Word rows = lanes() * static_cast<uint32_t>(step) + static_cast<uint32_t>(row);
  return mix(rows + static_cast<uint32_t>(dropout.seed)) ^ static_cast<uint32_t>(dropout.seed >> 32);
}

// x where the random words of these counters are at or above the threshold, 0 elsewhere.
TICKETOPS_INLINE Float drop(const Dropout& dropout, Word counters, Float x) {
  return (mix(counters) >> 8) >= dropout.threshold ? x : Float{};
}

// Dropout of the columns column .. column + W - 1 of a row: x where they are kept, 0 elsewhere.
TICKETOPS_INLINE Float drop(const Dropout& dropout, uint32_t key, int64_t column, Float x) {
  return drop(dropout, key + (lanes() + static_cast<uint32_t>(column)) * 0x9E3779B9u, x);
}

// Dropout of one column of W rows.
TICKETOPS_INLINE Float drop(const Dropout& dropout, Word keys, int64_t column, Float x) {
  return drop(dropout, keys + static_cast<uint32_t>(column) * 0x9E3779B9u, x);
}

}  // namespace ticketops::TICKETOPS_ISA
