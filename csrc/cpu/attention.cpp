// Masked attention over packed sequences, one head of one sequence at a time. Its operands are copied into float32
// scratch with padded rows, so that the same register-tiled matrix product computes all seven products for both dtypes.
// Only the scores of a block of queries exist at a time, and they stay in the cache.
//
// With AVX512-BF16 the products of two bfloat16 operands (scores and dP) read them in place. With AMX, bfloat16 heads
// of an even size are computed by attention_tiles.h. With position tables, all products are in float32.
#include "cpu/attention_positions.h"
#ifdef __AMX_BF16__
#include "cpu/attention_tiles.h"
#endif

namespace ticketops::TICKETOPS_ISA {
namespace {

constexpr int64_t query_block = attention_query_block;

// Returns true if rows are multiplied as pairs of bfloat16.
template <typename T>
bool in_pairs(const Attention& args) {
#ifdef __AVX512BF16__
  return sizeof(T) == 2 && args.head_dim % 2 == 0 && !args.positions.there();
#else
  return (void)args, false;
#endif
}

// Copies one head's rows, transposed, to `packed` [depth or pairs][stride]: the right operand of `row_products`.
template <typename T>
void gather_right(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth, bool pairs, float* packed,
                  int64_t stride) {
  if (pairs)
    gather_transposed<float>(pairs_of(view), start, rows, head, depth / 2, packed, stride);
  else
    gather_transposed<T>(view, start, rows, head, depth, packed, stride);
}

// out[i][j] = factor <row start + i of the view, column j of right>. If `pairs`, the rows are read from the view;
// otherwise `left` holds them, already multiplied by `factor`.
void row_products(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth, bool pairs, float factor,
                  const float* left, int64_t left_stride, const float* right, int64_t columns, float* out,
                  int64_t stride) {
#ifdef __AVX512BF16__
  if (pairs) {
    const View halved = pairs_of(view);
    const float* first = static_cast<const float*>(halved.data) + start * halved.row + head * halved.head;
    product<false>(rows, columns, depth / 2, Pairs{{first, halved.row, 1}}, right, stride, out, stride);
    for (int64_t i = 0; i < rows && factor != 1; ++i)
      for (int64_t j = 0; j < columns; j += W) store(out + i * stride + j, load(out + i * stride + j) * factor);
    return;
  }
#endif
  (void)view, (void)start, (void)head, (void)pairs, (void)factor;
  product<false>(rows, columns, depth, Left{left, left_stride, 1}, right, stride, out, stride);
}

// Prefetches one head's rows. They are far apart, so the hardware prefetcher does not help. In the cold caches of a
// training step this makes the passes take 0.75 to 0.88 times as long (12 heads of 32 and 64, float32 and bfloat16, two
// cores of an Intel Xeon).
template <typename T, bool write = false>
void fetch_head(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth) {
  const T* row = static_cast<const T*>(view.data) + start * view.row + head * view.head;
  for (int64_t i = 0; i < rows; ++i, row += view.row)
    for (int64_t d = 0; d < depth; d += 64 / sizeof(T)) fetch<write>(row + d);
}

// The sums of the position tables' gradients that the task of a sequence and a head adds to; null in the forward pass.
float* sums_of(const Attention&, int64_t, int64_t) { return nullptr; }
float* sums_of(const AttentionBackward& args, int64_t sequence, int64_t head) {
  const int64_t size = 2 * position_rows(args.positions.longest) * attention_stride(args.head_dim);
  return args.position_sums + (sequence / args.positions.sequences(args.batch) * args.heads + head) * size;
}

// Calls body(sequence, head, thread, more, bands) for all heads of all sequences. `more` is true if the same thread takes
// the next head afterwards. Heads of a sequence form one task as far as enough tasks remain to balance the threads. With
// position tables, sequences of a head form one task, for which the head's tables are copied once.
template <typename T, typename Args, typename F>
void for_heads(const Args& args, F body) {
  if (args.positions.there()) {
    const int64_t size = args.positions.sequences(args.batch);
    return parallel(args.positions.chunks(args.batch) * args.heads, args.threads, [&](int64_t task, int thread) {
      const int64_t head = task % args.heads, first = task / args.heads * size;
      const Bands bands = bands_of(args, thread, sums_of(args, first, head));
      gather_bands<T>(args, head, bands);
      for (int64_t b = first; b < min(first + size, args.batch); ++b) body(args.sequences[b], head, thread, false, bands);
    });
  }
  const int64_t some = args.batch * args.heads / (8 * args.threads), group = some < 1 ? 1 : min(some, args.heads);
  const int64_t groups = (args.heads + group - 1) / group;
  parallel(args.batch * groups, args.threads, [&](int64_t task, int thread) {
    const int64_t first = task % groups * group, last = min(first + group, args.heads);
    for (int64_t head = first; head < last; ++head) body(args.sequences[task / groups], head, thread, head + 1 < last, Bands{});
  });
}

// Adds the bias to the scores of one query. `bias`: see `gather_bias`.
void add_bias(float* scores, const Keys& keys, int64_t query, const float* bias) {
  for (int64_t j = 0; bias && j < keys.count; j += W)
    store(scores + j, load(scores + j) + load(bias + keys.first + j - query));
}

// Sets the scores of keys that the query does not attend to, and of the padding after the last key, to -inf. A hole keeps
// its score of itself, so that the softmax is finite.
void pad_scores(const Attention& args, const Segment& sequence, float* scores, const Keys& keys, int64_t query) {
  const int64_t window = args.window;
  const int64_t low = query - window - keys.first, high = query + window + 1 - keys.first;
  for (int64_t j = 0; j < low; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = min(high, keys.count); j < padded(keys.count); ++j) scores[j] = -__builtin_inff();
  for (int64_t j = 0; args.real && j < keys.count; ++j)
    if (is_hole(args, sequence.start + keys.first + j) && keys.first + j != query) scores[j] = -__builtin_inff();
}

}  // namespace

template <typename T>
void attention_forward(const AttentionForward& args) {
  for_heads<T>(args, [&](const Segment& sequence, int64_t head, int thread, bool more, const Bands& bands) {
    const int64_t n = sequence.length, queries = queries_of(args, sequence), depth = args.head_dim;
    if (more) {
      fetch_head<T>(args.q, sequence.start, queries, head + 1, depth);
      fetch_head<T>(args.k, sequence.start, n, head + 1, depth);
      fetch_head<T>(args.v, sequence.start, n, head + 1, depth);
      fetch_head<T, true>({args.out, args.heads * depth, depth}, sequence.start, n, head + 1, depth);
    }
    clear<T>(args, others_of(args, sequence), head, args.out, args.heads * depth);
    for (int64_t i = queries; i < n; ++i) args.lse[(sequence.start + i) * args.heads + head] = 0;
    const float mask = args.head_mask ? args.head_mask[head] : 1.0f;
    if (mask == 0) {
      clear<T>(args, sequence, head, args.out, args.heads * depth);
      for (int64_t i = 0; i < n; ++i) args.lse[(sequence.start + i) * args.heads + head] = 0;
      return;
    }
    const bool pairs = in_pairs<T>(args);
    float* scratch = args.scratch + thread * args.scratch_stride;
#ifdef __AMX_BF16__
    if (pairs) return forward_in_tiles(args, sequence, head, mask, scratch);
#endif
    const int64_t key_stride = attention_stride(n), stride = attention_stride(depth);
    float* k = scratch;  // [depth][key_stride], transposed
    float* v = k + depth * key_stride;  // [n][stride]
    float* q = v + n * stride;  // [query_block][stride]
    float* out = q + query_block * stride;  // [query_block][stride]
    float* scores = out + query_block * stride;  // [query_block][key_stride]
    const float* bias = gather_bias(args.bias, head, n, false, scores + query_block * key_stride);
    gather_right<T>(args.k, sequence.start, n, head, depth, pairs, k, key_stride);
    gather<T>(args.v, sequence.start, n, head, depth, 1, v, stride);
    for (int64_t first = 0; first < queries; first += query_block) {
      const int64_t rows = min(query_block, queries - first), start = sequence.start + first;
      if (!pairs) gather<T>(args.q, start, rows, head, depth, args.scale, q, stride);
      const Keys keys = keys_of(args, first, rows, n);
      row_products(args.q, start, rows, head, depth, pairs, args.scale, q, stride, k + keys.first, padded(keys.count),
                   scores, key_stride);
      add_positions(bands, depth, first, rows, n, args.scale, q, stride, {k, 1, key_stride}, scores, key_stride);
      float factors[query_block];
      for (int64_t i = 0; i < rows; ++i) {
        float* row = scores + i * key_stride;
        add_bias(row, keys, first + i, bias);
        pad_scores(args, sequence, row, keys, first + i);
        Float largest = load(row);
        for (int64_t j = W; j < keys.count; j += W) largest = larger(load(row + j), largest);
        const float top = max(largest);
        const uint32_t key = row_key(args.dropout, (start + i) * args.heads + head);
        Float total{};
        for (int64_t j = 0; j < keys.count; j += W) {
          const Float weight = exp(load(row + j) - top);
          total += weight;
          store(row + j, args.dropout.threshold ? drop(args.dropout, key, keys.first + j, weight) : weight);
        }
        const float normaliser = sum(total);
        // An lse of infinity makes all weights of a hole 0 in the backward pass.
        const bool hole = is_hole(args, start + i);
        args.lse[(start + i) * args.heads + head] = hole ? __builtin_inff() : top + __builtin_logf(normaliser);
        factors[i] = hole ? 0 : mask * args.dropout.scale / normaliser;
      }
      product<false>(rows, padded(depth), keys.count, {scores, key_stride, 1}, v + keys.first * stride, stride, out,
                     stride);
      for (int64_t i = 0; i < rows; ++i)
        scatter<T>(out + i * stride, stride, args, start + i, 1, head, factors[i], args.out, args.heads * depth);
    }
  });
}

// With P = softmax(S), R = keep / (1 - p), W = P * R, dO = m dOut and delta = rowsum(dOut * out):
//   dV = W^T dO,  dP = (dO V^T) * R,  dS = P * (dP - delta),  dQ = scale dS K,  dK = dS^T (scale Q),
//   and the mask's gradient is sum delta / m. The bias's gradient is the sum of dS over the pairs of one distance. Those of
//   position tables are at add_position_gradients.
template <typename T>
void attention_backward(const AttentionBackward& args) {
  for_heads<T>(args, [&](const Segment& sequence, int64_t head, int thread, bool more, const Bands& bands) {
    const int64_t n = sequence.length, queries = queries_of(args, sequence), depth = args.head_dim;
    const int64_t task = (&sequence - args.sequences) * args.heads + head;
    const int64_t bias_row = args.bias.table ? 2 * args.bias.reach + 1 : 0;
    float* bias_sums = args.bias_table + task * bias_row;
    if (more) {
      fetch_head<T>(args.dout, sequence.start, queries, head + 1, depth);
      fetch_head<T>(args.q, sequence.start, queries, head + 1, depth);
      fetch_head<T>(args.k, sequence.start, n, head + 1, depth);
      fetch_head<T>(args.v, sequence.start, n, head + 1, depth);
      fetch_head<T>({args.out, args.heads * depth, depth}, sequence.start, queries, head + 1, depth);
      void* const gradients[] = {args.dq, args.dk, args.dv};
      for (void* gradient : gradients)
        fetch_head<T, true>({gradient, args.gradient_row, depth}, sequence.start, n, head + 1, depth);
    }
    clear<T>(args, others_of(args, sequence), head, args.dq, args.gradient_row);
    const float mask = args.head_mask ? args.head_mask[head] : 1.0f;
    if (mask == 0) {
      clear<T>(args, sequence, head, args.dq, args.gradient_row);
      clear<T>(args, sequence, head, args.dk, args.gradient_row);
      clear<T>(args, sequence, head, args.dv, args.gradient_row);
      args.signed_sums[task] = args.absolute_sums[task] = 0;
      for (int64_t i = 0; i < bias_row; ++i) bias_sums[i] = 0;
      return;
    }
    const bool pairs = in_pairs<T>(args);
    float* scratch = args.scratch + thread * args.scratch_stride;
#ifdef __AMX_BF16__
    if (pairs) {
      const DeltaSums sums = backward_in_tiles(args, sequence, head, mask, scratch, bias_sums);
      args.signed_sums[task] = static_cast<float>(sums.signed_sum);
      args.absolute_sums[task] = static_cast<float>(sums.absolute_sum);
      return;
    }
#endif
    const Dropout& dropout = args.dropout;
    const int64_t key_stride = attention_stride(n), stride = attention_stride(depth);
    const int64_t channels = padded(depth);
    const bool windowed = args.window < n - 1;
    float* k_transposed = scratch;  // [depth][key_stride]
    float* v_transposed = k_transposed + depth * key_stride;
    float* k = v_transposed + depth * key_stride;  // [n][stride]
    float* dk = k + n * stride;
    float* dv = dk + n * stride;
    float* q = dv + n * stride;  // [query_block][stride]
    float* dout = q + query_block * stride;
    float* dq = dout + query_block * stride;
    float* weights = dq + query_block * stride;  // [query_block][key_stride]
    float* dscores = weights + query_block * key_stride;
    float* bias = gather_bias(args.bias, head, n, false, dscores + query_block * key_stride);
    float* dbias = zero_distances(bias, n);
    gather_right<T>(args.k, sequence.start, n, head, depth, pairs, k_transposed, key_stride);
    gather_right<T>(args.v, sequence.start, n, head, depth, pairs, v_transposed, key_stride);
    gather<T>(args.k, sequence.start, n, head, depth, 1, k, stride);
    // With a window the first block of queries does not write all rows of dk and dv.
    for (int64_t i = 0; windowed && i < 2 * n * stride; i += W) store(dk + i, Float{});
    double signed_sum = 0, absolute_sum = 0;
    for (int64_t first = 0; first < queries; first += query_block) {
      const int64_t rows = min(query_block, queries - first), start = sequence.start + first;
      gather<T>(args.q, start, rows, head, depth, args.scale, q, stride);
      gather<T>(args.dout, start, rows, head, depth, mask, dout, stride);
      const Keys keys = keys_of(args, first, rows, n);
      const int64_t columns = padded(keys.count), from = keys.first * stride;
      row_products(args.q, start, rows, head, depth, pairs, args.scale, q, stride, k_transposed + keys.first, columns,
                   weights, key_stride);
      row_products(args.dout, start, rows, head, depth, pairs, mask, dout, stride, v_transposed + keys.first, columns,
                   dscores, key_stride);
      add_positions(bands, depth, first, rows, n, args.scale, q, stride, {k, stride, 1}, weights, key_stride);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (start + i) * args.heads + head;
        const T* out_row = static_cast<const T*>(args.out) + at * depth;
        const T* dout_row = static_cast<const T*>(args.dout.data) + (start + i) * args.dout.row + head * args.dout.head;
        Float products{};
        for_row(depth, [&](int64_t, auto load, auto) { products += load(dout_row) * load(out_row); });
        const float delta = sum(products), lse = args.lse[at];
        signed_sum += delta / mask;
        absolute_sum += __builtin_fabsf(delta / mask);
        float* weight_row = weights + i * key_stride;
        float* dscore_row = dscores + i * key_stride;
        add_bias(weight_row, keys, first + i, bias);
        pad_scores(args, sequence, weight_row, keys, first + i);
        const uint32_t key = row_key(dropout, at);
        for (int64_t j = 0; j < keys.count; j += W) {
          const Float weight = exp(load(weight_row + j) - lse);
          Float dropped = weight, dweight = load(dscore_row + j);
          if (dropout.threshold) {
            dropped = drop(dropout, key, keys.first + j, weight * dropout.scale);
            dweight = drop(dropout, key, keys.first + j, dweight * dropout.scale);
          }
          store(weight_row + j, dropped);
          store(dscore_row + j, weight * (dweight - delta));
        }
        for (int64_t j = 0; dbias && j < keys.count; j += W) {
          float* p = dbias + keys.first + j - first - i;
          store(p, load(p) + load(dscore_row + j));
        }
      }
      product<false>(rows, channels, keys.count, {dscores, key_stride, 1}, k + from, stride, dq, stride);
      const auto accumulate = first || windowed ? product<true> : product<false>;
      accumulate(keys.count, channels, rows, {dscores, 1, key_stride}, q, stride, dk + from, stride);
      accumulate(keys.count, channels, rows, {weights, 1, key_stride}, dout, stride, dv + from, stride);
      add_position_gradients(bands, depth, first, rows, n, args.scale, q, dq, k, dk, stride, dscores, key_stride);
      scatter<T>(dq, stride, args, start, rows, head, args.scale, args.dq, args.gradient_row);
    }
    scatter<T>(dk, stride, args, sequence.start, n, head, 1, args.dk, args.gradient_row);
    scatter<T>(dv, stride, args, sequence.start, n, head, 1, args.dv, args.gradient_row);
    args.signed_sums[task] = static_cast<float>(signed_sum);
    args.absolute_sums[task] = static_cast<float>(absolute_sum);
    if (args.bias.table) scatter_bias(args.bias, n, false, dbias, bias_sums);
  });
  const int64_t columns = args.bias.table ? args.heads * (2 * args.bias.reach + 1) : 0;
  sum_rows(args.bias_table, args.batch, columns, columns, args.bias_sums, args.threads);
  if (args.positions.there()) sum_bands(args);
}

template void attention_forward<float>(const AttentionForward&);
template void attention_forward<Bf16>(const AttentionForward&);
template void attention_backward<float>(const AttentionBackward&);
template void attention_backward<Bf16>(const AttentionBackward&);

}  // namespace ticketops::TICKETOPS_ISA
