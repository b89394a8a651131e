// The Python module ticketops._native. Tensors are passed as integer addresses; the callers in
// ticketops/ops/*/native.py have checked their device, dtype, size and strides. Values that index memory (sequences,
// ids, places) are checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef TICKETOPS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "built_from.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace py = pybind11;
using namespace ticketops;
using Address = std::uintptr_t;

namespace {

#ifdef __x86_64__
// Each includes the ones before it.
enum class Isa { avx2, avx512, avx512bf16, amx };
constexpr const char* isa_names[] = {"avx2", "avx512", "avx512bf16", "amx"};

#ifdef TICKETOPS_AMX
// Returns true if the processor has AMX with bfloat16 and the system lets this process use it.
bool may_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  // On Linux a process must ask for the tile registers: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

// Instruction sets that were compiled and that the processor has, the lowest first.
std::vector<Isa> find_isas() {
#ifdef TICKETOPS_WIDE
  return {Isa::avx512};
#endif
  std::vector<Isa> found;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(Isa::avx2);
  if (found.empty() || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return found;
  found.push_back(Isa::avx512);
#ifdef TICKETOPS_AVX512BF16
  if (!__builtin_cpu_supports("avx512bf16")) return found;
  found.push_back(Isa::avx512bf16);
#ifdef TICKETOPS_AMX
  if (may_use_amx()) found.push_back(Isa::amx);
#endif
#endif
  return found;
}

const std::vector<Isa> available = find_isas();
Isa chosen = available.empty() ? Isa::avx2 : available.back();
const char* name(Isa isa) { return isa_names[static_cast<int>(isa)]; }
const char* isa() { return name(chosen); }
std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa each : available) names.push_back(name(each));
  return names;
}
void use_isa(const std::string& wanted) {
  for (Isa each : available)
    if (wanted == name(each)) {
      chosen = each;
      return;
    }
  throw std::invalid_argument("no instruction set " + wanted);
}
bool is_intel() { return __builtin_cpu_is("intel"); }
#ifdef TICKETOPS_AMX
#define AMX_KERNEL(...) chosen == Isa::amx ? &amx::__VA_ARGS__:
#else
#define AMX_KERNEL(...)
#endif
#ifdef TICKETOPS_AVX512BF16
#define AVX512BF16_KERNEL(...) chosen == Isa::avx512bf16 ? &avx512bf16::__VA_ARGS__:
#else
#define AVX512BF16_KERNEL(...)
#endif
#define KERNEL(...)                                                                                          \
  (AMX_KERNEL(__VA_ARGS__) AVX512BF16_KERNEL(__VA_ARGS__) chosen == Isa::avx512 ? &avx512::__VA_ARGS__ \
                                                                                : &avx2::__VA_ARGS__)
#else
const char* isa() { return "generic"; }
std::vector<std::string> isas() { return {"generic"}; }
void use_isa(const std::string& wanted) {
  if (wanted != isa()) throw std::invalid_argument("no instruction set " + wanted);
}
bool is_intel() { return false; }
#define KERNEL(...) (&generic::__VA_ARGS__)
#endif

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

View view(Address data, int64_t row, int64_t head) { return {pointer<void>(data), row, head}; }

struct FreeMemory {
  void operator()(float* memory) const { free_memory(memory); }
};
// Uninitialised, since the kernels write it anyway.
using Scratch = std::unique_ptr<float[], FreeMemory>;
Scratch allocate(int64_t floats) { return Scratch(static_cast<float*>(allocate_memory(floats * sizeof(float)))); }

Dropout dropout(uint64_t seed, uint32_t threshold, double p) {
  return {seed, threshold, static_cast<float>(1.0 / (1.0 - p))};
}

PositionBias position_bias(Address table, int64_t reach, int64_t longest) {
  if (table && reach < longest - 1)
    throw std::invalid_argument("the position bias reaches " + std::to_string(reach) + " tokens, but max_length is " +
                                std::to_string(longest));
  return {pointer<float>(table), reach};
}

// Of each of two tables of position vectors the address and two strides, and how far the tables reach.
using PositionArguments = std::array<int64_t, 7>;

