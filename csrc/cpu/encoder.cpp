// An encoder layer for few tokens, without gradients. All matrices are transposed: rows are channels, columns are
// tokens. So weights are left operands, which are read once and in place; the result of each product is the right
// operand of the next; and softmax and LayerNorm are vertical operations on vectors of tokens.
#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/product.h"
#ifdef __AMX_BF16__
#include "cpu/tiles.h"
#endif

namespace ticketops::TICKETOPS_ISA {
namespace {

// Rounds to bfloat16 where the path with gradients stores a bfloat16.
template <bool half>
TICKETOPS_INLINE Float stored(Float x) {
  if constexpr (half) return rounded(x);
  return x;
}

template <typename T>
TICKETOPS_INLINE float element(const void* data, int64_t i) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = static_cast<uint32_t>(static_cast<const Bf16*>(data)[i].bits) << 16;
    float x;
    __builtin_memcpy(&x, &word, sizeof x);
    return x;
  } else {
    return static_cast<const float*>(data)[i];
  }
}

// Calls body(j) for each vector of a transposed row.
template <typename F>
TICKETOPS_INLINE void for_lanes(const Encoder& args, F body) {
  for (int64_t j = 0; j < args.row(); j += W) body(j);
}

// Reads the tokens [T, C] and writes their transpose to `x`, with zeros after the last token.
template <typename T>
void read_tokens(const Encoder& args, float* x) {
  for_lanes(args, [&](int64_t j) {
    const int64_t some = args.tokens - j;
    const T* row = static_cast<const T*>(args.x) + j * args.channels;
    for (int64_t c = 0; c < args.channels; c += W) {
      const int64_t count = min(W, args.channels - c);
      Float tile[W] = {};
      for (int64_t i = 0; i < min(W, some); ++i)
        tile[i] = count == W ? load(row + i * args.channels + c) : load(row + i * args.channels + c, count);
      transpose(tile);
      for (int64_t lane = 0; lane < count; ++lane) store(x + (c + lane) * args.row() + j, tile[lane]);
    }
  });
}

// Writes a vector of tokens, j .. j + W - 1, of the transposed `x` to the output [T, C].
template <typename T>
void write_tokens(const Encoder& args, int64_t j, const float* x) {
  const int64_t some = args.tokens - j;
  T* row = static_cast<T*>(args.out) + j * args.channels;
  for (int64_t c = 0; c < args.channels; c += W) {
    const int64_t count = min(W, args.channels - c);
    Float tile[W] = {};
    for (int64_t lane = 0; lane < count; ++lane) tile[lane] = load(x + (c + lane) * args.row() + j);
    transpose(tile);
    for (int64_t i = 0; i < min(W, some); ++i) {
      T* to = row + i * args.channels + c;
      count == W ? store(to, tile[i]) : store(to, tile[i], count);
    }
  }
}

// Rows of weights as the left operand of a product: all columns, or if `some` those at `places`. During the product the
// rows `next` are prefetched.
template <typename T, bool some>
struct Weights : Left {
  const int64_t* places;
  const T* const* next;

  TICKETOPS_INLINE int64_t place(int64_t k) const { return some ? places[k] : k; }
  TICKETOPS_INLINE float at(int64_t i, int64_t k) const { return Left::at(i, place(k)); }
  TICKETOPS_INLINE Weights below(int64_t rows) const { return {Left::below(rows), places, next + rows}; }
  TICKETOPS_INLINE void fetch(int64_t rows, int64_t k) const {
    // Once for each cache line; twice as often if some columns are skipped.
    constexpr int64_t step = 64 / sizeof(T) / (some ? 2 : 1);
    if (k % step == 0)
      for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(next[i] + place(k), 0, 3);
  }
};

#ifdef __AVX512BF16__
constexpr bool in_pairs = true;

// The same in bfloat16, in pairs of columns. The columns at `places` have been copied next to each other.
template <typename T, bool some>
struct PairedWeights : Pairs {
  const int64_t* places;
  const T* const* next;

