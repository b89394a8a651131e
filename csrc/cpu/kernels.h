// What the CPU kernels take: raw pointers, sizes and strides (in elements), checked by the callers in Python.
#pragma once

#include <cstdint>

namespace ticketops {

// Storage of a bfloat16; all arithmetic is in float32.
struct Bf16 {
  uint16_t bits;
};

// threshold: ceil(p * 2^24); 0 means no dropout.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;  // 1 / (1 - p)
};

// Consecutive rows that belong together; `sequence` is -1 for rows of no sequence.
struct Segment {
  int64_t start, length, sequence;
};

// A [T, H, D] view whose last stride is 1. In bfloat16 all its rows begin at multiples of 4 bytes where D is even.
struct View {
  const void* data;
  int64_t row, head;
};

// The scores of this many queries are held at a time.
constexpr int64_t attention_query_block = 48;
// Where AMX multiplies: the depth of a tile, since dK and dV are sums over them.
constexpr int64_t attention_tile_queries = 32;

// Elements from one row of n to the next in scratch: room for whole vectors, and an odd number of cache lines, so that
// walking down a column does not hit the same cache set again and again.
constexpr int64_t attention_stride(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// Floats that one thread needs for sequences of up to n tokens in the backward pass; the forward pass needs less.
constexpr int64_t attention_scratch(int64_t n, int64_t head_dim) {
  const int64_t lines = 2 * head_dim * attention_stride(n) + 3 * n * attention_stride(head_dim) +
                        attention_query_block * (3 * attention_stride(head_dim) + 2 * attention_stride(n));
  const int64_t keys = (n + 31) / 32 * 32, channels = (head_dim + 31) / 32 * 32;
  const int64_t tiles = 7 * keys * channels / 2 + 112 * (keys + channels);
  return lines > tiles ? lines : tiles;
}

struct Attention {
  int64_t heads, head_dim;
  const Segment* sequences;
  int64_t batch;
  const float* head_mask;  // [H] or null
  Dropout dropout;
  float scale;
  int64_t window;  // a query attends to keys at most so far from it
  bool first_tokens;  // of each sequence only the first query is wanted: zeros for the others
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
};

enum class Activation : int { gelu, gelu_tanh, relu };

// hidden = act(pre + bias), masked = hidden * mask. Gated: pre is [T, 2N], and hidden = act(its first half) * its second.
struct FfnForward {
  int64_t rows, neurons;
  Activation activation;
  bool gated;
  const void* pre;  // [T, N]
  const float* bias;  // [N]; null where pre includes it, as with a gate
  void *hidden, *masked;  // [T, N]; masked: null without a mask
  const float* neuron_mask;  // [N] or null
  int threads;
};

struct FfnBackward {
  int64_t rows, neurons;
  Activation activation;
  bool gated;
  const void* gradient;  // [T, N], dY W2
  void* target;  // dL/dpre, of pre's shape; the same memory where that is [T, N]
  const void* pre;
  const float* bias;
  const void* hidden;
  void* masked;  // hidden * mask; null where it is not wanted
  const float* neuron_mask;
  const Segment* segments;  // cover all rows
  int64_t segment_count;
  float* bias_table;  // [segments, N or 2N] scratch, null where bias_sums are not wanted
  float* bias_sums;  // [N or 2N], column sums of dL/dpre
  float* neuron_sums;  // [B, N] or null
  bool neuron_absolute;
  int threads;
};

// Sums over each sequence's rows of <a, b + bias> and of its absolute value.
struct TokenSums {
  int64_t channels;
  const void *a, *b;
  const float* bias;  // [C] or null
  const Segment* sequences;
  int64_t batch;
  float mask;  // divides every term
  float *signed_sums, *absolute_sums;  // [B]
  int threads;
};

// Rows of a matrix [.., C]: all in their order, or those of `places`.
struct Rows {
  const void* data;  // null: zeros
  const int64_t* places;  // null: all
};

// A LayerNorm of T rows. mean and rstd: [T].
struct Norm {
  const float *gamma, *beta;  // gamma: null for no norm
  float eps;
  float *mean, *rstd;
};

// out = drop(norms(residual + dropout(x + bias + third))): what ends a sublayer, and with tables for x, third and
// residual what embeds tokens. The second norm is there where what lies between the two is pruned away.
struct Residual {
  int64_t rows, channels;
  Rows x, third, residual;
  const float* bias;  // [C] or null
  Norm norms[2];
  Dropout dropout, last;
  float* scratch;
  int threads;
};

// So many rows go from one loop to the next together: a row alone would wait for its own sums.
constexpr int64_t residual_rows = 8;

// scratch: [threads, residual_rows, C].
struct ResidualForward : Residual {
  void* out;
  Bf16* half;  // [T, C] for a copy of `out` in bfloat16, or null
};

// Rows are summed in chunks of this many, so that the sums do not depend on the number of threads.
constexpr int64_t residual_chunk = 64;
// The sums of a chunk (dbias, and dgamma and dbeta of both norms) and its two rows.
constexpr int64_t residual_sums = 7;

struct ResidualBackward : Residual {
  const void* dout;
  void *dx, *dresidual;  // dx: null where it equals dresidual
  float* sums[5];  // [C] each, or null: dbias, dgamma and dbeta of the first norm and of the second
};

// Rows are summed in chunks of this many, whatever the number of threads.
constexpr int64_t sum_chunk = 64;

// total[t] += x[t], rows of x `x_row` elements apart: 0 adds one row to all.
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

// Results of at least so many bytes that are read much later go past the caches: written into a cache, a line is first
// read from memory. Clearing the gradient of MiniLM's embedding takes 1.4 instead of 2.8 ms then (two cores of an Intel
// Xeon), and the optimizer, which reads it, as long as before.
constexpr int64_t streamed_bytes = 4 << 20;

// table = 0, and table[ids[t]] += x[t] in the order of t, except for the id `skipped`.
struct EmbeddingGradient {
  int64_t table_rows, rows, columns;
  const int64_t* ids;  // [T]
  const void* x;  // [T, C]
  void* table;  // [V, C]
  int64_t skipped;
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

// Rows of a linear layer's result that are one task.
constexpr int64_t encoder_block = 24;
// The same where AMX multiplies: two tiles, of so many columns of weights.
constexpr int64_t encoder_tile_block = 32;
constexpr int64_t encoder_pairs = 32;

// A post-LayerNorm encoder layer of few tokens, without gradients.
struct Encoder {
  int64_t tokens, channels, head_dim;
  int64_t width, neurons;  // computed: heads * head_dim, and of the FFN
  int64_t all_width, all_neurons;  // those that the weights have
  const int64_t *width_places, *neuron_places;  // the computed ones among these; null: all
  Linear q, k, v, output, first, second;  // second.bias: null without an FFN
  const void *gamma1, *beta1, *gamma2, *beta2;
  const Segment* sequences;
  int64_t batch, longest;
  bool first_tokens;  // of each sequence only the first token is wanted
  float scale, eps1, eps2;
  Activation activation;
  const void* x;  // [T, C]
  void* out;  // [T, C], or [B, C] of first tokens
  float* scratch;  // scratch_size() floats
  int threads;

  // Floats from one row to the next of a transposed matrix, which has a row a channel and a column a token.
  constexpr int64_t row() const { return ((first_tokens && batch > tokens ? batch : tokens) + 15) / 16 * 16; }
  // Floats that one thread needs.
  constexpr int64_t thread_scratch() const {
    int64_t columns = channels > all_width ? channels : all_width;
    columns = columns > all_neurons ? columns : all_neurons;
    const int64_t weights = encoder_block * attention_stride(columns);
    const int64_t pairs = (columns + encoder_pairs - 1) / encoder_pairs * encoder_pairs / 2;
    const int64_t tiles = encoder_tile_block * (attention_stride(pairs) + row());
    const int64_t attention = (longest + head_dim + 1) * attention_stride(longest);
    const int64_t products = weights > tiles ? weights : tiles;
    return products > attention ? products : attention;
  }
  // Floats of scratch, aligned to 64 bytes: the transposed matrices, room behind the last, every thread's, and a right
  // operand in pairs.
  constexpr int64_t scratch_size() const {
    const int64_t pairs = (channels + width + neurons + 1 + encoder_pairs) / 2;
    return (3 * channels + 4 * width + neurons) * row() + 16 + threads * thread_scratch() + pairs * row();
  }
};

// What a copy reads and writes.
enum class Elements : int64_t { bytes, float_to_float, bf16_to_bf16, float_to_bf16, bf16_to_float };

// Equal slices of each row of one tensor to those of another: number i goes from from[i] to to[i].
struct Copy {
  const void* source;  // [rows, source_slices, slice]
  void* target;  // [rows, target_slices, slice]
  const int64_t *from, *to;  // [count]; null: all in their order; -1: zeros
  int64_t rows, source_slices, target_slices, count, slice;
  Elements elements;
  bool streams;  // what is written is float32, and read much later
  int64_t first_task;
};

// Elements of a task: enough to be worth handing out, few enough to share among threads.
constexpr int64_t copy_task = 1 << 15;

// Copies whose tasks all threads share.
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
  template <typename X, typename R>                                                 \
  void residual_forward(const ResidualForward&);                                    \
  template <typename X, typename R>                                                 \
  void residual_backward(const ResidualBackward&);                                  \
  template <typename A, typename B>                                                 \
  void add(const Add&);                                                             \
  template <typename T>                                                             \
  void column_sums(const ColumnSums&);                                              \
  template <typename T>                                                             \
  void dropout(const DropoutRows&);                                                 \
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
