// Bias, dropout, residual and LayerNorm in one pass over memory each way.
#include "cpu/dropout.h"
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {
namespace {

// z = residual + dropout(x + bias) of one row, written to `z` in float32; returns its sum.
template <typename X, typename R>
float sum_row(const Residual& args, int64_t row, float* z) {
  const X* x = static_cast<const X*>(args.x) + row * args.channels;
  const R* residual = static_cast<const R*>(args.residual) + row * args.channels;
  const Dropout& dropout = args.dropout;
  const uint32_t key = row_key(dropout, row);
  Float total{};
  for_row(args.channels, [&](int64_t i, auto load, auto store) {
    if (args.x) fetch(x + i + args.channels);
    fetch(residual + i + args.channels);
    Float value{};
    if (args.x) value = load(x);
    if (args.bias) value += load(args.bias);
    if (dropout.threshold) value = drop(dropout, key, i, value * dropout.scale);
    value += load(residual);
    store(z, value);
    total += value;
  });
  return sum(total);
}

}  // namespace

template <typename X, typename R>
void residual_forward(const ResidualForward& args) {
  constexpr int64_t chunk = 2 * residual_rows;
  const int64_t channels = args.channels;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int thread) {
    const int64_t end = min((task + 1) * chunk, args.rows);
    for (int64_t first = task * chunk; first < end; first += residual_rows) {
      const int64_t rows = min(residual_rows, end - first);
      float* z = args.scratch + thread * residual_rows * channels;
      float *mean = args.mean + first, *rstd = args.rstd + first;
      for (int64_t i = 0; i < rows; ++i) mean[i] = sum_row<X, R>(args, first + i, z + i * channels) / channels;
      for (int64_t i = 0; i < rows; ++i) {
        Float squares{};
        for_row(channels, [&](int64_t j, auto load, auto) {
          // The lanes behind the last element hold zeros, which the mean would shift.
          const Float centred = load(z + i * channels) - mean[i];
          squares += valid(j, channels, centred * centred);
        });
        rstd[i] = 1.0f / __builtin_sqrtf(sum(squares) / channels + args.eps);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (first + i) * channels;
        R* out = static_cast<R*>(args.out) + at;
        Bf16* half = args.half ? args.half + at : nullptr;
        for_row(channels, [&](int64_t j, auto load, auto store) {
          fetch<true>(out + j + channels);
          if (half) fetch<true>(half + j + channels);
          const Float value = (load(z + i * channels) - mean[i]) * rstd[i] * load(args.gamma) + load(args.beta);
          store(out, value);
          if (half) store(half, value);
        });
      }
    }
  });
}

// With N = (z - mean) rstd and G = gamma dOut: dz = rstd (G - mean(G) - N mean(G N)), dx = dropout(dz).
template <typename X, typename R>
void residual_backward(const ResidualBackward& args) {
  const int64_t channels = args.channels;
  const int64_t chunks = (args.rows + residual_chunk - 1) / residual_chunk;
  const Dropout& dropout = args.dropout;
  parallel(chunks, args.threads, [&](int64_t task, int) {
    float* dbias = args.scratch + task * 4 * channels;
    float* dgamma = dbias + channels;
    float* dbeta = dgamma + channels;
    float* z = dbeta + channels;
    for (int64_t i = 0; i < 3 * channels; ++i) dbias[i] = 0;
    const int64_t end = min((task + 1) * residual_chunk, args.rows);
    for (int64_t row = task * residual_chunk; row < end; ++row) {
      sum_row<X, R>(args, row, z);
      const R* dout = static_cast<const R*>(args.dout) + row * channels;
      const float mean = args.mean[row], rstd = args.rstd[row];
      Float total{}, product{};
      for_row(channels, [&](int64_t i, auto load, auto store) {
        fetch(dout + i + channels);
        const Float normal = (load(z) - mean) * rstd, gradient = load(dout), scaled = gradient * load(args.gamma);
        total += scaled;
        product += scaled * normal;
        store(z, normal);
        store(dgamma, load(dgamma) + gradient * normal);
        store(dbeta, load(dbeta) + gradient);
      });
      const float mean_total = sum(total) / channels, mean_product = sum(product) / channels;
      const uint32_t key = row_key(dropout, row);
      X* dx = args.dx ? static_cast<X*>(args.dx) + row * channels : nullptr;
      R* dresidual = static_cast<R*>(args.dresidual) + row * channels;
      for_row(channels, [&](int64_t i, auto load, auto store) {
        fetch<true>(dresidual + i + channels);
        if (dx) fetch<true>(dx + i + channels);
        const Float dz = (load(dout) * load(args.gamma) - mean_total - load(z) * mean_product) * rstd;
        const Float dropped = dropout.threshold ? drop(dropout, key, i, dz * dropout.scale) : dz;
        store(dresidual, dz);
        if (dx) store(dx, dropped);
        store(dbias, load(dbias) + dropped);
      });
    }
  });
  float* const sums[] = {args.dbias, args.dgamma, args.dbeta};
  for (int i = 0; i < 3; ++i)
    sum_rows(args.scratch + i * channels, chunks, 4 * channels, channels, sums[i], args.threads);
}

#define INSTANTIATE(X, R)                                           \
  template void residual_forward<X, R>(const ResidualForward&);     \
  template void residual_backward<X, R>(const ResidualBackward&);
INSTANTIATE(float, float)
INSTANTIATE(Bf16, float)
INSTANTIATE(Bf16, Bf16)

}  // namespace ticketops::TICKETOPS_ISA