PositionTables position_tables(const PositionArguments& from, int64_t longest) {
  const auto table = [&](int i) { return view(static_cast<Address>(from[i]), from[i + 1], from[i + 2]); };
  const PositionTables tables{table(0), table(3), from[6], std::max<int64_t>(longest, 1)};
  if (tables.there() && tables.reach < tables.longest - 1)
    throw std::invalid_argument("the position tables reach " + std::to_string(tables.reach) +
                                " tokens, but max_length is " + std::to_string(longest));
  return tables;
}

int64_t attention_scratch_with(const PositionTables& tables, int64_t head_dim) {
  return attention_scratch(tables.longest, head_dim) +
         (tables.there() ? position_scratch(tables.longest, head_dim) : 0);
}

std::vector<Segment> read_sequences(Address starts, Address lengths, int64_t batch, int64_t rows, int64_t longest) {
  std::vector<Segment> sequences(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t start = pointer<int32_t>(starts)[b], length = pointer<int32_t>(lengths)[b];
    if (start < 0 || length < 0 || start + length > rows || length > longest)
      throw std::invalid_argument("sequence " + std::to_string(b) + " is rows " + std::to_string(start) + " .. " +
                                  std::to_string(start + length - 1) + ", but there are " + std::to_string(rows) +
                                  " rows and max_length is " + std::to_string(longest));
    sequences[b] = {start, length, b};
  }
  return sequences;
}

// Returns segments that cover all rows in order: the sequences, and the gaps between them.
std::vector<Segment> cover(std::vector<Segment> sequences, int64_t rows) {
  std::stable_sort(sequences.begin(), sequences.end(), [](const Segment& a, const Segment& b) {
    return a.start != b.start ? a.start < b.start : a.length < b.length;
  });
  std::vector<Segment> segments;
  int64_t end = 0;
  for (const Segment& sequence : sequences) {
    if (sequence.length && sequence.start < end)
      throw std::invalid_argument("sequences overlap at row " + std::to_string(sequence.start));
    if (sequence.length && sequence.start > end) segments.push_back({end, sequence.start - end, -1});
    segments.push_back(sequence);
    if (sequence.length) end = sequence.start + sequence.length;
  }
  if (rows > end) segments.push_back({end, rows - end, -1});
  return segments;
}

// Writes zeros to the rows of `target` that are in no sequence: `row_bytes` bytes each, `stride` bytes apart.
void clear_gaps(const std::vector<Segment>& segments, Address target, int64_t row_bytes, int64_t stride) {
  for (const Segment& segment : segments)
    for (int64_t row = segment.start; segment.sequence < 0 && row < segment.start + segment.length; ++row)
      std::memset(pointer<char>(target) + row * stride, 0, row_bytes);
}

void attention_forward(bool bf16, Address q, int64_t q_row, int64_t q_head, Address k, int64_t k_row, int64_t k_head,
                       Address v, int64_t v_row, int64_t v_head, Address out, Address lse, Address starts,
                       Address lengths, Address real, Address head_mask, Address bias, int64_t reach,
                       const PositionArguments& positions, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                       int64_t max_length, int64_t window, bool first_tokens, double scale,
                       uint64_t seed, uint32_t threshold, double p, int threads) {
  const auto sequences = read_sequences(starts, lengths, batch, tokens, max_length);
  const auto segments = cover(sequences, tokens);
  const PositionTables tables = position_tables(positions, max_length);
  const Scratch scratch = allocate(threads * attention_scratch_with(tables, head_dim));
  AttentionForward args;
  args.heads = heads;
  args.head_dim = head_dim;
  args.sequences = sequences.data();
  args.batch = batch;
  args.head_mask = pointer<float>(head_mask);
  args.dropout = dropout(seed, threshold, p);
  args.scale = static_cast<float>(scale);
  args.bias = position_bias(bias, reach, max_length);
  args.positions = tables;
  args.window = window;
  args.real = pointer<uint8_t>(real);
  args.first_tokens = first_tokens;
  args.scratch = scratch.get();
  args.scratch_stride = attention_scratch_with(tables, head_dim);
  args.threads = threads;
  args.q = view(q, q_row, q_head);
  args.k = view(k, k_row, k_head);
  args.v = view(v, v_row, v_head);
  args.out = pointer<void>(out);
  args.lse = pointer<float>(lse);
  const int64_t row_bytes = heads * head_dim * (bf16 ? 2 : 4);
  clear_gaps(segments, out, row_bytes, row_bytes);
  clear_gaps(segments, lse, heads * 4, heads * 4);
  (bf16 ? KERNEL(attention_forward<Bf16>) : KERNEL(attention_forward<float>))(args);
}

