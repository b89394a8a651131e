// The disentangled terms of attention: <q[i], keys[j - i]> + <k[j], queries[j - i]> for query i and key j, with a table of
// vectors by distance for each. No matrix of all pairs is stored.
//
// Both terms have the form <x[a], table[b - a]>: with a query as `a` and a key as `b`, or the reverse, for which the table
// is read backwards. W rows `a` are multiplied by all vectors that they need, as one product. In its result, the elements
// of row a begin W - 1 - r columns behind those of the last row, where r is the row's index; so a row is read, and its
// gradient written, one element further to the left than the row before it.
#pragma once

#include "cpu/attention.h"
#include "cpu/product.h"

namespace ticketops::TICKETOPS_ISA {

// One head's vectors of one table, by b - a; zeros beyond the longest sequence's distances. Null pointers: no table.
struct Band {
  int64_t middle, column_stride, row_stride;  // `middle` is the place of distance 0
  float* columns;  // [depth][column_stride]
  float* rows;  // [2 * middle + 1][row_stride]; written for the backward pass only
  float* sums;  // the same of the gradient
  float* skewed;  // [W][skewed_stride] scratch of a product
  int64_t skewed_stride;

  explicit operator bool() const { return columns; }
};

// The two tables of a head: `keys` with queries as rows a, and `queries` with keys as rows a.
struct Bands {
  Band keys, queries;
};

// The bands in a thread's scratch. `sums`: of the task, or null.
inline Bands bands_of(const Attention& args, int thread, float* sums) {
  const PositionTables& tables = args.positions;
  if (!tables.there()) return {};
  const int64_t rows = position_rows(tables.longest), depth = args.head_dim;
  const int64_t column_stride = attention_stride(rows), row_stride = attention_stride(depth);
  float* at = args.scratch + thread * args.scratch_stride + attention_scratch(tables.longest, depth);
  float* const skewed = at + 2 * (depth * column_stride + rows * row_stride);
  const auto band = [&](const View& table, float* gradient) {
    float* const columns = at;
    at += depth * column_stride + rows * row_stride;
    return Band{rows / 2, column_stride, row_stride, table.data ? columns : nullptr, columns + depth * column_stride,
                gradient, skewed, attention_stride(tables.longest + position_margin)};
  };
  const Band keys = band(tables.keys, sums);
  return {keys, band(tables.queries, sums ? sums + rows * row_stride : nullptr)};
}

// Copies one head's tables to a thread's scratch, and zeros the sums of their gradients.
template <typename T>
void gather_bands(const Attention& args, int64_t head, const Bands& bands) {
  const PositionTables& tables = args.positions;
  const int64_t depth = args.head_dim, count = 2 * tables.longest - 1;
  const auto copy = [&](const Band& band, const View& table) {
    if (!band) return;
    const int64_t first = band.middle - (tables.longest - 1);
    for (int64_t d = 0; d < depth; ++d) __builtin_memset(band.columns + d * band.column_stride, 0, first * sizeof(float));
    gather_transposed<T>(table, 0, count, head, depth, band.columns + first, band.column_stride);
    // Whole vectors were written, with zeros behind the last column.
    for (int64_t d = 0, end = first + padded(count); d < depth; ++d)
      __builtin_memset(band.columns + d * band.column_stride + end, 0, (band.column_stride - end) * sizeof(float));
    if (!band.sums) return;
    const int64_t size = (2 * band.middle + 1) * band.row_stride;
    __builtin_memset(band.rows, 0, size * sizeof(float));
    __builtin_memset(band.sums, 0, size * sizeof(float));
    gather<T>(table, 0, count, head, depth, 1, band.rows + first * band.row_stride, band.row_stride);
  };
  const int64_t first = tables.reach - (tables.longest - 1), last = tables.reach + (tables.longest - 1);
  const auto from = [](const View& table, int64_t row, int64_t step) {
    return View{static_cast<const T*>(table.data) + row * table.row, step * table.row, table.head};
  };
  if (bands.keys) copy(bands.keys, from(tables.keys, first, 1));
  if (bands.queries) copy(bands.queries, from(tables.queries, last, -1));
}

// A band's product for rows a = first .. first + count - 1, at most W, and the columns b = 0 .. columns - 1, to
// band.skewed: element (r, b) is at r * skewed_stride + W - 1 - r + b. `b_first` is the number of the first column.
inline void band_product(const Band& band, int64_t depth, int64_t first, int64_t count, Left rows, int64_t b_first,
                         int64_t columns) {
  const float* right = band.columns + band.middle + b_first - first - (W - 1);
  product<false>(count, padded(columns + W - 1), depth, rows, right, band.column_stride, band.skewed, band.skewed_stride);
}

// Given the gradient of a band's product in band.skewed, with zeros around it, adds to those of its rows, dx [count][stride],
// and of the table. x: the rows themselves, [count][stride].
inline void band_gradients(const Band& band, int64_t depth, int64_t first, int64_t count, const float* x, float* dx,
                           int64_t stride, int64_t b_first, int64_t columns) {
  const int64_t from = (band.middle + b_first - first - (W - 1)) * band.row_stride, distances = columns + W - 1;
  const Left gradient{band.skewed, band.skewed_stride, 1}, transposed{band.skewed, 1, band.skewed_stride};
  product<true>(count, padded(depth), distances, gradient, band.rows + from, band.row_stride, dx, stride);
  product<true>(distances, padded(depth), count, transposed, x, stride, band.sums + from, band.row_stride);
}

inline void zero_skewed(const Band& band, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < padded(columns) + W; c += W) store(band.skewed + r * band.skewed_stride + c, Float{});
}

