// Launchers of the kernels. Pointers are device addresses. Sizes are in elements unless the name says bytes. Each
// function returns as soon as the kernel is queued on the stream: an error message, or null on success.
#pragma once

#include <cstdint>

namespace ticketops::cuda {

// Returns the reason why the current device cannot run the kernels, or null.
const char* problem();

// target[i] = source[index[i]] for rows of `row_bytes` bytes; zeros where index[i] is negative. `target` is contiguous.
const char* move_rows(const void* source, int64_t source_stride_bytes, const int64_t* index, void* target,
                      int64_t rows, int64_t row_bytes, void* stream);

// Numbers the nonzero elements (tokens) of mask [batch, width], integers of `mask_bytes` bytes, in row-major order.
// lengths [batch]: tokens of each row; starts [batch]: number of each row's first token; indices [batch * width]: flat
// position of token t, -1 after the last; numbers [batch * width]: the token number of each element, -1 for padding.
const char* number_tokens(const void* mask, int mask_bytes, int64_t row_stride, int64_t batch, int64_t width,
                          int32_t* starts, int32_t* lengths, int64_t* indices, int64_t* numbers, void* stream);

constexpr int max_layers = 64;
constexpr int max_structures = 4096;

// One batch's importance partials of one layer.
struct Partials {
  const float* data;  // [rows, heads], or [rows, 1] for an FFN, contiguous; null if the batch recorded none
  int32_t rows;
  int32_t count;  // examples or batches in the running sum; divides it
};

// See importance.cu.
struct Importance {
  int32_t layers, heads, ffns;
  int32_t group;
  bool whole;
  bool rank;
  double* head_totals;
  double* ffn_totals;
  double* head_scores;
  double* ffn_scores;
  int64_t* head_order;
  int64_t* ffn_order;
  Partials head_partials[max_layers];
  Partials ffn_partials[max_layers];
};

const char* importance(const Importance& args, void* stream);

// A row of the table: one copy of `vectors` vectors of `width` bytes. Vector v is in row v / row_vectors, slice
// s = (v % row_vectors) / slice_vectors. Gather: slice index[s] of the source goes to slice s of the target. Scatter:
// slice s of the source goes to slice index[s] of the target. A null index is the identity.
struct Copy {
  const char* source;
  char* target;
  const int64_t* index;
  int64_t scatter;
  int64_t width;
  int64_t vectors;
  int64_t row_vectors;
  int64_t slice_vectors;
  int64_t source_row_bytes;
  int64_t target_row_bytes;
  int64_t slice_bytes;
  // Number of blocks of all copies before this one in the table.
  int64_t first_block;
};
static_assert(sizeof(Copy) == 12 * 8, "a row of the table is 12 numbers");
// Vectors that one block copies.
constexpr int block_vectors = 1024;

// Runs all copies of a table on the device.
const char* copy_table(const Copy* table, int64_t copies, int64_t blocks, void* stream);

}  // namespace ticketops::cuda
