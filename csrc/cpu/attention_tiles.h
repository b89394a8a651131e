// Attention of one head of one sequence in bfloat16 with AMX: tiles of 16 rows of 16 pairs, accumulated in float32.
//
// Operands are stored as pairs: two bfloat16 numbers in the place of one float32, adjacent in the product's inner
// dimension. They are padded with zeros to whole tiles; strides are in float32. Scores are transposed, with a row for
// each key and a lane for each query of a block. So softmax and delta are vertical operations, and their results can be
// stored directly as operands of the next products: P^T and dS^T in pairs of queries for dV and dK, in pairs of keys
// for O^T and dQ^T.
#pragma once

#include "cpu/attention.h"
#include "cpu/tiles.h"

namespace ticketops::TICKETOPS_ISA {

// Rounds two vectors to bfloat16: `low` to the lower half of the result, `high` to the upper half.
TICKETOPS_INLINE __m512i halves(Float low, Float high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Stores the lower half of `halves` to `low` and its upper half to `high`.
TICKETOPS_INLINE void store_halves(float* low, float* high, __m512i halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(low), _mm512_castsi512_si256(halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(high), _mm512_extracti64x4_epi64(halves, 1));
}

// Interleaves the two halves: lane i of the result is the pair (lower[i], upper[i]).
TICKETOPS_INLINE Float paired(__m512i halves) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Float>(_mm512_permutexvar_epi16(_mm512_load_si512(order), halves));
}

// Copies one head's rows to `packed` [whole tiles of rows][whole tiles of pairs of channels].
inline void gather_rows(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth, float* packed,
                        int64_t stride) {
  const View pairs = pairs_of(view);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = static_cast<const float*>(pairs.data) + (start + i) * pairs.row + head * pairs.head;
    for_row(depth / 2, [&](int64_t p, auto load, auto) { store(packed + i * stride + p, load(row)); });
  }
  zero(packed + rows * stride, whole(rows, tile) - rows, stride, stride);
}

// Copies their transpose in pairs of channels to `packed` [whole tiles of pairs of channels][whole tiles of rows].
inline void gather_columns(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth, float* packed,
                           int64_t stride) {
  gather_transposed<float>(pairs_of(view), start, rows, head, depth / 2, packed, stride);
  zero(packed + depth / 2 * stride, whole(depth / 2, tile) - depth / 2, whole(rows, tile), stride);
}

// Copies at most 32 rows in pairs of rows to `packed` [tile][whole tiles of channels].
inline void gather_row_pairs(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth, float* packed,
                             int64_t stride) {
  const Bf16* first = static_cast<const Bf16*>(view.data) + start * view.row + head * view.head;
  for (int64_t i = 0; i + 1 < rows; i += 2)
    for_row(depth, [&](int64_t d, auto load, auto) {
      const Float low = load(first + i * view.row), high = load(first + (i + 1) * view.row);
      store(packed + i / 2 * stride + d, as_float(bits(low) >> 16 | bits(high)));
    });
  if (rows % 2)
    for_row(depth, [&](int64_t d, auto load, auto) {
      store(packed + rows / 2 * stride + d, as_float(bits(load(first + (rows - 1) * view.row)) >> 16));
    });
  zero(packed + (rows + 1) / 2 * stride, tile - (rows + 1) / 2, stride, stride);
}

// Copies the transpose in pairs of rows to `packed` [whole tiles of channels][stride], with zeros after the last row.
inline void gather_column_pairs(const View& view, int64_t start, int64_t rows, int64_t head, int64_t depth,
                                float* packed, int64_t stride) {
  const View pairs = pairs_of(view);
  uint16_t* target = reinterpret_cast<uint16_t*>(packed);
  for (int64_t i = 0; i < rows; i += W) {
    const float* row = static_cast<const float*>(pairs.data) + (start + i) * pairs.row + head * pairs.head;
    const int64_t some = min(W, rows - i);
    for (int64_t p = 0; p < depth / 2; p += W) {
      const int64_t count = min(W, depth / 2 - p);
      Float square[W] = {};
      for (int64_t j = 0; j < some; ++j)
        square[j] = count == W ? load(row + j * pairs.row + p) : load(row + j * pairs.row + p, count);
      transpose(square);
      for (int64_t lane = 0; lane < count; ++lane) {
        const __m512i both = reinterpret_cast<__m512i>(square[lane]);
        const __m256i even = _mm512_cvtepi32_epi16(both), odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16));
        uint16_t* at = target + 2 * (p + lane) * 2 * stride + i;
        __builtin_memcpy(at, &even, sizeof even);
        __builtin_memcpy(at + 2 * stride, &odd, sizeof odd);
      }
    }
  }
  const int64_t written = whole(rows, W);
  for (int64_t d = 0; d < depth; ++d)
    __builtin_memset(target + d * 2 * stride + written, 0, (2 * stride - written) * 2);
  zero(packed + depth * stride, whole(depth, tile) - depth, stride, stride);
}