  TICKETOPS_INLINE PairedWeights below(int64_t rows) const { return {Pairs::below(rows), places, next + rows}; }
  TICKETOPS_INLINE void fetch(int64_t rows, int64_t k) const {
    constexpr int64_t step = 32 / sizeof(T) / (some ? 2 : 1);
    if (k % step == 0)
      for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(next[i] + (some ? places[2 * k] : 2 * k), 0, 3);
  }
};

// Copies the columns of a row of weights as bfloat16, with a zero after an odd number of them. Prefetches the row
// `next`, if there is one.
template <typename T>
void copy_columns(const T* from, const int64_t* places, int64_t depth, Bf16* to, const T* next = nullptr) {
  for_row(depth, [&](int64_t k, auto load, auto store) {
    if (!places) {
      if (next) __builtin_prefetch(next + k, 0, 3);
      return store(to, load(from));
    }
    if (next) __builtin_prefetch(next + places[k], 0, 3);
    float columns[W] = {};
    for (int64_t lane = 0; lane < min(W, depth - k); ++lane) columns[lane] = element<T>(from, places[k + lane]);
    store(to, ticketops::TICKETOPS_ISA::load(columns));
  });
  if (depth % 2) __builtin_memset(to + depth, 0, sizeof(Bf16));
}
#else
constexpr bool in_pairs = false;
#endif

#ifdef __AMX_BF16__
// With AMX, `pair_rows` pads to whole tiles.
constexpr bool in_tiles = true;

// out = A x for `count` rows of A; row(i) returns a pointer to row i. `pairs` is x in pairs of rows.
template <typename T, typename Row>
void multiply_tiles(const Encoder& args, int64_t count, const int64_t* places, int64_t depth, Row row,
                    const T* const* next, const float* pairs, float* scratch, float* out) {
  const int64_t depth_pairs = whole((depth + 1) / 2, tile), stride = attention_stride(depth_pairs);
  const int64_t rows = whole(count, tile);
  for (int64_t i = 0; i < count; ++i) {
    float* const to = scratch + i * stride;
    if (depth_pairs) zero(to + depth_pairs - tile, 1, tile, stride);
    copy_columns(row(i), places, depth, reinterpret_cast<Bf16*>(to), next[i]);
  }
  zero(scratch + count * stride, rows - count, depth_pairs, stride);
  // Whole tiles of rows would overwrite the matrix after `out`: compute in scratch, then copy.
  float* const sums = rows > count ? scratch + rows * stride : out;
  {
    const Tiles tiles;
    tile_product(rows, args.row(), depth_pairs, scratch, stride, pairs, args.row(), sums, args.row());
  }
  if (sums != out) __builtin_memcpy(out, sums, count * args.row() * sizeof(float));
}
#else
constexpr bool in_tiles = false;
#endif

// Converts x [depth][row], numbers rounded to bfloat16, to pairs of rows [depth / 2][row]. Pads an odd number of rows
// with zeros, and with AMX to whole tiles.
void pair_rows(const Encoder& args, const float* x, int64_t depth, float* pairs) {
  int64_t k = 0;
  for (; k < depth; k += 2, x += 2 * args.row(), pairs += args.row())
    for_lanes(args, [&](int64_t j) {
      const Word low = bits(load(x + j)) >> 16, high = k + 1 < depth ? bits(load(x + args.row() + j)) : Word{};
      store(pairs + j, as_float(low | (high & 0xFFFF0000)));
    });
  for (; in_tiles && k % encoder_pairs; k += 2, pairs += args.row())
    for_lanes(args, [&](int64_t j) { store(pairs + j, Float{}); });
}

