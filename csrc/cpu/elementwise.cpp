// Elementwise operations and reductions that are not part of another kernel: addition of two dtypes, column sums (a
// bias's gradient), dropout, rotary positions, sums of rows by id (an embedding's gradient), and transposes.
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
    // Kahan summation, because the terms cancel: a bias's gradient must be as accurate as one from a matrix product.
    float* compensation = sums + args.columns;
    for (int64_t i = 0; i < 2 * args.columns; ++i) sums[i] = 0;
    const int64_t end = min((task + 1) * sum_chunk, args.rows);
    for (int64_t row = task * sum_chunk; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * args.columns;
      for_row(args.columns, [&](int64_t i, auto load, auto store) {
        fetch(x + i + args.columns);
        const Float sum = load(sums), term = load(x) - load(compensation), next = sum + term;
        store(compensation, (next - sum) - term);
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

template <typename T>
void rotary(const Rotary& args) {
  constexpr int64_t chunk = 16;
  const int64_t half = args.head_dim / 2;
  const float sign = args.back ? -1.0f : 1.0f;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int) {
    const int64_t end = min((task + 1) * chunk, args.rows);
    for (int64_t row = task * chunk; row < end; ++row) {
      const float *cos = args.cosines + row * args.head_dim, *sin = args.sines + row * args.head_dim;
      // The transpose has each half's sine at the other.
      const float *sin_a = args.back ? sin + half : sin, *sin_b = args.back ? sin : sin + half;
      T* x = static_cast<T*>(args.x) + row * args.row;
      for (int64_t head = 0; head < args.heads; ++head, x += args.head_dim)
        for_row(half, [&](int64_t i, auto load, auto store) {
          fetch<true>(x + i + args.row);
          fetch<true>(x + half + i + args.row);
          const Float a = load(x), b = load(x + half);
          store(x, a * load(cos) - b * load(sin_a) * sign);
          store(x + half, b * load(cos + half) + a * load(sin_b) * sign);
        });
    }
  });
}

// Each thread takes a block of columns and goes through all rows, so that the rows of one id are added in order.
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

// In squares of W rows and W pairs of columns; the remaining elements at the edges one by one.
void transpose(const Transpose& args) {
  constexpr int64_t chunk = 2 * W, pairs = 2 * W;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int) {
    const int64_t first = task * chunk, rows = min(chunk, args.rows - first);
    const int64_t whole_rows = rows / W * W, whole_columns = args.columns / pairs * pairs;
    const Bf16* x = args.x + first * args.columns;
    Bf16* out = args.out + first;
    for (int64_t c = 0; c < whole_columns; c += pairs)
      for (int64_t r = 0; r < whole_rows; r += W) {
        Float square[W];
        for (int i = 0; i < W; ++i) {
          const Bf16* row = x + (r + i) * args.columns + c;
          fetch(row + 4 * pairs);
          square[i] = load(reinterpret_cast<const float*>(row));
        }
        transpose(square);
        for (int i = 0; i < W; ++i) {
          const Half halves[] = {__builtin_convertvector(bits(square[i]), Half),
                                 __builtin_convertvector(bits(square[i]) >> 16, Half)};
          for (int j = 0; j < 2; ++j) __builtin_memcpy(out + (c + 2 * i + j) * args.rows + r, halves + j, sizeof(Half));
        }
      }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = r < whole_rows ? whole_columns : 0; c < args.columns; ++c)
        out[c * args.rows + r] = x[r * args.columns + c];
  });
}

#define INSTANTIATE(T)                              \
  template void column_sums<T>(const ColumnSums&); \
  template void dropout<T>(const DropoutRows&);     \
  template void rotary<T>(const Rotary&);           \
  template void embedding_gradient<T>(const EmbeddingGradient&);
INSTANTIATE(float)
INSTANTIATE(Bf16)
template void add<float, Bf16>(const Add&);
template void add<Bf16, float>(const Add&);

}  // namespace ticketops::TICKETOPS_ISA