// Writes the transpose of `packed` [channels][stride], column i times factors[i], to one head of rows start ..
// start + rows - 1 of `target`.
inline void scatter_columns(const float* packed, int64_t stride, const Attention& args, int64_t start, int64_t rows,
                            int64_t head, const float* factors, void* target, int64_t target_row) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t d = 0; d < args.head_dim; d += W) {
      Float square[W];
      for (int64_t j = 0; j < W; ++j) square[j] = load(packed + (d + j) * stride + i) * load(factors + i);
      transpose(square);
      const int64_t count = min(W, args.head_dim - d);
      for (int64_t j = 0; j < min(W, rows - i); ++j) {
        Bf16* row = static_cast<Bf16*>(target) + (start + i + j) * target_row + head * args.head_dim + d;
        if (count == W)
          store(row, square[j]);
        else
          store(row, square[j], count);
      }
    }
}

// The scores of one key and the queries query .. query + W - 1, with -inf for queries that do not attend to the key. A hole
// keeps its score of itself, so that the softmax is finite.
TICKETOPS_INLINE Float seen(const Attention& args, const Segment& sequence, int64_t key, int64_t query, Float scores) {
  const int64_t window = is_hole(args, sequence.start + key) ? 0 : args.window;
  const Word distance = static_cast<uint32_t>(key + window - query) - lanes();
  return distance <= static_cast<uint32_t>(2 * window) ? scores : splat(-__builtin_inff());
}

inline void forward_in_tiles(const AttentionForward& args, const Segment& sequence, int64_t head, float mask,
                             float* scratch) {
  constexpr int64_t block = attention_tile_queries;
  const int64_t n = sequence.length, queries = queries_of(args, sequence);
  const int64_t depth = args.head_dim, channels = whole(depth, tile);
  const int64_t depth_pairs = whole(depth / 2, tile), all_keys = whole(n, 2 * tile), v_stride = all_keys / 2 + tile;
  const bool windowed = args.window < n - 1, limited = windowed || args.real;
  float* k = scratch;                              // [keys][pairs of channels]
  float* v = k + all_keys * depth_pairs;           // [channels][pairs of keys]
  float* q = v + channels * v_stride;              // [pairs of channels][queries]
  float* scores = q + depth_pairs * block;         // [keys][queries]
  float* weights = scores + all_keys * block;      // [pairs of keys][queries]
  float* out = weights + all_keys / 2 * block;     // [channels][queries]
  const float* bias = gather_bias(args.bias, head, n, true, out + channels * block);
  const Tiles tiles;
  gather_rows(args.k, sequence.start, n, head, depth, k, depth_pairs);
  gather_column_pairs(args.v, sequence.start, n, head, depth, v, v_stride);
  for (int64_t first = 0; first < queries; first += block) {
    const int64_t rows = min(block, queries - first), start = sequence.start + first, columns = whole(rows, tile);
    const Keys keys = keys_of(args, first, rows, n);
    gather_columns(args.q, start, rows, head, depth, q, block);
    tile_product(whole(keys.count, tile), columns, depth_pairs, k + keys.first * depth_pairs, depth_pairs, q, block,
                 scores, block);
    alignas(64) float factors[block];
    for (int64_t i = 0; i < columns; i += W) {
      const auto score = [&](int64_t j) {
        Float x = load(scores + j * block + i) * args.scale;
        if (bias) x += load(bias + first + i - keys.first - j);
        return limited ? seen(args, sequence, keys.first + j, first + i, x) : x;
      };
      Float top = score(0);
      for (int64_t j = 1; j < keys.count; ++j) top = larger(score(j), top);
      const Word words = row_keys(args.dropout, (start + i) * args.heads + head, args.heads);
      Float total{};
      const auto weight = [&](int64_t j) {
        const Float x = exp(score(j) - top);
        total += x;
        return args.dropout.threshold ? drop(args.dropout, words, keys.first + j, x) : x;
      };
      int64_t j = 0;
      for (; j + 2 <= keys.count; j += 2) {
        const Float low = weight(j), high = weight(j + 1);
        store(weights + j / 2 * block + i, paired(halves(low, high)));
      }
      if (j < keys.count) store(weights + j / 2 * block + i, paired(halves(weight(j), Float{})));
      zero(weights + (keys.count + 1) / 2 * block + i, (whole(keys.count, 2 * tile) - keys.count) / 2, W, block);
      store(factors + i, mask * args.dropout.scale / total);
      alignas(64) float tops[W], totals[W];
      store(tops, top);
      store(totals, total);
      for (int64_t lane = 0; lane < min(W, rows - i); ++lane) {
        // An lse of infinity makes all weights of a hole 0 in the backward pass.
        const bool hole = is_hole(args, start + i + lane);
        const float lse = tops[lane] + __builtin_logf(totals[lane]);
        args.lse[(start + i + lane) * args.heads + head] = hole ? __builtin_inff() : lse;
        if (hole) factors[i + lane] = 0;
      }
    }
    tile_product(channels, columns, whole(keys.count, 2 * tile) / 2, v + keys.first / 2, v_stride, weights, block, out,
                 block);
    scatter_columns(out, block, args, start, rows, head, factors, args.out, args.heads * depth);
  }
}