// out = A x, then finish(i, row i of out) for each row. row(i) returns a pointer to row i of A, of `columns` elements.
// Of these, the `depth` ones at `places` are multiplied (null: all).
template <typename T, bool half, typename Row, typename Finish>
TICKETOPS_INLINE void multiply(const Encoder& args, float* scratch, int64_t rows, int64_t columns,
                               const int64_t* places, int64_t depth, Row row, const float* x, float* out,
                               Finish finish) {
  float* const pairs = scratch + args.threads * args.thread_scratch();
  if (half && in_pairs) pair_rows(args, x, depth, pairs);
  constexpr int64_t block = half && in_tiles ? encoder_tile_block : encoder_block;
  parallel((rows + block - 1) / block, args.threads, [&](int64_t task, int thread) {
    const int64_t first = task * block, count = min(block, rows - first);
    float* const target = out + first * args.row();
    const T* next[block];
    for (int64_t i = 0; i < block; ++i) next[i] = row(min(first + args.threads * block + i, rows - 1));
    float* const copy = scratch + thread * args.thread_scratch();
    const auto times = [&](auto a, int64_t k, const float* right) {
      product<false>(count, args.row(), k, a, right, args.row(), target, args.row());
      for (int64_t i = 0; i < count; ++i) finish(first + i, target + i * args.row());
    };
#ifdef __AMX_BF16__
    if constexpr (half) {
      multiply_tiles(args, count, places, depth, [&](int64_t i) { return row(first + i); }, next, pairs, copy, target);
      for (int64_t i = 0; i < count; ++i) finish(first + i, target + i * args.row());
      return;
    }
#elif defined(__AVX512BF16__)
    if constexpr (half) {
      const int64_t depth_pairs = (depth + 1) / 2, stride = attention_stride(depth_pairs);
      for (int64_t i = 0; i < count; ++i)
        copy_columns(row(first + i), places, depth, reinterpret_cast<Bf16*>(copy + i * stride));
      const Pairs weights{{copy, stride, 1}};
      return places ? times(PairedWeights<T, true>{weights, places, next}, depth_pairs, pairs)
                    : times(PairedWeights<T, false>{weights, nullptr, next}, depth_pairs, pairs);
    }
#endif
    const float* weights = nullptr;
    int64_t stride = columns;
    if constexpr (sizeof(T) == 4 && !half) {
      weights = row(first);
      for (int64_t i = 1; i < count; ++i)
        if (row(first + i) != row(first) + i * columns) weights = nullptr;
    }
    if (!weights) {
      stride = attention_stride(columns);
      for (int64_t i = 0; i < count; ++i) {
        const T* from = row(first + i);
        for_row(depth ? columns : 0, [&](int64_t k, auto load, auto) {
          store(copy + i * stride + k, stored<half && sizeof(T) == 4>(load(from)));
        });
      }
      weights = copy;
    }
    if (places)
      times(Weights<T, true>{{weights, stride, 1}, places, next}, depth, x);
    else
      times(Weights<T, false>{{weights, stride, 1}, nullptr, next}, depth, x);
  });
}

template <bool half>
void attend(const Encoder& args, float* scratch, const float* qkv, float* context) {
  const int64_t heads = args.width / args.head_dim, depth = args.head_dim, row = args.row();
  parallel(args.batch * heads, args.threads, [&](int64_t task, int thread) {
    const Segment& sequence = args.sequences[task / heads];
    const int64_t n = sequence.length, at = task % heads * depth * row + sequence.start;
    if (!n) return;
    const int64_t columns = padded(n), stride = attention_stride(n);
    const float *q = qkv + at, *k = q + args.width * row, *v = k + args.width * row;
    float* scores = scratch + thread * args.thread_scratch();  // [keys][queries]
    float* out = scores + n * stride;  // [depth][queries]
    float* factors = out + depth * stride;  // [queries]
    const float* bias = gather_bias(args.bias, task % heads, n, true, factors + stride);
    product<false>(n, columns, depth, Left{k, 1, row}, q, row, scores, stride);
    for (int64_t j = 0; j < columns; j += W) {
      const auto score = [&](int64_t i) {
        const Float x = load(scores + i * stride + j) * args.scale;
        return bias ? x + load(bias + j - i) : x;
      };
      Float largest = score(0), total{};
      for (int64_t i = 1; i < n; ++i) largest = larger(score(i), largest);
      for (int64_t i = 0; i < n; ++i) {
        const Float weight = exp(score(i) - largest);
        total += weight;
        store(scores + i * stride + j, weight);
      }
      store(factors + j, 1.0f / total);
    }
    product<false>(depth, columns, n, Left{v, row, 1}, scores, stride, out, stride);
    for (int64_t d = 0; d < depth; ++d)
      for_row(n, [&](int64_t, auto load, auto store) {
        store(context + at + d * row, stored<half>(load(out + d * stride) * load(factors)));
      });
  });
}

