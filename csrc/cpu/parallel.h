// Parallel loops over tasks, and sums of rows that do not depend on the number of threads.
#pragma once

#include "cpu/simd.h"
#include "cpu/threads.h"

namespace ticketops::TICKETOPS_ISA {

TICKETOPS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// x, which starts at element `i` of a row of n elements, with zeros in the lanes after the row's end.
TICKETOPS_INLINE Float valid(int64_t i, int64_t n, Float x) {
  return i + W <= n ? x : lanes() < static_cast<uint32_t>(n - i) ? x : Float{};
}

// Calls body(task, thread) for every task.
template <typename F>
TICKETOPS_INLINE void parallel(int64_t tasks, int threads, F body) {
  run_tasks(tasks, threads, [](void* context, int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); },
            &body);
}

// sums[j] = sum over i < rows of table[i * stride + j], in order, for j < columns.
TICKETOPS_INLINE void sum_rows(const float* table, int64_t rows, int64_t stride, int64_t columns, float* sums,
                               int threads) {
  constexpr int64_t block = 256;
  parallel((columns + block - 1) / block, threads, [=](int64_t task, int) {
    const int64_t first = task * block;
    for_row(min(block, columns - first), [&](int64_t i, auto load, auto store) {
      Float total{};
      for (int64_t row = 0; row < rows; ++row) total += load(table + row * stride + first);
      store(sums + first, total);
      (void)i;
    });
  });
}

}  // namespace ticketops::TICKETOPS_ISA
