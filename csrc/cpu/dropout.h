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

// What the words of one row (of one head's attention weights, or of a matrix) have in common.
TICKETOPS_INLINE uint32_t row_key(const Dropout& dropout, int64_t row) {
  return mix(static_cast<uint32_t>(row) + static_cast<uint32_t>(dropout.seed)) ^
         static_cast<uint32_t>(dropout.seed >> 32);
}

// The same for the rows `row`, `row` + step, ..., one a lane.
TICKETOPS_INLINE Word row_keys(const Dropout& dropout, int64_t row, int64_t step) {
  const Word rows = lanes() * static_cast<uint32_t>(step) + static_cast<uint32_t>(row);
  return mix(rows + static_cast<uint32_t>(dropout.seed)) ^ static_cast<uint32_t>(dropout.seed >> 32);
}

// x where the words of these counters keep it, 0 elsewhere.
TICKETOPS_INLINE Float drop(const Dropout& dropout, Word counters, Float x) {
  return (mix(counters) >> 8) >= dropout.threshold ? x : Float{};
}

// x where the columns `column` .. `column` + W - 1 of the row are kept, 0 elsewhere.
TICKETOPS_INLINE Float drop(const Dropout& dropout, uint32_t key, int64_t column, Float x) {
  return drop(dropout, key + (lanes() + static_cast<uint32_t>(column)) * 0x9E3779B9u, x);
}

// The same for one column of W rows.
TICKETOPS_INLINE Float drop(const Dropout& dropout, Word keys, int64_t column, Float x) {
  return drop(dropout, keys + static_cast<uint32_t>(column) * 0x9E3779B9u, x);
}

}  // namespace ticketops::TICKETOPS_ISA