// LayerNorm of x in place. If `operand` is another matrix, it gets a copy, rounded as an operand of products. If
// `last`, the result is also written to the output.
template <typename T, bool half>
void normalise(const Encoder& args, const void* gamma, const void* beta, float eps, float* x, float* operand,
               bool last) {
  const int64_t channels = args.channels, row = args.row();
  parallel(row / W, args.threads, [&](int64_t task, int) {
    float* column = x + task * W;
    constexpr int chains = 4;
    Float totals[chains] = {}, squares[chains] = {};
    for (int64_t c = 0; c < channels; c += chains)
      for (int i = 0; i < chains; ++i)
        if (c + i < channels) totals[i] += load(column + (c + i) * row);
    const Float mean = ((totals[0] + totals[1]) + (totals[2] + totals[3])) / static_cast<float>(channels);
    for (int64_t c = 0; c < channels; c += chains)
      for (int i = 0; i < chains; ++i)
        if (c + i < channels) {
          const Float centred = load(column + (c + i) * row) - mean;
          squares[i] += centred * centred;
        }
    Float rstd = ((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(channels) + eps;
    for (int lane = 0; lane < W; ++lane) rstd[lane] = 1.0f / __builtin_sqrtf(rstd[lane]);
    for (int64_t c = 0; c < channels; ++c) {
      float* p = column + c * row;
      const Float value = (load(p) - mean) * rstd * element<T>(gamma, c) + element<T>(beta, c);
      store(p, stored<sizeof(T) == 2>(value));
      if (operand != x) store(operand + task * W + c * row, stored<half>(value));
    }
    if (last) write_tokens<T>(args, task * W, x);
  });
}

// Copies the columns of the sequences' first tokens to `to` [rows][to_row]. An empty sequence gets an arbitrary column.
void gather_first(const Encoder& args, int64_t rows, const float* from, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i, from += args.row(), to += to_row) {
    for (int64_t b = 0; b < args.batch; ++b) to[b] = from[min(args.sequences[b].start, args.tokens - 1)];
    for (int64_t b = args.batch; b < to_row; ++b) to[b] = 0;
  }
}

int64_t place(const int64_t* places, int64_t i) { return places ? places[i] : i; }

template <typename T>
const T* weight_row(const Linear& linear, int64_t i, int64_t columns) {
  return static_cast<const T*>(linear.weight) + i * columns;
}

// The layer after attention: output projection, LayerNorm, FFN, LayerNorm. x [channels][row]: the layer's input; middle
// [channels][row]: gets the first LayerNorm's output; operand [channels][row]: gets the same rounded to bfloat16, if
// the products take it so; context [width][row]: attention's output; hidden [neurons][row]: scratch.
template <typename T, bool half>
void after_attention(const Encoder& args, float* x, float* middle, float* operand, const float* context,
                     float* hidden, float* scratch) {
  const int64_t channels = args.channels, row = args.row();
  constexpr bool cast = half && sizeof(T) == 4;
  multiply<T, half>(
      args, scratch, channels, args.all_width, args.width_places, args.width,
      [&](int64_t i) { return weight_row<T>(args.output, i, args.all_width); }, context, middle,
      [&](int64_t i, float* to) {
        const float bias = element<T>(args.output.bias, i);
        for_lanes(args, [&](int64_t j) {
          store(to + j, stored<half>(load(to + j)) + bias + load(x + i * row + j));
        });
      });
  normalise<T, half>(args, args.gamma1, args.beta1, args.eps1, middle, cast ? operand : middle, false);
  // Test the bias: the weights of an FFN without neurons are empty tensors, whose address is null.
  if (!args.second.bias) {
    normalise<T, half>(args, args.gamma2, args.beta2, args.eps2, middle, middle, true);
    return;
  }
  with_activation(args.activation, [&](auto activation) {
    multiply<T, half>(
        args, scratch, args.neurons, channels, nullptr, channels,
        [&](int64_t i) { return weight_row<T>(args.first, place(args.neuron_places, i), channels); },
        cast ? operand : middle, hidden, [&](int64_t i, float* to) {
          const float bias = element<T>(args.first.bias, place(args.neuron_places, i));
          for_lanes(args, [&](int64_t j) {
            store(to + j, stored<half>(activation.at(stored<half>(load(to + j) + bias)).output));
          });
        });
  });
  multiply<T, half>(
      args, scratch, channels, args.all_neurons, args.neuron_places, args.neurons,
      [&](int64_t i) { return weight_row<T>(args.second, i, args.all_neurons); }, hidden, x,
      [&](int64_t i, float* to) {
        const float bias = element<T>(args.second.bias, i);
        for_lanes(args, [&](int64_t j) {
          store(to + j, stored<half>(load(to + j) + bias) + load(middle + i * row + j));
        });
      });
  normalise<T, half>(args, args.gamma2, args.beta2, args.eps2, x, x, true);
}

}  // namespace

