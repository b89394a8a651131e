// What a layer's matrix products and kernels leave over: sums of two dtypes, the sums of a matrix's columns (a bias's
// gradient), dropout, and rows added up in a table (an embedding's gradient).
#include "cpu/dropout.h"
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {

template <typename A, typename B>
void add(const Add& args) {
  constexpr int64_t chunk = 16;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int) {
    const int64_t end = min((task + 1) * chunk, args.rows);
    for (int64_t row = task * chunk; row < end; ++row) {
      A* total = static_cast<A*>(args.total) + row * args.columns;
      const B* x = static_cast<const B*>(args.x) + row * args.x_row;
      for_row(args.columns, [&](int64_t i, auto load, auto store) {
        fetch<true>(total + i + args.columns);
        fetch(x + i + args.x_row);
        store(total, load(total) + load(x));
      });
    }
  });
}

template <typename T>
void column_sums(const ColumnSums& args) {
  const int64_t chunks = (args.rows + sum_chunk - 1) / sum_chunk;
  parallel(chunks, args.threads, [&](int64_t task, int) {
    float* sums = args.scratch + 2 * task * args.columns;
    // What each sum has lost to rounding (Kahan): the terms cancel, and a bias's gradient is to be as good as a product's.
    float* lost = sums + args.columns;
    for (int64_t i = 0; i < 2 * args.columns; ++i) sums[i] = 0;
    const int64_t end = min((task + 1) * sum_chunk, args.rows);
    for (int64_t row = task * sum_chunk; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.columns;
      for_row(args.columns, [&](int64_t i, auto load, auto store) {
        fetch(x + i + args.columns);
        const Float sum = load(sums), term = load(x) - load(lost), next = sum + term;
        store(lost, (next - sum) - term);
        store(sums, next);
      });
    }
  });
  sum_rows(args.scratch, chunks, 2 * args.columns, args.columns, args.sums, args.threads);
}

template <typename T>
void dropout(const DropoutRows& args) {
  constexpr int64_t chunk = 16;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int) {
    const int64_t end = min((task + 1) * chunk, args.rows);
    for (int64_t row = task * chunk; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.columns;
      T* out = static_cast<T*>(args.out) + row * args.columns;
      const uint32_t key = row_key(args.dropout, row);
      for_row(args.columns, [&](int64_t i, auto load, auto store) {
        fetch(x + i + args.columns);
        fetch<true>(out + i + args.columns);
        store(out, drop(args.dropout, key, i, load(x) * args.dropout.scale));
      });
    }
  });
}

// Threads share the columns, so that the rows of one id are added in their order.
template <typename T>
void embedding_gradient(const EmbeddingGradient& args) {
  constexpr int64_t block = 64, piece = 1 << 18;
  const int64_t bytes = args.table_rows * args.columns * sizeof(T);
  const bool streams = bytes >= streamed_bytes && is_aligned(args.table);
  parallel((bytes + piece - 1) / piece, args.threads, [&](int64_t task, int) {
    char* at = static_cast<char*>(args.table) + task * piece;
    const int64_t size = min(piece, bytes - task * piece), vectors = streams ? size / (4 * W) : 0;
    for (int64_t i = 0; i < vectors; ++i) stream(reinterpret_cast<float*>(at) + i * W, Float{});
    __builtin_memset(at + vectors * 4 * W, 0, size - vectors * 4 * W);
    fence();
  });
  parallel((args.columns + block - 1) / block, args.threads, [&](int64_t task, int) {
    const int64_t first = task * block, columns = min(block, args.columns - first);
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t id = args.ids[row];
      if (id == args.skipped) continue;
      const T* x = static_cast<const T*>(args.x) + row * args.columns + first;
      T* sum = static_cast<T*>(args.table) + id * args.columns + first;
      for_row(columns, [&](int64_t, auto load, auto store) { store(sum, load(sum) + load(x)); });
    }
  });
}

#define INSTANTIATE(T)                              \
  template void column_sums<T>(const ColumnSums&); \
  template void dropout<T>(const DropoutRows&);     \
  template void embedding_gradient<T>(const EmbeddingGradient&);
INSTANTIATE(float)
INSTANTIATE(Bf16)
template void add<float, Bf16>(const Add&);
template void add<Bf16, float>(const Add&);

}  // namespace ticketops::TICKETOPS_ISA
