// Gathers or scatters slices of many tensors in one launch. Each block finds its copy in a table on the device.
#include "device.h"
#include "kernels.h"

namespace ticketops::cuda {
namespace {

constexpr int threads = 256;

template <typename Vector>
__device__ void copy_vectors(const Copy& copy, int64_t first) {
  constexpr int each = block_vectors / threads;
  const auto row_vectors = static_cast<uint32_t>(copy.row_vectors);
  const auto slice_vectors = static_cast<uint32_t>(copy.slice_vectors);
  Vector values[each];
  char* targets[each];
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int64_t vector = first + i * threads + threadIdx.x;
    targets[i] = nullptr;
    if (vector >= copy.vectors) continue;
    // ticketops/ops/copies/cuda.py keeps the number of vectors below 2^31: a 64-bit division costs more than the copy.
    const uint32_t row = static_cast<uint32_t>(vector) / row_vectors;
    const uint32_t column = static_cast<uint32_t>(vector) % row_vectors;
    const uint32_t slice = column / slice_vectors, inside = column % slice_vectors;
    const int64_t chosen = copy.index ? copy.index[slice] : slice;
    const int64_t from = copy.scatter ? slice : chosen, to = copy.scatter ? chosen : slice;
    const int64_t offset = static_cast<int64_t>(inside) * sizeof(Vector);
    const char* source = copy.source + row * copy.source_row_bytes + from * copy.slice_bytes + offset;
    values[i] = *reinterpret_cast<const Vector*>(source);
    targets[i] = copy.target + row * copy.target_row_bytes + to * copy.slice_bytes + offset;
  }
#pragma unroll
  for (int i = 0; i < each; ++i)
    if (targets[i]) *reinterpret_cast<Vector*>(targets[i]) = values[i];
}

__global__ void __launch_bounds__(threads) copy_table_kernel(const Copy* __restrict__ table, int64_t copies) {
  // Binary search for the last copy whose first block is at or before this one.
  int64_t low = 0, high = copies;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (table[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Copy& copy = table[low];
  const int64_t first = (blockIdx.x - copy.first_block) * block_vectors;
  switch (copy.width) {
    case 16: return copy_vectors<uint4>(copy, first);
    case 4: return copy_vectors<uint32_t>(copy, first);
    case 2: return copy_vectors<uint16_t>(copy, first);
    default: return copy_vectors<uint8_t>(copy, first);
  }
}

}  // namespace

const char* copy_table(const Copy* table, int64_t copies, int64_t blocks, void* stream) {
  return launch(copy_table_kernel, blocks, dim3(threads), stream, table, copies);
}

}  // namespace ticketops::cuda