template <typename T, bool half>
void encoder(const Encoder& args) {
  const int64_t channels = args.channels, width = args.width, row = args.row();
  float* x = args.scratch;  // [channels][row], like the next two
  float* middle = x + channels * row;
  float* operand = middle + channels * row;  // x rounded to bfloat16, if the products take it so
  float* qkv = operand + channels * row;  // [3 * width][row]
  float* context = qkv + 3 * width * row;  // [width][row]
  float* hidden = context + width * row;  // [neurons][row]
  float* scratch = hidden + args.neurons * row + 16;
  constexpr bool cast = half && sizeof(T) == 4;

  read_tokens<T>(args, x);
  if (cast)
    for (int64_t i = 0; i < channels * row; i += W) store(operand + i, rounded(load(x + i)));
  if (width) {
    const Linear* const linears[] = {&args.q, &args.k, &args.v};
    multiply<T, half>(
        args, scratch, 3 * width, channels, nullptr, channels,
        [&](int64_t i) { return weight_row<T>(*linears[i / width], place(args.width_places, i % width), channels); },
        cast ? operand : x, qkv, [&](int64_t i, float* to) {
          const float bias = element<T>(linears[i / width]->bias, place(args.width_places, i % width));
          for_lanes(args, [&](int64_t j) { store(to + j, stored<half>(load(to + j) + bias)); });
        });
    // `attend` does not write the columns of tokens outside all sequences.
    for (int64_t i = 0; i < width * row; i += W) store(context + i, Float{});
    attend<half>(args, scratch, qkv, context);
  }
  if (!args.first_tokens) return after_attention<T, half>(args, x, middle, operand, context, hidden, scratch);
  // From here on, each sequence is one token.
  Encoder first = args;
  first.tokens = args.batch;
  first.first_tokens = false;
  gather_first(args, width, context, qkv, first.row());
  gather_first(args, channels, x, operand, first.row());
  after_attention<T, half>(first, operand, middle, x, qkv, hidden, scratch);
}

template void encoder<float, false>(const Encoder&);
template void encoder<float, true>(const Encoder&);
template void encoder<Bf16, true>(const Encoder&);

}  // namespace ticketops::TICKETOPS_ISA