void attention_backward(bool bf16, Address dout, int64_t dout_row, int64_t dout_head, Address q, int64_t q_row,
                        int64_t q_head, Address k, int64_t k_row, int64_t k_head, Address v, int64_t v_row,
                        int64_t v_head, Address out, Address lse, Address starts, Address lengths, Address real,
                        Address head_mask, Address bias, int64_t reach, const PositionArguments& positions, Address dq,
                        Address dk, Address dv, int64_t gradient_row, Address signed_sums, Address absolute_sums, Address dbias,
                        const std::array<Address, 2>& dpositions, int64_t batch, int64_t tokens, int64_t heads,
                        int64_t head_dim, int64_t max_length, int64_t window, bool first_tokens, double scale, uint64_t seed,
                        uint32_t threshold, double p, int threads) {
  const auto sequences = read_sequences(starts, lengths, batch, tokens, max_length);
  const auto segments = cover(sequences, tokens);
  const PositionTables tables = position_tables(positions, max_length);
  const Scratch scratch = allocate(threads * attention_scratch_with(tables, head_dim));
  const int64_t summed = tables.chunks(batch) * heads * 2 * position_rows(tables.longest) * attention_stride(head_dim);
  const Scratch position_sums = allocate(tables.there() ? summed : 0);
  const Scratch bias_table = allocate(bias ? batch * heads * (2 * reach + 1) : 0);
  AttentionBackward args;
  args.heads = heads;
  args.head_dim = head_dim;
  args.sequences = sequences.data();
  args.batch = batch;
  args.head_mask = pointer<float>(head_mask);
  args.dropout = dropout(seed, threshold, p);
  args.scale = static_cast<float>(scale);
  args.bias = position_bias(bias, reach, max_length);
  args.positions = tables;
  args.window = window;
  args.real = pointer<uint8_t>(real);
  args.first_tokens = first_tokens;
  args.scratch = scratch.get();
  args.scratch_stride = attention_scratch_with(tables, head_dim);
  args.threads = threads;
  args.dout = view(dout, dout_row, dout_head);
  args.q = view(q, q_row, q_head);
  args.k = view(k, k_row, k_head);
  args.v = view(v, v_row, v_head);
  args.out = pointer<void>(out);
  args.lse = pointer<float>(lse);
  args.dq = pointer<void>(dq);
  args.dk = pointer<void>(dk);
  args.dv = pointer<void>(dv);
  args.signed_sums = pointer<float>(signed_sums);
  args.absolute_sums = pointer<float>(absolute_sums);
  args.bias_table = bias_table.get();
  args.bias_sums = pointer<float>(dbias);
  args.position_sums = position_sums.get();
  args.key_sums = pointer<float>(dpositions[0]);
  args.query_sums = pointer<float>(dpositions[1]);
  args.gradient_row = gradient_row;
  const int64_t element = bf16 ? 2 : 4;
  for (Address target : {dq, dk, dv}) clear_gaps(segments, target, heads * head_dim * element, gradient_row * element);
  (bf16 ? KERNEL(attention_backward<Bf16>) : KERNEL(attention_backward<float>))(args);
}

void ffn_forward(bool bf16, int activation, Address pre, Address bias, Address hidden, Address masked,
                 Address neuron_mask, bool gated, int64_t rows, int64_t neurons, uint64_t seed, uint32_t threshold,
                 double p, int threads) {
  const FfnForward args{rows,
                        neurons,
                        static_cast<Activation>(activation),
                        gated,
                        pointer<void>(pre),
                        pointer<float>(bias),
                        pointer<void>(hidden),
                        pointer<void>(masked),
                        pointer<float>(neuron_mask),
                        dropout(seed, threshold, p),
                        threads};
  (bf16 ? KERNEL(ffn_forward<Bf16>) : KERNEL(ffn_forward<float>))(args);
}

