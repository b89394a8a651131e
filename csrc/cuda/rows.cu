// Numbers the tokens of a padded batch, and moves rows between the padded batch and the packed tokens.
#include "device.h"
#include "kernels.h"

namespace ticketops::cuda {
namespace {

constexpr int rows_per_block = 8;

// One warp moves one row: the index is read once, and the warp's accesses are coalesced.
template <typename Vector>
__global__ void __launch_bounds__(32 * rows_per_block)
    move_rows_kernel(const char* __restrict__ source, int64_t source_stride, const int64_t* __restrict__ index,
                     char* __restrict__ target, int64_t rows, int64_t row_bytes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.y;
  if (row >= rows) return;
  const int64_t from = index[row];
  const auto* input = reinterpret_cast<const Vector*>(source + from * source_stride);
  auto* output = reinterpret_cast<Vector*>(target + row * row_bytes);
  const int64_t vectors = row_bytes / static_cast<int64_t>(sizeof(Vector));
  if (from < 0) {
    for (int64_t i = threadIdx.x; i < vectors; i += 32) output[i] = Vector{};
  } else {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < vectors; i += 32) output[i] = input[i];
  }
}

// lengths[row] = number of nonzero elements of mask[row]. `Element` is an integer of the mask's element size.
template <typename Element>
__global__ void __launch_bounds__(128)
    count_kernel(const Element* __restrict__ mask, int64_t row_stride, int64_t width, int32_t* __restrict__ lengths) {
  __shared__ int32_t warps[4];
  const Element* row = mask + blockIdx.x * row_stride;
  int32_t count = 0;
  for (int64_t first = 0; first < width; first += 128) {
    const int64_t column = first + threadIdx.x;
    count += __popc(__ballot_sync(~0u, column < width && row[column] != 0));
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x == 0) lengths[blockIdx.x] = warps[0] + warps[1] + warps[2] + warps[3];
}

template <typename Element>
__global__ void __launch_bounds__(128)
    number_kernel(const Element* __restrict__ mask, int64_t row_stride, int64_t width,
                  const int32_t* __restrict__ lengths, int32_t* __restrict__ starts, int64_t* __restrict__ indices,
                  int64_t* __restrict__ numbers) {
  __shared__ int64_t parts[128];
  __shared__ int32_t warps[4];
  const int64_t batch = gridDim.x, row = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  parts[thread] = 0;
  for (int64_t b = thread; b < row; b += 128) parts[thread] += lengths[b];
  for (int half = 64; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) parts[thread] += parts[thread + half];
  }
  __syncthreads();
  int64_t next = parts[0];
  if (thread == 0) starts[row] = static_cast<int32_t>(next);

  for (int64_t first = 0; first < width; first += 128) {
    const int64_t column = first + threadIdx.x, place = row * width + column;
    const bool real = column < width && mask[row * row_stride + column] != 0;
    const unsigned votes = __ballot_sync(~0u, real);
    if (lane == 0) warps[warp] = __popc(votes);
    __syncthreads();
    int64_t number = next + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < 4; ++w) {
      if (w < warp) number += warps[w];
      next += warps[w];
    }
    if (column < width) {
      numbers[place] = real ? number : -1;
      // The (place - number) padding elements before this place take the last elements of `indices`.
      if (real) {
        indices[number] = place;
      } else {
        indices[batch * width - 1 - (place - number)] = -1;
      }
    }
    // The next iteration overwrites `warps`.
    __syncthreads();
  }
}

template <typename Element>
const char* number_elements(const void* mask, int64_t row_stride, int64_t batch, int64_t width, int32_t* starts,
                            int32_t* lengths, int64_t* indices, int64_t* numbers, void* stream) {
  const auto* elements = static_cast<const Element*>(mask);
  const char* error = launch(count_kernel<Element>, batch, dim3(128), stream, elements, row_stride, width, lengths);
  if (error) return error;
  return launch(number_kernel<Element>, batch, dim3(128), stream, elements, row_stride, width, lengths, starts,
                indices, numbers);
}

}  // namespace

const char* move_rows(const void* source, int64_t source_stride, const int64_t* index, void* target, int64_t rows,
                      int64_t row_bytes, void* stream) {
  const auto kernel_for = [&](auto vector) {
    return launch(move_rows_kernel<decltype(vector)>, (rows + rows_per_block - 1) / rows_per_block,
                  dim3(32, rows_per_block), stream, static_cast<const char*>(source), source_stride, index,
                  static_cast<char*>(target), rows, row_bytes);
  };
  const uint64_t bits = reinterpret_cast<uint64_t>(source) | reinterpret_cast<uint64_t>(target) |
                        static_cast<uint64_t>(source_stride) | static_cast<uint64_t>(row_bytes);
  if (bits % 16 == 0) return kernel_for(uint4{});
  if (bits % 4 == 0) return kernel_for(uint32_t{});
  if (bits % 2 == 0) return kernel_for(uint16_t{});
  return kernel_for(uint8_t{});
}

const char* number_tokens(const void* mask, int mask_bytes, int64_t row_stride, int64_t batch, int64_t width,
                          int32_t* starts, int32_t* lengths, int64_t* indices, int64_t* numbers, void* stream) {
  switch (mask_bytes) {
    case 1: return number_elements<int8_t>(mask, row_stride, batch, width, starts, lengths, indices, numbers, stream);
    case 2: return number_elements<int16_t>(mask, row_stride, batch, width, starts, lengths, indices, numbers, stream);
    case 4: return number_elements<int32_t>(mask, row_stride, batch, width, starts, lengths, indices, numbers, stream);
    default: return number_elements<int64_t>(mask, row_stride, batch, width, starts, lengths, indices, numbers, stream);
  }
}

const char* problem() {
#ifdef __CUDACC__
  // Fails if the driver is too old or the extension contains no code for the device.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, move_rows_kernel<uint4>);
  // Clear the error, so that a later launch does not report it.
  cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return nullptr;
}

}  // namespace ticketops::cuda
