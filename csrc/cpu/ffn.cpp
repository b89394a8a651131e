// The pointwise part of the masked FFN. Forward: activation, dropout and mask. Backward: their gradient with the column
// sums and the importance sums. Each takes one pass over memory. torch computes the matrix products.
#include "cpu/activation.h"
#include "cpu/dropout.h"
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {
namespace {

// Columns of one task: rows of 2 KB are long enough for the hardware prefetcher, and their sums fit into the L1 cache.
constexpr int64_t column_block = 512;
constexpr int64_t rows_at_once = 32;

}  // namespace

template <typename T>
void ffn_forward(const FfnForward& args) {
  constexpr int64_t chunk = 16;
  with_activation(args.activation, [&](auto activation) {
    parallel((args.rows + chunk - 1) / chunk, args.threads, [&](int64_t task, int) {
      const int64_t end = min((task + 1) * chunk, args.rows);
      for (int64_t row = task * chunk; row < end; ++row) {
        const int64_t at = row * args.neurons, width = args.gated ? 2 * args.neurons : args.neurons;
        const T* pre = static_cast<const T*>(args.pre) + row * width;
        const T* gate = args.gated ? pre + args.neurons : nullptr;
        const float* gate_bias = args.bias ? args.bias + args.neurons : nullptr;
        const uint32_t key = row_key(args.dropout, row);
        T* hidden = static_cast<T*>(args.hidden) + at;
        T* masked = args.masked ? static_cast<T*>(args.masked) + at : nullptr;
        for_row(args.neurons, [&](int64_t i, auto load, auto store) {
          fetch(pre + i + width);
          fetch<true>(hidden + i + args.neurons);
          Float output = activation.at(args.bias ? load(pre) + load(args.bias) : load(pre)).output;
          if (gate) output *= args.bias ? load(gate) + load(gate_bias) : load(gate);
          if (args.dropout.threshold) output = drop(args.dropout, key, i, output * args.dropout.scale);
          store(hidden, output);
          if (masked) store(masked, output * load(args.neuron_mask));
        });
      }
    });
  });
}

// With G = dY W2 and n the mask: dA = G n act'(A), db1 = sum dA, dL/dn = sum G H; with a gate U, dA = G n U act'(A) and
// dU = G n act(A). With dropout, H includes R = keep / (1 - p), which multiplies G in dA and dU.
template <typename T>
void ffn_backward(const FfnBackward& args) {
  const int64_t blocks = (args.neurons + column_block - 1) / column_block;
  with_activation(args.activation, [&](auto activation) {
    parallel(args.segment_count * blocks, args.threads, [&](int64_t task, int) {
      const Segment& segment = args.segments[task / blocks];
      const int64_t first = task % blocks * column_block, columns = min(column_block, args.neurons - first);
      const float* mask = args.neuron_mask ? args.neuron_mask + first : nullptr;
      const float* bias = args.bias ? args.bias + first : nullptr;
      const float* gate_bias = bias ? bias + args.neurons : nullptr;
      const int64_t width = args.gated ? 2 * args.neurons : args.neurons;
      float bias_sums[column_block] = {}, gate_sums[column_block] = {}, neuron_sums[column_block] = {};
      for (int64_t i = 0; i < segment.length; i += rows_at_once) {
        // Sum in two levels: a single float32 sum over hundreds of rows would lose digits.
        float bias_part[column_block] = {}, neuron_part[column_block] = {}, gate_part[column_block];
        for (int64_t j = 0; args.gated && j < columns; ++j) gate_part[j] = 0;
        const int64_t end = segment.start + min(i + rows_at_once, segment.length);
        for (int64_t row = segment.start + i; row < end; ++row) {
          const int64_t at = row * args.neurons + first;
          const T* gradient = static_cast<const T*>(args.gradient) + at;
          const T* pre = static_cast<const T*>(args.pre) + row * width + first;
          const T* gate = args.gated ? pre + args.neurons : nullptr;
          T* target = static_cast<T*>(args.target) + row * width + first;
          const T* hidden = args.hidden ? static_cast<const T*>(args.hidden) + at : nullptr;
          T* masked = args.masked ? static_cast<T*>(args.masked) + at : nullptr;
          const uint32_t key = row_key(args.dropout, row);
          for_row(columns, [&](int64_t i, auto load, auto store) {
            fetch(gradient + i + args.neurons);
            fetch(pre + i + width);
            if (args.neuron_sums || masked) fetch(hidden + i + args.neurons);
            if (target != gradient) fetch<true>(target + i + width);
            Float value = load(gradient);
            if (args.neuron_sums) {
              const Float term = value * load(hidden);
              store(neuron_part, load(neuron_part) + (args.neuron_absolute ? abs(term) : term));
            }
            if (masked) store(masked, load(hidden) * load(mask));
            if (mask) value *= load(mask);
            if (args.dropout.threshold) value = drop(args.dropout, key, first + i, value * args.dropout.scale);
            const auto at_pre = activation.at(bias ? load(pre) + load(bias) : load(pre));
            if (gate) {
              const Float dgate = value * at_pre.output;
              store(target + args.neurons, dgate);
              store(gate_part, load(gate_part) + dgate);
              value *= bias ? load(gate) + load(gate_bias) : load(gate);
            }
            value *= at_pre.derivative;
            store(target, value);
            store(bias_part, load(bias_part) + value);
          });
        }
        for (int64_t j = 0; j < columns; ++j) {
          bias_sums[j] += bias_part[j];
          neuron_sums[j] += neuron_part[j];
          if (args.gated) gate_sums[j] += gate_part[j];
        }
      }
      const auto copy = [=](const float* from, float* to) {
        for (int64_t j = 0; j < columns; ++j) to[j] = from[j];
      };
      if (args.bias_table) {
        float* table = args.bias_table + task / blocks * width + first;
        copy(bias_sums, table);
        if (args.gated) copy(gate_sums, table + args.neurons);
      }
      if (args.neuron_sums && segment.sequence >= 0)
        copy(neuron_sums, args.neuron_sums + segment.sequence * args.neurons + first);
    });
  });
  if (args.bias_table) {
    const int64_t width = args.gated ? 2 * args.neurons : args.neurons;
    sum_rows(args.bias_table, args.segment_count, width, width, args.bias_sums, args.threads);
  }
}

template <typename T>
void token_sums(const TokenSums& args) {
  parallel(args.batch, args.threads, [&](int64_t task, int) {
    const Segment& sequence = args.sequences[task];
    double signed_sum = 0, absolute_sum = 0;
    for (int64_t i = 0; i < sequence.length; ++i) {
      const int64_t at = (sequence.start + i) * args.channels;
      const T *a = static_cast<const T*>(args.a) + at, *b = static_cast<const T*>(args.b) + at;
      Float products{};
      for_row(args.channels, [&](int64_t, auto load, auto) {
        products += load(a) * (args.bias ? load(b) + load(args.bias) : load(b));
      });
      const float term = sum(products) / args.mask;
      signed_sum += term;
      absolute_sum += __builtin_fabsf(term);
    }
    args.signed_sums[sequence.sequence] = static_cast<float>(signed_sum);
    args.absolute_sums[sequence.sequence] = static_cast<float>(absolute_sum);
  });
}

#define INSTANTIATE(T)                               \
  template void ffn_forward<T>(const FfnForward&);   \
  template void ffn_backward<T>(const FfnBackward&); \
  template void token_sums<T>(const TokenSums&);
INSTANTIATE(float)
INSTANTIATE(Bf16)

}  // namespace ticketops::TICKETOPS_ISA
