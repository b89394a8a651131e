// Arguments of the CPU kernels: raw pointers, sizes and strides (in elements). The Python callers have checked them.
#pragma once

#include <cstdint>

namespace ticketops {

// A stored bfloat16. All arithmetic is in float32.
struct Bf16 {
  uint16_t bits;
};

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // ceil(p * 2^24); 0: no dropout
  float scale;  // 1 / (1 - p)
};

// Rows start .. start + length - 1. `sequence` is the sequence's index, or -1 for rows between sequences.
struct Segment {
  int64_t start, length, sequence;
};

// A view [T, H, D] whose last stride is 1. In bfloat16 with an even D, every row of D elements is aligned to 4 bytes.
struct View {
  const void* data;
  int64_t row, head;  // strides
};

// Number of queries whose scores are in scratch at a time.
constexpr int64_t attention_query_block = 48;
// The same with AMX: the inner dimension of a tile, since dK and dV are sums over queries.
constexpr int64_t attention_tile_queries = 32;

// Row stride, in floats, of a matrix with n columns in scratch: whole vectors, and an odd number of cache lines, so
// that the elements of a column fall into different cache sets.
constexpr int64_t attention_stride(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Room, in floats, for a number for each distance between two of n tokens. A vector may begin at any of them.
constexpr int64_t attention_distances(int64_t n) { return (2 * n + 15) / 16 * 16 + 16; }

// Scratch of one thread, in floats, for sequences of up to n tokens: what the backward pass needs, which is more than
// the forward pass needs.
constexpr int64_t attention_scratch(int64_t n, int64_t head_dim) {
  const int64_t lines = 2 * head_dim * attention_stride(n) + 3 * n * attention_stride(head_dim) +
                        attention_query_block * (3 * attention_stride(head_dim) + 2 * attention_stride(n));
  const int64_t keys = (n + 31) / 32 * 32, channels = (head_dim + 31) / 32 * 32;
  const int64_t tiles = 7 * keys * channels / 2 + 112 * (keys + channels);
  return (lines > tiles ? lines : tiles) + 2 * attention_distances(n);
}

// A term of the scores that depends on the head and on the distance from the query to the key.
struct PositionBias {
  const float* table;  // [H, 2 * reach + 1]: the term of distance d is in column reach + d; null: no term
  int64_t reach;  // at least the longest sequence - 1
};

// Vectors for each head and each distance from the query to the key, by which queries and keys are multiplied: two tables
// [2 * reach + 1, H, D] with distance d in row reach + d.
struct PositionTables {
  View keys, queries;  // multiplied by queries, and by keys; data is null for no such term
  int64_t reach;  // at least longest - 1
  int64_t longest;  // length of the longest sequence, at least 1

  bool there() const { return keys.data || queries.data; }
  // Sequences in a task of one head. The tasks' gradients are added up, so this must not depend on the number of threads.
  int64_t sequences(int64_t batch) const { return batch < 4 ? 1 : (batch + 3) / 4; }
  int64_t chunks(int64_t batch) const { return (batch + sequences(batch) - 1) / sequences(batch); }
};

// Places of a table's vectors in scratch for sequences of up to n tokens: an odd number, with the largest vectors' width
// less one of zeros on both sides. Distance 0 is in the middle.
constexpr int64_t position_rows(int64_t n) { return 2 * n + 31; }
// What a product of a table is wider than a row of scores, at most.
constexpr int64_t position_margin = 48;

// Further scratch of one thread for both tables, in floats.
constexpr int64_t position_scratch(int64_t n, int64_t head_dim) {
  return 2 * (head_dim * attention_stride(position_rows(n)) + position_rows(n) * attention_stride(head_dim)) +
         16 * attention_stride(n + position_margin);
}

struct Attention {
  int64_t heads, head_dim;
  const Segment* sequences;
  int64_t batch;
  const float* head_mask;  // [H] or null
  Dropout dropout;
  float scale;
  PositionBias bias;
  PositionTables positions;
  int64_t window;  // a query attends to keys at a distance of at most `window` tokens
  const uint8_t* real;  // [T], 0 for a hole, which neither attends nor is attended to; null: no holes
  bool first_tokens;  // compute only the first query of each sequence; the other rows are zeros
  float* scratch;  // [threads, scratch_stride]
  int64_t scratch_stride;
  int threads;
};

struct AttentionForward : Attention {
  View q, k, v;
  void* out;  // [T, H, D]
  float* lse;  // [T, H]
};

struct AttentionBackward : Attention {
  View dout, q, k, v;
  const void* out;
  const float* lse;
  void *dq, *dk, *dv;  // [T, H, D], rows `gradient_row` elements apart
  int64_t gradient_row;
  float *signed_sums, *absolute_sums;  // [B, H]
  float* bias_table;  // [B, H, 2 * reach + 1] scratch
  float* bias_sums;  // [H, 2 * reach + 1], the gradient of the bias; null without one
  float* position_sums;  // [chunks, H, 2, position_rows(longest), attention_stride(D)] scratch
  float *key_sums, *query_sums;  // [2 * reach + 1, H, D], the gradients of the position tables; null without one
};

enum class Activation : int { gelu, gelu_tanh, relu, silu };

// hidden = dropout(act(pre + bias)), masked = hidden * mask. If gated, pre and bias have 2N columns: hidden =
// dropout(act(first half) * second half).
struct FfnForward {
  int64_t rows, neurons;
  Activation activation;
  bool gated;
  const void* pre;  // [T, N] or [T, 2N]
  const float* bias;  // [N] or [2N]; null if pre includes it
  void *hidden, *masked;  // [T, N]; masked: null without a mask
  const float* neuron_mask;  // [N] or null
  Dropout dropout;
  int threads;
};

struct FfnBackward {
  int64_t rows, neurons;
  Activation activation;
  bool gated;
  const void* gradient;  // [T, N], dY W2
  void* target;  // dL/dpre, of pre's shape; may be `gradient` itself if that is [T, N]
  const void* pre;
  const float* bias;
  const void* hidden;
  void* masked;  // hidden * mask; null: not computed
  const float* neuron_mask;
  const Segment* segments;  // cover all rows
  int64_t segment_count;
  float* bias_table;  // [segments, N or 2N] scratch; null: no bias_sums
  float* bias_sums;  // [N or 2N], column sums of dL/dpre
  float* neuron_sums;  // [B, N] or null
  bool neuron_absolute;  // sum absolute values
  Dropout dropout;
  int threads;
};

// For each sequence, the sums over its rows of <a, b + bias> / mask and of its absolute value.
struct TokenSums {
  int64_t channels;
  const void *a, *b;  // [T, C]
  const float* bias;  // [C] or null
  const Segment* sequences;
  int64_t batch;
  float mask;
  float *signed_sums, *absolute_sums;  // [B]
  int threads;
};

// Rows of a matrix [.., C]: row places[t] for row t of the result.
struct Rows {
  const void* data;  // null: zeros
  const int64_t* places;  // [T]; null: row t itself
};

// A LayerNorm of T rows. mean and rstd: [T].
struct Norm {
  const float *gamma, *beta;  // gamma: null for no norm; beta: null for zeros
  float eps;
  float *mean, *rstd;
};

// total = residual + dropout(x + bias + third), out = last(norms(total)), where `dropout` and `last` are dropouts: the
// end of a sublayer. If LayerNorm comes first in a layer, `total` goes on to the end of the next sublayer, and `out` into
// it. With embedding tables as x, third and residual, it is a model's embeddings. The second norm is for a layer whose
// FFN is pruned: the LayerNorms before and after the FFN then follow each other.
struct Residual {
  int64_t rows, channels;
  Rows x, third, residual;
  const float* bias;  // [C] or null
  Norm norms[2];
  Dropout dropout, last;
  float* scratch;
  int threads;
};

// Number of rows that each loop processes before the next loop starts. With one row, each loop would wait for the
// previous loop's sum.
constexpr int64_t residual_rows = 8;

// scratch: [threads, residual_rows, C].
struct ResidualForward : Residual {
  void* total;  // [T, C], or null
  void* out;  // [T, C]; not written without a norm
  Bf16* half;  // [T, C], a copy of `out` in bfloat16, or null
};

// Rows are summed in chunks of this many, so that the sums do not depend on the number of threads.
constexpr int64_t residual_chunk = 64;
// Rows of scratch for a chunk: five sums (dbias, and dgamma and dbeta of both norms) and two rows of intermediate
// results.
constexpr int64_t residual_sums = 7;

struct ResidualBackward : Residual {
  const void* dout;  // not read without a norm
  const void* dtotal;  // what reaches `total` past the norm, or null
  void *dx, *dresidual;  // dx: null if it equals dresidual; dresidual: null if it equals dtotal
  float* sums[5];  // [C] each, or null: dbias, dgamma and dbeta of the first norm, then of the second
};

// Rows of a chunk in `ColumnSums`, as above.
constexpr int64_t sum_chunk = 64;

// total[t] += x[t]. `x_row` is the row stride of x; with 0 the same row is added to all.
struct Add {
  int64_t rows, columns;
  void* total;  // [T, C]
  const void* x;
  int64_t x_row;
  int threads;
};

struct ColumnSums {
  int64_t rows, columns;
  const void* x;  // [T, C]
  float* scratch;  // [chunks, 2, C]
  float* sums;  // [C]
  int threads;
};

struct DropoutRows {
  int64_t rows, columns;
  const void* x;  // [T, C]
  void* out;
  Dropout dropout;
  int threads;
};

// Results of at least this many bytes that are read much later are written with non-temporal stores. An ordinary store
// first reads the cache line from memory. Clearing the gradient of MiniLM's embedding takes 1.4 instead of 2.8 ms (two
// cores of an Intel Xeon); the optimizer, which reads it, is not slower.
constexpr int64_t streamed_bytes = 4 << 20;

// table = 0, then table[ids[t]] += x[t] in the order of t, except where ids[t] is `skipped`.
struct EmbeddingGradient {
  int64_t table_rows, rows, columns;
  const int64_t* ids;  // [T]
  const void* x;  // [T, C]
  void* table;  // [V, C]
  int64_t skipped;
  int threads;
};

// Turns pairs of channels by the angle of their token (rotary positions), in place: with the halves (a, b) of a head,
// (a, b) = (a cos - b sin, b cos + a sin); `back`, the gradient's turn, is the transpose of that.
struct Rotary {
  int64_t rows, heads, head_dim;
  void* x;  // [T, heads, D], rows `row` elements apart
  int64_t row;
  const float *cosines, *sines;  // [T, D]
  bool back;
  int threads;
};

struct Transpose {
  int64_t rows, columns;
  const Bf16* x;  // [rows, columns]
  Bf16* out;  // [columns, rows]
  int threads;
};

// A linear layer: weight [rows, columns] and bias [rows].
struct Linear {
  const void *weight, *bias;
};

// Output channels of a linear layer that one task computes.
constexpr int64_t encoder_block = 24;
// The same with AMX: two tiles.
constexpr int64_t encoder_tile_block = 32;
// Columns of the weights in an AMX tile.
constexpr int64_t encoder_pairs = 32;

// A post-LayerNorm encoder layer for few tokens, without gradients.
struct Encoder {
  int64_t tokens, channels, head_dim;
  int64_t width, neurons;  // kept heads * head_dim, and kept neurons of the FFN: what is computed
  int64_t all_width, all_neurons;  // the same of the weights
  const int64_t *width_places, *neuron_places;  // [width] and [neurons]: indices of the kept ones; null: all
  Linear q, k, v, output, first, second;  // second.bias: null without an FFN
  const void *gamma1, *beta1, *gamma2, *beta2;
  const Segment* sequences;
  int64_t batch, longest;
  bool first_tokens;  // compute the output of each sequence's first token only
  float scale, eps1, eps2;
  PositionBias bias;  // of the kept heads
  Activation activation;
  const void* x;  // [T, C]
  void* out;  // [T, C], or [B, C] with first_tokens
  float* scratch;  // scratch_size() floats
  int threads;

  // Row stride, in floats, of a transposed matrix, whose rows are channels and whose columns are tokens.
  constexpr int64_t row() const { return ((first_tokens && batch > tokens ? batch : tokens) + 15) / 16 * 16; }
  // Scratch of one thread, in floats.
  constexpr int64_t thread_scratch() const {
    int64_t columns = channels > all_width ? channels : all_width;
    columns = columns > all_neurons ? columns : all_neurons;
    const int64_t weights = encoder_block * attention_stride(columns);
    const int64_t pairs = (columns + encoder_pairs - 1) / encoder_pairs * encoder_pairs / 2;
    const int64_t tiles = encoder_tile_block * (attention_stride(pairs) + row());
    const int64_t attention = (longest + head_dim + 1) * attention_stride(longest) + attention_distances(longest);
    const int64_t products = weights > tiles ? weights : tiles;
    return products > attention ? products : attention;
  }
  // All scratch, in floats; it must be aligned to 64 bytes: the transposed matrices, 16 floats of room after the last,
  // the threads' scratch, and a right operand in pairs.
  constexpr int64_t scratch_size() const {
    const int64_t pairs = (channels + width + neurons + 1 + encoder_pairs) / 2;
    return (3 * channels + 4 * width + neurons) * row() + 16 + threads * thread_scratch() + pairs * row();
  }
};

// Element types of a copy's source and target.
enum class Elements : int64_t { bytes, float_to_float, bf16_to_bf16, float_to_bf16, bf16_to_float };

// Copies slices of each row of one tensor to another: target[r][to[i]] = source[r][from[i]] for i < count.
struct Copy {
  const void* source;  // [rows, source_slices, slice]
  void* target;  // [rows, target_slices, slice]
  const int64_t *from, *to;  // [count]; null: i itself; from[i] = -1: zeros
  int64_t rows, source_slices, target_slices, count, slice;
  Elements elements;
  bool streams;  // use non-temporal stores: the target is float32 and read much later
  int64_t first_task;  // number of tasks of all copies before this one
};

// Elements of a task: enough to outweigh the cost of a task, few enough to balance the threads.
constexpr int64_t copy_task = 1 << 15;

// Copies that run as one list of tasks.
struct Copies {
  const Copy* copies;
  int64_t count, tasks;
  int threads;
};

#define TICKETOPS_KERNELS(isa)                                                      \
  namespace isa {                                                                   \
  template <typename T>                                                             \
  void attention_forward(const AttentionForward&);                                  \
  template <typename T>                                                             \
  void attention_backward(const AttentionBackward&);                                \
  template <typename T>                                                             \
  void ffn_forward(const FfnForward&);                                              \
  template <typename T>                                                             \
  void ffn_backward(const FfnBackward&);                                            \
  template <typename T>                                                             \
  void token_sums(const TokenSums&);                                                \
  template <typename X, typename R, typename O>                                     \
  void residual_forward(const ResidualForward&);                                    \
  template <typename X, typename R, typename O>                                     \
  void residual_backward(const ResidualBackward&);                                  \
  template <typename A, typename B>                                                 \
  void add(const Add&);                                                             \
  template <typename T>                                                             \
  void column_sums(const ColumnSums&);                                              \
  template <typename T>                                                             \
  void dropout(const DropoutRows&);                                                 \
  template <typename T>                                                             \
  void rotary(const Rotary&);                                                       \
  template <typename T>                                                             \
  void embedding_gradient(const EmbeddingGradient&);                                \
  void transpose(const Transpose&);                                                 \
  void copy(const Copies&);                                                         \
  template <typename T, bool half>                                                  \
  void encoder(const Encoder&);                                                     \
  }

TICKETOPS_KERNELS(avx2)
TICKETOPS_KERNELS(avx512)
TICKETOPS_KERNELS(avx512bf16)
TICKETOPS_KERNELS(amx)
TICKETOPS_KERNELS(generic)

}  // namespace ticketops