// Sums over queries of delta / mask and of its absolute value.
struct DeltaSums {
  double signed_sum, absolute_sum;
};

// The formulas are at attention_backward. bias_sums: gets the row of the bias's gradient.
inline DeltaSums backward_in_tiles(const AttentionBackward& args, const Segment& sequence, int64_t head, float mask,
                                   float* scratch, float* bias_sums) {
  constexpr int64_t block = attention_tile_queries;
  const Dropout& dropout = args.dropout;
  const int64_t n = sequence.length, queries = queries_of(args, sequence);
  const int64_t depth = args.head_dim, channels = whole(depth, tile);
  const int64_t depth_pairs = whole(depth / 2, tile), all_keys = whole(n, 2 * tile), k_stride = all_keys / 2 + tile;
  const bool windowed = args.window < n - 1, limited = windowed || args.real;
  float* k_rows = scratch;                            // [keys][pairs of channels]
  float* v_rows = k_rows + all_keys * depth_pairs;
  float* k = v_rows + all_keys * depth_pairs;         // [channels][pairs of keys]
  float* dk = k + channels * k_stride;                // [keys][channels]
  float* dv = dk + all_keys * channels;
  float* q_columns = dv + all_keys * channels;        // [pairs of channels][queries]
  float* dout_columns = q_columns + depth_pairs * block;
  float* q = dout_columns + depth_pairs * block;      // [pairs of queries][channels]
  float* dout = q + block / 2 * channels;
  float* scores = dout + block / 2 * channels;        // [keys][queries]
  float* dweights = scores + all_keys * block;
  float* weights = dweights + all_keys * block;       // [keys][pairs of queries]
  float* dscores = weights + all_keys * block / 2;
  float* dscore_pairs = dscores + all_keys * block / 2;  // [pairs of keys][queries]
  float* dq = dscore_pairs + all_keys / 2 * block;    // [channels][queries]
  float* bias = gather_bias(args.bias, head, n, true, dq + channels * block);
  float* dbias = zero_distances(bias, n);
  const Tiles tiles;
  gather_rows(args.k, sequence.start, n, head, depth, k_rows, depth_pairs);
  gather_rows(args.v, sequence.start, n, head, depth, v_rows, depth_pairs);
  gather_column_pairs(args.k, sequence.start, n, head, depth, k, k_stride);
  // With a window the first block of queries does not write all rows of dk and dv.
  if (windowed) zero(dk, 2 * all_keys, channels, channels);
  alignas(64) float factors[block];
  for (float& factor : factors) factor = args.scale;
  DeltaSums sums{};
  for (int64_t first = 0; first < queries; first += block) {
    const int64_t rows = min(block, queries - first), start = sequence.start + first, columns = whole(rows, tile);
    const Keys keys = keys_of(args, first, rows, n);
    const int64_t count = whole(keys.count, tile), count_in_pairs = whole(keys.count, 2 * tile) / 2;
    gather_columns(args.q, start, rows, head, depth, q_columns, block);
    gather_columns(args.dout, start, rows, head, depth, dout_columns, block);
    gather_row_pairs(args.q, start, rows, head, depth, q, channels);
    gather_row_pairs(args.dout, start, rows, head, depth, dout, channels);
    tile_product(count, columns, depth_pairs, k_rows + keys.first * depth_pairs, depth_pairs, q_columns, block, scores,
                 block);
    tile_product(count, columns, depth_pairs, v_rows + keys.first * depth_pairs, depth_pairs, dout_columns, block,
                 dweights, block);
    for (int64_t i = 0; i < block; i += W) {
      // With an lse of infinity, the weights of the lanes after the last query are zeros.
      alignas(64) float lses[W], deltas[W] = {};
      store(lses, splat(__builtin_inff()));
      for (int64_t lane = 0; lane < min(W, rows - i); ++lane) {
        const int64_t row = start + i + lane, at = row * args.heads + head;
        const Bf16* out_row = static_cast<const Bf16*>(args.out) + at * depth;
        const Bf16* dout_row = static_cast<const Bf16*>(args.dout.data) + row * args.dout.row + head * args.dout.head;
        Float products{};
        for_row(depth, [&](int64_t, auto load, auto) { products += load(dout_row) * load(out_row); });
        lses[lane] = args.lse[at];
        deltas[lane] = sum(products);
        sums.signed_sum += deltas[lane] / mask;
        sums.absolute_sum += __builtin_fabsf(deltas[lane] / mask);
      }
      const Float lse = load(lses), delta = load(deltas);
      const Word words = row_keys(dropout, (start + i) * args.heads + head, args.heads);
      struct Pair {
        Float weight, dscore;
      };
      const auto at = [&](int64_t j) {
        Float score = load(scores + j * block + i) * args.scale, dweight = load(dweights + j * block + i) * mask;
        if (bias) score += load(bias + first + i - keys.first - j);
        if (limited) score = seen(args, sequence, keys.first + j, first + i, score);
        const Float weight = exp(score - lse);
        Float dropped = weight;
        if (dropout.threshold) {
          dropped = drop(dropout, words, keys.first + j, weight * dropout.scale);
          dweight = drop(dropout, words, keys.first + j, dweight * dropout.scale);
        }
        const Float dscore = weight * (dweight - delta);
        if (dbias) {
          float* p = dbias + first + i - keys.first - j;
          store(p, load(p) + dscore);
        }
        return Pair{dropped, dscore};
      };
      const auto put = [&](int64_t j, Pair low, Pair high) {
        const __m512i weight = halves(low.weight, high.weight), dscore = halves(low.dscore, high.dscore);
        store_halves(weights + (j * block + i) / 2, weights + ((j + 1) * block + i) / 2, weight);
        store_halves(dscores + (j * block + i) / 2, dscores + ((j + 1) * block + i) / 2, dscore);
        store(dscore_pairs + j / 2 * block + i, paired(dscore));
      };
      int64_t j = 0;
      for (; i < columns && j + 2 <= keys.count; j += 2) put(j, at(j), at(j + 1));
      if (i < columns && j < keys.count) put(j, at(j), Pair{}), j += 2;
      for (; j < 2 * count_in_pairs; j += 2) put(j, Pair{}, Pair{});
    }
    const auto accumulate = first || windowed ? tile_product<true> : tile_product<false>;
    accumulate(count, channels, tile, weights, tile, dout, channels, dv + keys.first * channels, channels);
    accumulate(count, channels, tile, dscores, tile, q, channels, dk + keys.first * channels, channels);
    tile_product(channels, columns, count_in_pairs, k + keys.first / 2, k_stride, dscore_pairs, block, dq, block);
    scatter_columns(dq, block, args, start, rows, head, factors, args.dq, args.gradient_row);
  }
  scatter<Bf16>(dk, channels, args, sequence.start, n, head, args.scale, args.dk, args.gradient_row);
  scatter<Bf16>(dv, channels, args, sequence.start, n, head, mask, args.dv, args.gradient_row);
  if (args.bias.table) scatter_bias(args.bias, n, true, dbias, bias_sums);
  return sums;
}

}  // namespace ticketops::TICKETOPS_ISA