void ffn_backward(bool bf16, int activation, Address gradient, Address target, Address pre, Address bias,
                  Address hidden, Address masked, Address neuron_mask, Address bias_sums, Address neuron_sums,
                  bool neuron_absolute, Address starts, Address lengths, bool gated, int64_t batch, int64_t rows,
                  int64_t neurons, uint64_t seed, uint32_t threshold, double p, int threads) {
  std::vector<Segment> segments;
  if (neuron_sums) {
    segments = cover(read_sequences(starts, lengths, batch, rows, rows), rows);
  } else {
    constexpr int64_t chunk = 64;
    for (int64_t start = 0; start < rows; start += chunk)
      segments.push_back({start, std::min(chunk, rows - start), -1});
  }
  const Scratch bias_table = allocate(bias_sums ? segments.size() * neurons * (1 + gated) : 0);
  FfnBackward args;
  args.rows = rows;
  args.neurons = neurons;
  args.activation = static_cast<Activation>(activation);
  args.gated = gated;
  args.gradient = pointer<void>(gradient);
  args.target = pointer<void>(target);
  args.pre = pointer<void>(pre);
  args.bias = pointer<float>(bias);
  args.hidden = pointer<void>(hidden);
  args.masked = pointer<void>(masked);
  args.neuron_mask = pointer<float>(neuron_mask);
  args.segments = segments.data();
  args.segment_count = static_cast<int64_t>(segments.size());
  args.bias_table = bias_sums ? bias_table.get() : nullptr;
  args.bias_sums = pointer<float>(bias_sums);
  args.neuron_sums = pointer<float>(neuron_sums);
  args.neuron_absolute = neuron_absolute;
  args.dropout = dropout(seed, threshold, p);
  args.threads = threads;
  (bf16 ? KERNEL(ffn_backward<Bf16>) : KERNEL(ffn_backward<float>))(args);
}

void token_sums(bool bf16, Address a, Address b, Address bias, Address starts, Address lengths, double mask,
                Address signed_sums, Address absolute_sums, int64_t batch, int64_t rows, int64_t channels,
                int threads) {
  const auto sequences = read_sequences(starts, lengths, batch, rows, rows);
  const TokenSums args{channels,
                       pointer<void>(a),
                       pointer<void>(b),
                       pointer<float>(bias),
                       sequences.data(),
                       batch,
                       static_cast<float>(mask),
                       pointer<float>(signed_sums),
                       pointer<float>(absolute_sums),
                       threads};
  (bf16 ? KERNEL(token_sums<Bf16>) : KERNEL(token_sums<float>))(args);
}

// The kernel for the dtypes of x, of the residual and of the norm's result. The latter two are float32 or x's dtype.
#define RESIDUAL_KERNEL(name)                             \
  (residual_bf16 ? KERNEL(name<Bf16, Bf16, Bf16>)         \
   : out_bf16    ? KERNEL(name<Bf16, float, Bf16>)        \
   : x_bf16      ? KERNEL(name<Bf16, float, float>)       \
                 : KERNEL(name<float, float, float>))

// Addresses of gamma, beta, mean and rstd; zeros for no norm.
using NormAddresses = std::array<Address, 4>;
Norm norm(const NormAddresses& addresses, double eps) {
  const auto at = [&](int i) { return pointer<float>(addresses[i]); };
  return {at(0), at(1), static_cast<float>(eps), at(2), at(3)};
}

// Addresses of x, third and residual, each with that of its rows' places.
using RowAddresses = std::array<std::array<Address, 2>, 3>;

