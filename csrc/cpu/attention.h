// Reads heads of packed sequences into scratch and writes them back.
#pragma once

#include "cpu/dropout.h"
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {

// Copies one head of rows start .. start + rows - 1, times `factor`, to `packed` [rows][stride]. Columns are padded
// with zeros to a multiple of W.
template <typename T>
void gather(const View& view, int64_t start, int64_t rows, int64_t head, int64_t head_dim, float factor, float* packed,
            int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = static_cast<const T*>(view.data) + (start + i) * view.row + head * view.head;
    for_row(head_dim, [&](int64_t d, auto load, auto) { store(packed + i * stride + d, load(row) * factor); });
  }
}

// Copies the transpose of the same to `packed` [head_dim][stride], padded with zeros to a multiple of W columns.
template <typename T>
void gather_transposed(const View& view, int64_t start, int64_t rows, int64_t head, int64_t head_dim, float* packed,
                       int64_t stride) {
  for (int64_t i = 0; i < rows; i += W) {
    const T* row = static_cast<const T*>(view.data) + (start + i) * view.row + head * view.head;
    const int64_t some = min(W, rows - i);
    for (int64_t d = 0; d < head_dim; d += W) {
      const int64_t count = min(W, head_dim - d);
      Float tile[W] = {};
      for (int64_t j = 0; j < some; ++j)
        tile[j] = count == W ? load(row + j * view.row + d) : load(row + j * view.row + d, count);
      transpose(tile);
      for (int64_t lane = 0; lane < count; ++lane) store(packed + (d + lane) * stride + i, tile[lane]);
    }
  }
}

// A view of bfloat16 numbers as pairs, each pair in the place of one float32.
inline View pairs_of(const View& view) { return {view.data, view.row / 2, view.head / 2}; }

// Writes `packed` [rows][stride] times `factor` to one head of `target` [T, H, D], whose row stride is `target_row`.
template <typename T>
void scatter(const float* packed, int64_t stride, const Attention& args, int64_t start, int64_t rows, int64_t head,
             float factor, void* target, int64_t target_row) {
  for (int64_t i = 0; i < rows; ++i) {
    T* row = static_cast<T*>(target) + (start + i) * target_row + head * args.head_dim;
    for_row(args.head_dim, [&](int64_t d, auto, auto store) { store(row, load(packed + i * stride + d) * factor); });
  }
}

// Copies one head's bias for a sequence of n tokens to `packed`: the distances 1 - n .. n - 1, or `reversed` n - 1 .. 1 -
// n. Behind them are zeros, so that a vector may begin at any distance. Returns where the bias of distance 0 is; null
// without a bias or tokens.
inline float* gather_bias(const PositionBias& bias, int64_t head, int64_t n, bool reversed, float* packed) {
  if (!bias.table || !n) return nullptr;
  const float* middle = bias.table + head * (2 * bias.reach + 1) + bias.reach;
  for (int64_t d = 1 - n; d < n; ++d) packed[n - 1 + d] = middle[reversed ? -d : d];
  for (int64_t i = 2 * n - 1; i < attention_distances(n); ++i) packed[i] = 0;
  return packed + n - 1;
}

// Returns zeros for the sums over all distances, in the room behind the bias of a sequence of n tokens and in its layout;
// null if there is no bias.
inline float* zero_distances(float* bias, int64_t n) {
  if (!bias) return nullptr;
  float* sums = bias - (n - 1) + attention_distances(n);
  for (int64_t i = 0; i < attention_distances(n); ++i) sums[i] = 0;
  return sums + n - 1;
}

// Writes the sums over a sequence of n tokens, in the layout of `gather_bias`, to a row of the bias's gradient; zeros for
// other distances.
inline void scatter_bias(const PositionBias& bias, int64_t n, bool reversed, const float* sums, float* row) {
  for (int64_t d = -bias.reach; d <= bias.reach; ++d)
    row[bias.reach + d] = d < n && -d < n ? sums[reversed ? -d : d] : 0;
}

// Number of queries of a sequence to compute.
TICKETOPS_INLINE int64_t queries_of(const Attention& args, const Segment& sequence) {
  return args.first_tokens ? min(1, sequence.length) : sequence.length;
}

// Returns true for a row that is a hole.
TICKETOPS_INLINE bool is_hole(const Attention& args, int64_t row) { return args.real && !args.real[row]; }

// The rows of the queries that are not computed.
TICKETOPS_INLINE Segment others_of(const Attention& args, const Segment& sequence) {
  const int64_t queries = queries_of(args, sequence);
  return {sequence.start + queries, sequence.length - queries, sequence.sequence};
}

// Writes zeros to one head of a segment's rows in `target`, whose row stride is `target_row`.
template <typename T>
void clear(const Attention& args, const Segment& sequence, int64_t head, void* target, int64_t target_row) {
  const T zero{};
  for (int64_t i = 0; i < sequence.length; ++i) {
    T* row = static_cast<T*>(target) + (sequence.start + i) * target_row + head * args.head_dim;
    for (int64_t d = 0; d < args.head_dim; ++d) row[d] = zero;
  }
}

// The range of keys that a block of queries attends to. `first` is a multiple of W, so that loads stay aligned.
struct Keys {
  int64_t first, count;
};

inline Keys keys_of(const Attention& args, int64_t first_query, int64_t queries, int64_t n) {
  const int64_t first = args.window < first_query ? (first_query - args.window) / W * W : 0;
  return {first, args.window < n - first_query - queries ? first_query + queries + args.window - first : n - first};
}

}  // namespace ticketops::TICKETOPS_ISA
