// The kernels' launchers. Pointers are addresses on the device, sizes count elements unless their name says bytes, and
// each call returns what went wrong, or null, as soon as the work is queued on the stream.
#pragma once

#include <cstdint>

namespace ticketops::cuda {

// Why the current device cannot run these kernels, or null.
const char* problem();

// target[i] = source[index[i]], whole rows; zeros where index[i] is negative.
const char* move_rows(const void* source, int64_t source_stride_bytes, const int64_t* index, void* target,
                      int64_t rows, int64_t row_bytes, void* stream);

// Numbers the nonzero elements of mask [batch, width], whose elements are integers of mask_bytes bytes, in order.
// lengths, starts [batch]: each row's share; indices [batch * width]: where number t lies, -1 past the last;
// numbers [batch * width]: the number of each element, -1 for zeros.
const char* number_tokens(const void* mask, int mask_bytes, int64_t row_stride, int64_t batch, int64_t width,
                          int32_t* starts, int32_t* lengths, int64_t* indices, int64_t* numbers, void* stream);

constexpr int max_layers = 64;
constexpr int max_structures = 4096;

// One batch's partials of one layer, [rows, columns] and contiguous; null where there are none.
struct Partials {
  const float* data;
  int32_t rows;
  int32_t count;
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

// One copy of a table: `vectors` vectors of `width` bytes. Vector v lies in row v / row_vectors, and there in slice
// (v % row_vectors) / slice_vectors, which is slice index[slice] of the source, or of the target if `scatter`.
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
  // Blocks of the copies before this one in the table.
  int64_t first_block;
};
static_assert(sizeof(Copy) == 12 * 8, "a row of the table is 12 numbers");
// Vectors that one block copies.
constexpr int block_vectors = 1024;

// Runs all copies of a table on the device.
const char* copy_table(const Copy* table, int64_t copies, int64_t blocks, void* stream);

}  // namespace ticketops::cuda
