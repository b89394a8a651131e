// Matrix products with AMX, in tiles of 16 rows of 16 pairs of bfloat16.
#pragma once

#include "cpu/simd.h"

namespace ticketops::TICKETOPS_ISA {

constexpr int64_t tile = 16;

TICKETOPS_INLINE int64_t whole(int64_t n, int64_t part) { return (n + part - 1) / part * part; }

// Configures the thread's tile registers as 16 rows of 64 bytes, and releases them when destroyed.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    // In GCC before 14 (and 11.5, 12.4, 13.3) the intrinsic declares a read of the first eight bytes only, so the
    // compiler may drop the stores to the other bytes. This makes it keep them.
    asm volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
};

// c = (add ? c : 0) + a b, with `a` [rows][pairs], `b` [pairs][V tiles of columns].
template <int V, bool add>
void tile_panel(int64_t rows, int64_t pairs, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                int64_t c_row) {
  // With one tile of pairs, tiles 3 and 4 serve all rows.
  const bool right_stays = pairs == tile;
  for (int64_t i = 0; i < rows; i += tile, a += tile * a_row, c += tile * c_row) {
    if constexpr (add) {
      _tile_loadd(0, c, c_row * 4);
      if constexpr (V == 2) _tile_loadd(1, c + tile, c_row * 4);
    } else {
      _tile_zero(0);
      if constexpr (V == 2) _tile_zero(1);
    }
    for (int64_t k = 0; k < pairs; k += tile) {
      _tile_loadd(2, a + k, a_row * 4);
      if (!right_stays || !i) {
        _tile_loadd(3, b + k * b_row, b_row * 4);
        if constexpr (V == 2) _tile_loadd(4, b + k * b_row + tile, b_row * 4);
      }
      _tile_dpbf16ps(0, 2, 3);
      if constexpr (V == 2) _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, c, c_row * 4);
    if constexpr (V == 2) _tile_stored(1, c + tile, c_row * 4);
  }
}

// The same for any multiple of 16 rows, columns and pairs.
template <bool add = false>
void tile_product(int64_t rows, int64_t columns, int64_t pairs, const float* a, int64_t a_row, const float* b,
                  int64_t b_row, float* c, int64_t c_row) {
  // The compiler does not know that the intrinsics read memory: finish all stores before.
  asm volatile("" ::: "memory");
  int64_t j = 0;
  for (; j + 2 * tile <= columns; j += 2 * tile) tile_panel<2, add>(rows, pairs, a, a_row, b + j, b_row, c + j, c_row);
  if (j < columns) tile_panel<1, add>(rows, pairs, a, a_row, b + j, b_row, c + j, c_row);
}

// Writes zeros to a matrix whose number of columns is a multiple of W.
TICKETOPS_INLINE void zero(float* matrix, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += W) store(matrix + i * stride + j, Float{});
}

}  // namespace ticketops::TICKETOPS_ISA
