// Bias, dropout, residual and LayerNorm, or sum of embeddings, LayerNorm and dropout. Forward and backward each take
// one pass over memory. X is the type of x, R that of the residual and the total, O that of the norm's result.
#include "cpu/dropout.h"
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {
namespace {

// Pointer to row `row`, or to the last row if there are fewer; null if `rows` stands for zeros.
template <typename T>
TICKETOPS_INLINE const T* at(const Rows& rows, int64_t row, const Residual& args) {
  if (!rows.data) return nullptr;
  row = min(row, args.rows - 1);
  return static_cast<const T*>(rows.data) + (rows.places ? rows.places[row] : row) * args.channels;
}

// z = residual + dropout(x + bias + third) of one row, written to `z` in float32; returns its sum.
template <typename X, typename R>
float sum_row(const Residual& args, int64_t row, float* z) {
  const X *x = at<X>(args.x, row, args), *next_x = at<X>(args.x, row + 1, args);
  const X* third = at<X>(args.third, row, args);
  const R *residual = at<R>(args.residual, row, args), *next_residual = at<R>(args.residual, row + 1, args);
  const Dropout& dropout = args.dropout;
  const uint32_t key = row_key(dropout, row);
  Float total{};
  for_row(args.channels, [&](int64_t i, auto load, auto store) {
    if (x) fetch(next_x + i);
    fetch(next_residual + i);
    Float value{};
    if (x) value = load(x);
    if (args.bias) value += load(args.bias);
    if (third) value += load(third);
    if (dropout.threshold) value = drop(dropout, key, i, value * dropout.scale);
    value += load(residual);
    store(z, value);
    total += value;
  });
  return sum(total);
}

// (z - mean) rstd gamma + beta of one vector of a row.
template <typename Load>
TICKETOPS_INLINE Float normalised(const Norm& norm, int64_t row, Load load, const float* z) {
  const Float scaled = (load(z) - norm.mean[row]) * norm.rstd[row] * load(norm.gamma);
  return norm.beta ? scaled + load(norm.beta) : scaled;
}

}  // namespace

template <typename X, typename R, typename O>
void residual_forward(const ResidualForward& args) {
  constexpr int64_t chunk = 2 * residual_rows;
  const int64_t channels = args.channels;
  const Norm &first_norm = args.norms[0], &second_norm = args.norms[1];
  const Norm& last_norm = second_norm.gamma ? second_norm : first_norm;
  parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int thread) {
    const int64_t end = min((task + 1) * chunk, args.rows);
    for (int64_t first = task * chunk; first < end; first += residual_rows) {
      const int64_t rows = min(residual_rows, end - first);
      float* z = args.scratch + thread * residual_rows * channels;
      const auto measure = [&](const Norm& norm) {
        for (int64_t i = 0; i < rows; ++i) {
          const float mean = norm.mean[first + i];
          Float squares{};
          for_row(channels, [&](int64_t j, auto load, auto) {
            // Lanes after the last element hold zeros: do not count (0 - mean)^2.
            const Float centred = load(z + i * channels) - mean;
            squares += valid(j, channels, centred * centred);
          });
          norm.rstd[first + i] = 1.0f / __builtin_sqrtf(sum(squares) / channels + norm.eps);
        }
      };
      for (int64_t i = 0; i < rows; ++i) {
        const float total = sum_row<X, R>(args, first + i, z + i * channels);
        if (first_norm.gamma) first_norm.mean[first + i] = total / channels;
        R* copy = args.total ? static_cast<R*>(args.total) + (first + i) * channels : nullptr;
        for_row(copy ? channels : 0, [&](int64_t j, auto load, auto store) {
          fetch<true>(copy + j + channels);
          store(copy, load(z + i * channels));
        });
      }
      if (!first_norm.gamma) continue;
      measure(first_norm);
      if (second_norm.gamma) {
        for (int64_t i = 0; i < rows; ++i) {
          Float total{};
          for_row(channels, [&](int64_t j, auto load, auto store) {
            const Float value = valid(j, channels, normalised(first_norm, first + i, load, z + i * channels));
            store(z + i * channels, value);
            total += value;
          });
          second_norm.mean[first + i] = sum(total) / channels;
        }
        measure(second_norm);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = first + i;
        const uint32_t key = row_key(args.last, row);
        O* out = static_cast<O*>(args.out) + row * channels;
        Bf16* half = args.half ? args.half + row * channels : nullptr;
        for_row(channels, [&](int64_t j, auto load, auto store) {
          fetch<true>(out + j + channels);
          if (half) fetch<true>(half + j + channels);
          Float value = normalised(last_norm, row, load, z + i * channels);
          if (args.last.threshold) value = drop(args.last, key, j, value * args.last.scale);
          store(out, value);
          if (half) store(half, value);
        });
      }
    }
  });
}

