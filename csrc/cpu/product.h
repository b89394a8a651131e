// Register-tiled matrix products of float32, c = a b. The left operand is read in place, without packing.
#pragma once

#include "cpu/simd.h"

namespace ticketops::TICKETOPS_ISA {

TICKETOPS_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// The left operand of a product: element (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;

  TICKETOPS_INLINE float at(int64_t i, int64_t k) const { return data[i * row + k * column]; }
  TICKETOPS_INLINE Left below(int64_t rows) const { return {data + rows * row, row, column}; }
  // Called for every k of a tile of `rows` rows. Operands in main memory override it to prefetch later rows.
  TICKETOPS_INLINE void fetch(int64_t /*rows*/, int64_t /*k*/) const {}
  TICKETOPS_INLINE static Float multiply_add(float left, Float right, Float total) { return left * right + total; }
};

#ifdef __AVX512BF16__
// The same, but each element of both operands is a pair of bfloat16 numbers: the sum of the pairs' two products is
// added.
struct Pairs : Left {
  TICKETOPS_INLINE Pairs below(int64_t rows) const { return {Left::below(rows)}; }
  TICKETOPS_INLINE static Float multiply_add(float left, Float right, Float total) {
    // Broadcast by a copy of the bits: `left` is a pair, not a float32 to compute with.
    const Float both = _mm512_set1_ps(left);
    return _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(right));
  }
};
#endif

// c[i][j] = (add ? c[i][j] : 0) + sum_k a(i, k) b[k][j] for R rows and V vectors of columns, held in registers.
template <int R, int V, bool add, typename A>
TICKETOPS_INLINE void product_tile(A a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  Float total[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    a.fetch(R, k);
    Float right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_row + v * W);
    for (int r = 0; r < R; ++r) {
      const float left = a.at(r, k);
      for (int v = 0; v < V; ++v) total[r][v] = A::multiply_add(left, right[v], total[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* p = c + r * c_row + v * W;
      store(p, add ? load(p) + total[r][v] : total[r][v]);
    }
}

// Rows of a tile of V vectors of columns. The tile's sums, V vectors of `b` and one element of `a` must fit into the
// registers: 32 with AVX-512, otherwise 16.
template <int V>
constexpr int tile_rows = W == 16 ? (V == 4 ? 6 : V == 3 ? 8 : V == 2 ? 12 : 16) : (V == 2 ? 6 : 10);

// One panel of V vectors of columns: full tiles of R rows, then one smaller tile of the remaining rows.
template <int V, bool add, int R = tile_rows<V>, typename A>
void product_panel(int64_t rows, A a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth) {
  for (; rows >= R; rows -= R, a = a.below(R), c += R * c_row)
    product_tile<R, V, add>(a, b, b_row, c, c_row, depth);
  if constexpr (R > 1)
    if (rows) product_panel<V, add, R - 1>(rows, a, b, b_row, c, c_row, depth);
}

// c = (add ? c : 0) + a b with `columns` a multiple of W, in panels as wide as the registers allow.
template <bool add, typename A = Left>
void product(int64_t rows, int64_t columns, int64_t depth, A a, const float* b, int64_t b_row, float* c,
             int64_t c_row) {
  constexpr int widest = W == 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + widest * W <= columns; j += widest * W)
    product_panel<widest, add>(rows, a, b + j, b_row, c + j, c_row, depth);
  const int64_t left = (columns - j) / W;
  if constexpr (W == 16) {
    if (left == 3) product_panel<3, add>(rows, a, b + j, b_row, c + j, c_row, depth);
    if (left == 2) product_panel<2, add>(rows, a, b + j, b_row, c + j, c_row, depth);
  }
  if (left == 1) product_panel<1, add>(rows, a, b + j, b_row, c + j, c_row, depth);
}

}  // namespace ticketops::TICKETOPS_ISA