void set_residual(Residual& args, int64_t rows, int64_t channels, const RowAddresses& sources, Address bias,
                  const std::array<NormAddresses, 2>& norms, std::array<double, 2> eps, Dropout dropped, Dropout last,
                  const Scratch& scratch, int threads) {
  args.rows = rows;
  args.channels = channels;
  Rows* const each[] = {&args.x, &args.third, &args.residual};
  for (int i = 0; i < 3; ++i) *each[i] = {pointer<void>(sources[i][0]), pointer<int64_t>(sources[i][1])};
  args.bias = pointer<float>(bias);
  for (int i = 0; i < 2; ++i) args.norms[i] = norm(norms[i], eps[i]);
  args.dropout = dropped;
  args.last = last;
  args.scratch = scratch.get();
  args.threads = threads;
}

void residual_forward(bool x_bf16, bool residual_bf16, bool out_bf16, Address x, Address residual, Address bias,
                      const std::array<NormAddresses, 2>& norms, Address total, Address out, Address half,
                      int64_t rows, int64_t channels, std::array<double, 2> eps, uint64_t seed, uint32_t threshold, double p,
                      int threads) {
  const Scratch scratch = allocate(threads * residual_rows * channels);
  ResidualForward args;
  set_residual(args, rows, channels, {{{x, 0}, {0, 0}, {residual, 0}}}, bias, norms, eps, dropout(seed, threshold, p),
               {}, scratch, threads);
  args.total = pointer<void>(total);
  args.out = pointer<void>(out);
  args.half = pointer<Bf16>(half);
  RESIDUAL_KERNEL(residual_forward)(args);
}

void residual_backward(bool x_bf16, bool residual_bf16, bool out_bf16, Address dout, Address dtotal, Address x,
                       Address residual, Address bias, const std::array<NormAddresses, 2>& norms, Address dx,
                       Address dresidual,
                       const std::array<Address, 5>& sums, int64_t rows, int64_t channels, uint64_t seed,
                       uint32_t threshold, double p, int threads) {
  const Scratch scratch = allocate((rows + residual_chunk - 1) / residual_chunk * residual_sums * channels);
  ResidualBackward args;
  set_residual(args, rows, channels, {{{x, 0}, {0, 0}, {residual, 0}}}, bias, norms, {}, dropout(seed, threshold, p),
               {}, scratch, threads);
  args.dout = pointer<void>(dout);
  args.dtotal = pointer<void>(dtotal);
  args.dx = pointer<void>(dx);
  args.dresidual = pointer<void>(dresidual);
  for (int i = 0; i < 5; ++i) args.sums[i] = pointer<float>(sums[i]);
  RESIDUAL_KERNEL(residual_backward)(args);
}

void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= rows)
      throw std::invalid_argument("id " + std::to_string(ids[i]) + " is not among the " + std::to_string(rows) +
                                  " rows of the table");
}

// Checks the ids of the three tables: words, token types (0 if there are none) and positions.
void check_tables(const RowAddresses& tables, const std::array<int64_t, 3>& sizes, int64_t rows) {
  for (int i = 0; i < 3; ++i)
    // Test the ids' address: that of a table without rows is null, and every id is wrong for it.
    if (tables[i][1]) check_ids(pointer<int64_t>(tables[i][1]), rows, sizes[i]);
}

void embeddings_forward(bool bf16, const RowAddresses& tables, const std::array<int64_t, 3>& sizes,
                        const NormAddresses& addresses, Address out, int64_t rows, int64_t channels, double eps,
                        uint64_t seed, uint32_t threshold, double p, int threads) {
  check_tables(tables, sizes, rows);
  const Scratch scratch = allocate(threads * residual_rows * channels);
  ResidualForward args;
  set_residual(args, rows, channels, tables, 0, {addresses, {}}, {eps, 0}, {}, dropout(seed, threshold, p), scratch,
               threads);
  args.total = nullptr;
  args.out = pointer<void>(out);
  args.half = nullptr;
  (bf16 ? KERNEL(residual_forward<Bf16, Bf16, Bf16>) : KERNEL(residual_forward<float, float, float>))(args);
}

