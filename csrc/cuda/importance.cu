// Adds one batch's importance partials of all layers to the running sums, and ranks all heads and all FFNs.
//
// Heads of layer l: total[l][h] += examples * sum over examples of |sum over the example's rows of partial[row][h]|;
// score[l][h] = average / l2 norm of the layer's averages, with average = total / count; order = argsort of all scores,
// ties by layer, then head. FFNs: the same with one column and no norm. The arithmetic is float64 in a fixed order
// without fused operations, so that ticketops/ops/importance/reference.py computes the same bits.
#include <cmath>

#include "device.h"
#include "kernels.h"

namespace ticketops::cuda {
namespace {

constexpr int threads = 512;

// NaN compares above all numbers, as in torch.sort. So the order is total, and every element of it is written.
__device__ __forceinline__ bool below(double a, double b) {
  return a == a && (b != b || a < b);
}

__device__ void rank(const double* scores, int count, int64_t* order) {
  for (int i = threadIdx.x; i < count; i += threads) {
    const double mine = scores[i];
    int before = 0;
    for (int j = 0; j < count; ++j) before += below(scores[j], mine) || (j < i && !below(mine, scores[j]));
    order[before] = i;
  }
}

__device__ double term(const Partials& partials, int columns, int column, int group, bool whole) {
  const float* data = partials.data + column;
  double sum = 0.0;
  if (whole) {
    for (int row = 0; row < partials.rows; ++row) sum = __dadd_rn(sum, data[static_cast<int64_t>(row) * columns]);
    return fabs(sum);
  }
  for (int row = 0; row < partials.rows; row += group) {
    double example = 0.0;
    for (int part = 0; part < group; ++part)
      example = __dadd_rn(example, data[static_cast<int64_t>(row + part) * columns]);
    sum = __dadd_rn(sum, fabs(example));
  }
  return sum;
}

// Runs as one block: there are only a few hundred structures, and ranking compares each with all others.
__global__ void __launch_bounds__(threads) importance_kernel(const Importance args) {
  const int heads = args.heads, structures = args.layers * heads;
  for (int i = threadIdx.x; i < structures + args.ffns; i += threads) {
    const bool head = i < structures;
    const Partials& partials = head ? args.head_partials[i / heads] : args.ffn_partials[i - structures];
    double* total = head ? args.head_totals + i : args.ffn_totals + (i - structures);
    if (partials.data) {
      const int examples = args.whole ? 1 : partials.rows / args.group;
      const double sum = term(partials, head ? heads : 1, head ? i % heads : 0, args.group, args.whole);
      *total = __dadd_rn(*total, __dmul_rn(examples, sum));
    }
    if (args.rank) (head ? args.head_scores[i] : args.ffn_scores[i - structures]) = *total / partials.count;
  }
  if (!args.rank) return;
  __syncthreads();
  __shared__ double norms[max_layers];
  for (int layer = threadIdx.x; layer < args.layers; layer += threads) {
    double squares = 0.0;
    for (int head = 0; head < heads; ++head) {
      const double score = args.head_scores[layer * heads + head];
      squares = __dadd_rn(squares, __dmul_rn(score, score));
    }
    norms[layer] = squares == 0.0 ? 1.0 : sqrt(squares);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < structures; i += threads) args.head_scores[i] /= norms[i / heads];
  __syncthreads();
  rank(args.head_scores, structures, args.head_order);
  rank(args.ffn_scores, args.ffns, args.ffn_order);
}

}  // namespace

const char* importance(const Importance& args, void* stream) {
  return launch(importance_kernel, 1, dim3(threads), stream, args);
}

}  // namespace ticketops::cuda