// Adds both terms to the scores [queries][stride] of the block of queries first .. first + queries - 1 and all n keys.
// q: the block's rows, already times `scale`. `k`: all keys.
inline void add_positions(const Bands& bands, int64_t depth, int64_t first, int64_t queries, int64_t n, float scale,
                          const float* q, int64_t q_stride, Left k, float* scores, int64_t stride) {
  for (int64_t i = 0; bands.keys && i < queries; i += W) {
    const int64_t count = min(W, queries - i);
    band_product(bands.keys, depth, first + i, count, {q + i * q_stride, q_stride, 1}, 0, n);
    for (int64_t r = 0; r < count; ++r) {
      float* const row = scores + (i + r) * stride;
      const float* const terms = bands.keys.skewed + r * bands.keys.skewed_stride + W - 1 - r;
      for (int64_t j = 0; j < n; j += W) store(row + j, load(row + j) + load(terms + j));
    }
  }
  for (int64_t j = 0; bands.queries && j < n; j += W) {
    const int64_t count = min(W, n - j);
    band_product(bands.queries, depth, j, count, k.below(j), first, queries);
    for (int64_t i = 0; i < queries; i += W) {
      Float square[W] = {};
      for (int64_t r = 0; r < count; ++r) square[r] = load(bands.queries.skewed + r * bands.queries.skewed_stride + W - 1 - r + i);
      transpose(square);
      for (int64_t r = 0; r < min(W, queries - i); ++r) {
        float* const at = scores + (i + r) * stride + j;
        store(at, load(at) + square[r] * scale);
      }
    }
  }
}

// Given the gradient of the block's scores, adds to dq [queries][x_stride], whose gradient is still to be multiplied by
// `scale`, to dk [n][x_stride] and to the gradients of the tables. q: already times `scale`; dscores: zeros behind key n - 1.
inline void add_position_gradients(const Bands& bands, int64_t depth, int64_t first, int64_t queries, int64_t n,
                                   float scale, const float* q, float* dq, const float* k, float* dk, int64_t x_stride,
                                   const float* dscores, int64_t stride) {
  for (int64_t i = 0; bands.keys && i < queries; i += W) {
    const int64_t count = min(W, queries - i);
    zero_skewed(bands.keys, count, n);
    for (int64_t r = 0; r < count; ++r) {
      float* const terms = bands.keys.skewed + r * bands.keys.skewed_stride + W - 1 - r;
      for (int64_t j = 0; j < n; j += W) store(terms + j, load(dscores + (i + r) * stride + j));
    }
    band_gradients(bands.keys, depth, first + i, count, q + i * x_stride, dq + i * x_stride, x_stride, 0, n);
  }
  for (int64_t j = 0; bands.queries && j < n; j += W) {
    const int64_t count = min(W, n - j);
    zero_skewed(bands.queries, count, queries);
    for (int64_t i = 0; i < queries; i += W) {
      Float square[W] = {};
      for (int64_t r = 0; r < min(W, queries - i); ++r) square[r] = load(dscores + (i + r) * stride + j) * scale;
      transpose(square);
      for (int64_t r = 0; r < count; ++r)
        store(bands.queries.skewed + r * bands.queries.skewed_stride + W - 1 - r + i, square[r]);
    }
    band_gradients(bands.queries, depth, j, count, k + j * x_stride, dk + j * x_stride, x_stride, first, queries);
  }
}

// Adds up the tasks' sums of both tables' gradients, in order.
inline void sum_bands(const AttentionBackward& args) {
  const PositionTables& tables = args.positions;
  const int64_t rows = position_rows(tables.longest), stride = attention_stride(args.head_dim), reach = tables.reach;
  parallel(args.heads * (2 * reach + 1), args.threads, [&](int64_t task, int) {
    const int64_t head = task % args.heads, d = task / args.heads - reach;
    const auto add = [&](float* target, const float* sums, int64_t distance) {
      if (!target) return;
      for_row(args.head_dim, [&](int64_t, auto load, auto store) {
        Float total{};
        for (int64_t chunk = 0; chunk < tables.chunks(args.batch) && d < tables.longest && -d < tables.longest; ++chunk)
          total += load(sums + ((chunk * args.heads + head) * 2 * rows + rows / 2 + distance) * stride);
        store(target + task * args.head_dim, total);
      });
    };
    add(args.key_sums, args.position_sums, d);
    add(args.query_sums, args.position_sums + rows * stride, -d);
  });
}

}  // namespace ticketops::TICKETOPS_ISA