// dz [rows, channels]: gets the gradient of the sum of the embeddings.
void embeddings_backward(bool bf16, Address dout, const RowAddresses& tables, const std::array<int64_t, 3>& sizes,
                         const NormAddresses& addresses, Address dz, Address dgamma, Address dbeta, int64_t rows,
                         int64_t channels, uint64_t seed, uint32_t threshold, double p, int threads) {
  check_tables(tables, sizes, rows);
  const Scratch scratch = allocate((rows + residual_chunk - 1) / residual_chunk * residual_sums * channels);
  ResidualBackward args;
  set_residual(args, rows, channels, tables, 0, {addresses, {}}, {}, {}, dropout(seed, threshold, p), scratch, threads);
  args.dout = pointer<void>(dout);
  args.dtotal = nullptr;
  args.dx = nullptr;
  args.dresidual = pointer<void>(dz);
  float* const sums[] = {nullptr, pointer<float>(dgamma), pointer<float>(dbeta), nullptr, nullptr};
  std::copy(std::begin(sums), std::end(sums), args.sums);
  (bf16 ? KERNEL(residual_backward<Bf16, Bf16, Bf16>) : KERNEL(residual_backward<float, float, float>))(args);
}

void add(bool total_bf16, Address total, Address x, int64_t x_row, int64_t rows, int64_t columns,
                 int threads) {
  const Add args{rows, columns, pointer<void>(total), pointer<void>(x), x_row, threads};
  (total_bf16 ? KERNEL(add<Bf16, float>) : KERNEL(add<float, Bf16>))(args);
}

void column_sums(bool bf16, Address x, Address sums, int64_t rows, int64_t columns, int threads) {
  const Scratch scratch = allocate((rows + sum_chunk - 1) / sum_chunk * 2 * columns);
  const ColumnSums args{rows, columns, pointer<void>(x), scratch.get(), pointer<float>(sums), threads};
  (bf16 ? KERNEL(column_sums<Bf16>) : KERNEL(column_sums<float>))(args);
}

void dropout_rows(bool bf16, Address x, Address out, int64_t rows, int64_t columns, uint64_t seed, uint32_t threshold,
                  double p, int threads) {
  const DropoutRows args{rows, columns, pointer<void>(x), pointer<void>(out), dropout(seed, threshold, p), threads};
  (bf16 ? KERNEL(dropout<Bf16>) : KERNEL(dropout<float>))(args);
}

void rotary(bool bf16, Address x, int64_t row, Address cosines, Address sines, bool back, int64_t rows, int64_t heads,
            int64_t head_dim, int threads) {
  const Rotary args{rows,  heads, head_dim, pointer<void>(x), row, pointer<float>(cosines), pointer<float>(sines),
                    back, threads};
  (bf16 ? KERNEL(rotary<Bf16>) : KERNEL(rotary<float>))(args);
}

void transpose(Address x, Address out, int64_t rows, int64_t columns, int threads) {
  KERNEL(transpose)({rows, columns, pointer<Bf16>(x), pointer<Bf16>(out), threads});
}

void embedding_gradient(bool bf16, Address ids, Address x, Address table, int64_t size, int64_t rows, int64_t columns,
                        int64_t skipped, int threads) {
  const int64_t* places = pointer<int64_t>(ids);
  check_ids(places, rows, size);
  const EmbeddingGradient args{size, rows, columns, places, pointer<void>(x), pointer<void>(table), skipped, threads};
  (bf16 ? KERNEL(embedding_gradient<Bf16>) : KERNEL(embedding_gradient<float>))(args);
}

void check_places(const char* what, const int64_t* places, int64_t count, int64_t all) {
  for (int64_t i = 0; i < count; ++i)
    if (places[i] < 0 || places[i] >= all)
      throw std::invalid_argument(std::string(what) + " " + std::to_string(places[i]) + " is not among the " +
                                  std::to_string(all) + " of the layer");
}