// With N = (z - mean) rstd and G = gamma dOut: dz = rstd (G - mean(G) - N mean(G N)) + dTotal, dx = dropout(dz).
template <typename X, typename R, typename O>
void residual_backward(const ResidualBackward& args) {
  const int64_t channels = args.channels;
  const int64_t chunks = (args.rows + residual_chunk - 1) / residual_chunk;
  const Dropout& dropout = args.dropout;
  const Norm &first = args.norms[0], &second = args.norms[1];
  parallel(chunks, args.threads, [&](int64_t task, int) {
    float* dbias = args.scratch + task * residual_sums * channels;
    float *dgamma = dbias + channels, *dbeta = dgamma + channels;
    float *dgamma2 = dbeta + channels, *dbeta2 = dgamma2 + channels;
    float *normal = dbeta2 + channels, *gradient = normal + channels;
    for (int64_t i = 0; i < (second.gamma ? 5 : 3) * channels; ++i) dbias[i] = 0;
    const int64_t end = min((task + 1) * residual_chunk, args.rows);
    for (int64_t row = task * residual_chunk; row < end; ++row) {
      // The end of a row, from what reaches z through the norm.
      const auto finish = [&](auto through_norm) {
        const uint32_t key = row_key(dropout, row);
        const R* dtotal = args.dtotal ? static_cast<const R*>(args.dtotal) + row * channels : nullptr;
        X* dx = args.dx ? static_cast<X*>(args.dx) + row * channels : nullptr;
        R* dresidual = args.dresidual ? static_cast<R*>(args.dresidual) + row * channels : nullptr;
        for_row(channels, [&](int64_t i, auto load, auto store) {
          if (dtotal) fetch(dtotal + i + channels);
          if (dresidual) fetch<true>(dresidual + i + channels);
          if (dx) fetch<true>(dx + i + channels);
          Float dz = through_norm(i, load);
          if (dtotal) dz += load(dtotal);
          const Float dropped = dropout.threshold ? drop(dropout, key, i, dz * dropout.scale) : dz;
          if (dresidual) store(dresidual, dz);
          if (dx) store(dx, dropped);
          store(dbias, load(dbias) + dropped);
        });
      };
      if (!first.gamma) {
        finish([](int64_t, auto) { return Float{}; });
        continue;
      }
      sum_row<X, R>(args, row, normal);
      const O* dout = static_cast<const O*>(args.dout) + row * channels;
      const float mean = first.mean[row], rstd = first.rstd[row];
      const uint32_t last_key = row_key(args.last, row);
      // The gradient of the last norm's output, before the last dropout.
      const auto norm_gradient = [&](int64_t i, auto load) {
        const Float value = load(dout);
        return args.last.threshold ? drop(args.last, last_key, i, value * args.last.scale) : value;
      };
      Float total{}, product{};
      const auto add_up = [&](auto load, auto store, Float value, Float centred) {
        const Float scaled = value * load(first.gamma);
        total += scaled;
        product += scaled * centred;
        store(dgamma, load(dgamma) + value * centred);
        store(dbeta, load(dbeta) + value);
      };
      if (second.gamma) {
        const float mean2 = second.mean[row], rstd2 = second.rstd[row];
        const auto centred2 = [&](auto load) {
          const Float scaled = load(normal) * load(first.gamma);
          return ((first.beta ? scaled + load(first.beta) : scaled) - mean2) * rstd2;
        };
        Float total2{}, product2{};
        for_row(channels, [&](int64_t i, auto load, auto store) {
          fetch(dout + i + channels);
          store(normal, (load(normal) - mean) * rstd);
          const Float value = norm_gradient(i, load), scaled = value * load(second.gamma), centred = centred2(load);
          total2 += scaled;
          product2 += scaled * centred;
          store(dgamma2, load(dgamma2) + value * centred);
          store(dbeta2, load(dbeta2) + value);
        });
        const float mean_total = sum(total2) / channels, mean_product = sum(product2) / channels;
        for_row(channels, [&](int64_t i, auto load, auto store) {
          const Float scaled = norm_gradient(i, load) * load(second.gamma);
          const Float value = (scaled - mean_total - centred2(load) * mean_product) * rstd2;
          store(gradient, value);
          add_up(load, store, value, load(normal));
        });
      } else {
        for_row(channels, [&](int64_t i, auto load, auto store) {
          fetch(dout + i + channels);
          const Float value = norm_gradient(i, load), centred = (load(normal) - mean) * rstd;
          store(normal, centred);
          add_up(load, store, value, centred);
        });
      }
      const float mean_total = sum(total) / channels, mean_product = sum(product) / channels;
      finish([&](int64_t i, auto load) {
        const Float value = second.gamma ? load(gradient) : norm_gradient(i, load);
        return (value * load(first.gamma) - mean_total - load(normal) * mean_product) * rstd;
      });
    }
  });
  for (int i = 0; i < 5; ++i)
    if (args.sums[i])
      sum_rows(args.scratch + i * channels, chunks, residual_sums * channels, channels, args.sums[i], args.threads);
}

#define INSTANTIATE(X, R, O)                                        \
  template void residual_forward<X, R, O>(const ResidualForward&);  \
  template void residual_backward<X, R, O>(const ResidualBackward&);
INSTANTIATE(float, float, float)
INSTANTIATE(Bf16, float, float)
INSTANTIATE(Bf16, float, Bf16)
INSTANTIATE(Bf16, Bf16, Bf16)

}  // namespace ticketops::TICKETOPS_ISA