// `parameters` are in the order of ticketops.ops.layer.Weights. `heads` and `neurons` are null if all are computed.
void encoder(bool x_bf16, bool bf16, int activation, Address x, Address out, const std::array<Address, 16>& parameters,
             Address bias, int64_t reach, Address heads, Address neurons, Address starts, Address lengths, int64_t batch, int64_t tokens,
             int64_t channels, int64_t all_heads, int64_t head_dim, int64_t head_count, int64_t all_neurons,
             int64_t neuron_count, int64_t max_length, bool first_tokens, double scale, double eps1, double eps2,
             int threads) {
  const auto sequences = read_sequences(starts, lengths, batch, tokens, max_length);
  cover(sequences, tokens);
  if (first_tokens && tokens < 1) throw std::invalid_argument("first_tokens needs at least one token, but there are 0");
  const int64_t *head_places = pointer<int64_t>(heads), *neuron_places = pointer<int64_t>(neurons);
  std::vector<int64_t> width_places;
  if (heads) {
    check_places("head", head_places, head_count, all_heads);
    for (int64_t i = 0; i < head_count * head_dim; ++i)
      width_places.push_back(head_places[i / head_dim] * head_dim + i % head_dim);
  }
  if (neurons) check_places("neuron", neuron_places, neuron_count, all_neurons);
  const auto parameter = [&](int i) { return pointer<void>(parameters[i]); };
  Encoder args;
  args.tokens = tokens;
  args.channels = channels;
  args.head_dim = head_dim;
  args.width = head_count * head_dim;
  args.neurons = neuron_count;
  args.all_width = all_heads * head_dim;
  args.all_neurons = all_neurons;
  args.width_places = heads ? width_places.data() : nullptr;
  args.neuron_places = neuron_places;
  args.q = {parameter(0), parameter(3)};
  args.k = {parameter(1), parameter(4)};
  args.v = {parameter(2), parameter(5)};
  args.output = {parameter(6), parameter(7)};
  args.gamma1 = parameter(8);
  args.beta1 = parameter(9);
  args.first = {parameter(10), parameter(11)};
  args.second = {parameter(12), parameter(13)};
  args.gamma2 = parameter(14);
  args.beta2 = parameter(15);
  args.sequences = sequences.data();
  args.batch = batch;
  args.longest = max_length;
  args.first_tokens = first_tokens;
  args.scale = static_cast<float>(scale);
  args.eps1 = static_cast<float>(eps1);
  args.eps2 = static_cast<float>(eps2);
  args.bias = position_bias(bias, reach, max_length);
  args.activation = static_cast<Activation>(activation);
  args.x = pointer<void>(x);
  args.out = pointer<void>(out);
  args.threads = threads;
  constexpr int64_t line = 16;
  const Scratch scratch = allocate(args.scratch_size() + line);
  args.scratch = pointer<float>((reinterpret_cast<Address>(scratch.get()) + 63) / 64 * 64);
  (x_bf16 ? KERNEL(encoder<Bf16, true>) : bf16 ? KERNEL(encoder<float, true>) : KERNEL(encoder<float, false>))(args);
}

// A row of the table that ticketops/ops/copies/native.py builds.
struct CopyRow {
  int64_t source, target, index, rows, groups, count, slice, elements;
  // `index` [count] selects among `groups` slices: of the source (gather), or of the target (scatter; spread also
  // writes zeros to the target's other slices).
  enum : int64_t { gather, scatter, spread } direction;
};

void copy_slices(Address table, int64_t copies, int threads) {
  const CopyRow* rows = pointer<CopyRow>(table);
  std::vector<Copy> list;
  // For each spread, the source slice of each target slice, or -1. Owns the memory of `Copy::from`.
  std::vector<std::vector<int64_t>> places;
  int64_t tasks = 0, spread_bytes = 0;
  const auto makes_float = [](const CopyRow& row) {
    const auto elements = static_cast<Elements>(row.elements);
    return elements == Elements::bf16_to_float || elements == Elements::float_to_float;
  };
  // A spread writes a gradient, which the optimizer reads much later.
  for (const CopyRow* row = rows; row != rows + copies; ++row)
    if (row->direction == CopyRow::spread && makes_float(*row))
      spread_bytes += row->rows * row->groups * row->slice * 4;
  for (const CopyRow* row = rows; row != rows + copies; ++row) {
    const int64_t* index = pointer<int64_t>(row->index);
    for (int64_t i = 0; index && i < row->count; ++i)
      if (index[i] < 0 || index[i] >= row->groups)
        throw std::invalid_argument("slice " + std::to_string(index[i]) + " is not among the " +
                                    std::to_string(row->groups) + " of the tensor");
    const bool gather = row->direction == CopyRow::gather;
    Copy copy{pointer<void>(row->source),
              pointer<void>(row->target),
              gather ? index : nullptr,
              row->direction == CopyRow::scatter ? index : nullptr,
              row->rows,
              gather ? row->groups : row->count,
              gather ? row->count : row->groups,
              row->count,
              row->slice,
              static_cast<Elements>(row->elements),
              row->direction == CopyRow::spread && makes_float(*row) && spread_bytes >= streamed_bytes,
              tasks};
    if (row->direction == CopyRow::spread && index) {
      auto& from = places.emplace_back(row->groups, -1);
      for (int64_t i = 0; i < row->count; ++i) from[index[i]] = i;
      copy.from = from.data();
      copy.count = row->groups;
    }
    tasks += (copy.rows * copy.count * copy.slice + copy_task - 1) / copy_task;
    list.push_back(copy);
  }
  KERNEL(copy)({list.data(), copies, tasks, threads});
}

// The part of DLPack (https://dmlc.github.io/dlpack) that a tensor in host memory needs.
struct DlpackType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlpackTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  DlpackType type;
  int64_t *shape, *strides;
  uint64_t byte_offset;
  void* context;
  void (*deleter)(DlpackTensor*);
};

py::capsule new_tensor(const std::vector<int64_t>& shape, bool bf16) {
  constexpr int32_t host = 1;
  constexpr DlpackType float32{2, 32, 1}, bfloat16{4, 16, 1};
  const size_t dimensions = shape.size();
  std::unique_ptr<int64_t[]> sizes(new int64_t[2 * dimensions]);
  int64_t numbers = 1, stride = 1;
  for (size_t i = dimensions; i-- > 0;) {
    sizes[i] = shape[i];
    sizes[dimensions + i] = stride;
    numbers *= shape[i];
    stride *= std::max<int64_t>(shape[i], 1);
  }
  auto tensor = std::make_unique<DlpackTensor>();
  *tensor = {allocate_memory(numbers * (bf16 ? 2 : 4)), host, 0, static_cast<int32_t>(dimensions),
             bf16 ? bfloat16 : float32, sizes.get(), sizes.get() + dimensions, 0, nullptr, [](DlpackTensor* self) {
               free_memory(self->data);
               delete[] self->shape;
               delete self;
             }};
  sizes.release();
  return py::capsule(tensor.release(), "dltensor", [](PyObject* capsule) {
    // A consumer renames the capsule and then owns the tensor.
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* unclaimed = static_cast<DlpackTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    unclaimed->deleter(unclaimed);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of ticketops that take addresses; use ticketops.ops.";
  m.attr("built_from") = TICKETOPS_BUILT_FROM;
  m.def("isa", isa, "Returns the instruction set that the kernels use.");
  m.def("isas", isas, "Returns the instruction sets that were compiled and that this processor has, the lowest first.");
  m.def("use_isa", use_isa, "Selects one of `isas`. The default is the highest.");
  m.def("is_intel", is_intel, "Returns True if the processor is made by Intel.");
  m.def("threads_available", threads_available, "Returns True if torch's OpenMP runtime was found.");
  const py::call_guard<py::gil_scoped_release> release;
  m.def("attention_forward", attention_forward, release);
  m.def("attention_backward", attention_backward, release);
  m.def("ffn_forward", ffn_forward, release);
  m.def("ffn_backward", ffn_backward, release);
  m.def("token_sums", token_sums, release);
  m.def("residual_forward", residual_forward, release);
  m.def("residual_backward", residual_backward, release);
  m.def("embeddings_forward", embeddings_forward, release);
  m.def("embeddings_backward", embeddings_backward, release);
  m.def("add", add, release);
  m.def("column_sums", column_sums, release);
  m.def("dropout_rows", dropout_rows, release);
  m.def("rotary", rotary, release);
  m.def("transpose", transpose, release);
  m.def("embedding_gradient", embedding_gradient, release);
  m.def("encoder", encoder, release);
  m.def("copy_slices", copy_slices, release);
  m.def("new_tensor", new_tensor, "Returns an uninitialised tensor in reused memory as a DLPack capsule.");
}
