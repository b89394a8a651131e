// The Python module ticketops._cuda. Tensors are passed as integer addresses; the callers in ticketops/ops/*/cuda.py
// have checked their device, dtype, size and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "built_from.h"
#include "kernels.h"

namespace py = pybind11;
namespace cuda = ticketops::cuda;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

void move_rows(Address source, int64_t source_stride_bytes, Address index, Address target, int64_t rows,
               int64_t row_bytes, Address stream) {
  check(cuda::move_rows(pointer<void>(source), source_stride_bytes, pointer<int64_t>(index), pointer<void>(target),
                        rows, row_bytes, pointer<void>(stream)));
}

void number_tokens(Address mask, int mask_bytes, int64_t row_stride, int64_t batch, int64_t width, Address starts,
                   Address lengths, Address indices, Address numbers, Address stream) {
  check(cuda::number_tokens(pointer<void>(mask), mask_bytes, row_stride, batch, width, pointer<int32_t>(starts),
                            pointer<int32_t>(lengths), pointer<int64_t>(indices), pointer<int64_t>(numbers),
                            pointer<void>(stream)));
}

// (address, rows, count) of each layer's `Partials`.
using Layers = std::vector<std::tuple<Address, int32_t, int32_t>>;

void importance(int32_t heads, const Layers& head_partials, const Layers& ffn_partials, int32_t group, bool whole,
                Address head_totals, Address ffn_totals, Address head_scores, Address ffn_scores, Address head_order,
                Address ffn_order, Address stream) {
  if (head_partials.size() > cuda::max_layers || ffn_partials.size() > cuda::max_layers)
    throw std::invalid_argument("importance takes " + std::to_string(cuda::max_layers) + " layers at most");
  cuda::Importance args{};
  args.layers = static_cast<int32_t>(head_partials.size());
  args.heads = heads;
  args.ffns = static_cast<int32_t>(ffn_partials.size());
  args.group = group;
  args.whole = whole;
  args.rank = head_order != 0;
  args.head_totals = pointer<double>(head_totals);
  args.ffn_totals = pointer<double>(ffn_totals);
  args.head_scores = pointer<double>(head_scores);
  args.ffn_scores = pointer<double>(ffn_scores);
  args.head_order = pointer<int64_t>(head_order);
  args.ffn_order = pointer<int64_t>(ffn_order);
  const auto fill = [](const Layers& layers, cuda::Partials* partials) {
    for (const auto& [data, rows, count] : layers) *partials++ = {pointer<float>(data), rows, count};
  };
  fill(head_partials, args.head_partials);
  fill(ffn_partials, args.ffn_partials);
  check(cuda::importance(args, pointer<void>(stream)));
}

void copy_table(Address table, int64_t copies, int64_t blocks, Address stream) {
  check(cuda::copy_table(pointer<cuda::Copy>(table), copies, blocks, pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of ticketops that take addresses and a stream; use ticketops.ops.";
#ifdef TICKETOPS_EMULATE
  m.attr("device") = "cpu";
#else
  m.attr("device") = "cuda";
#endif
  m.attr("built_for") = TICKETOPS_BUILT_FOR;
  m.attr("built_from") = TICKETOPS_BUILT_FROM;
  m.attr("max_layers") = cuda::max_layers;
  m.attr("max_structures") = cuda::max_structures;
  m.attr("block_vectors") = cuda::block_vectors;
  m.def("problem", cuda::problem, "Returns the reason why the current device cannot run the kernels, or None.");
  const py::call_guard<py::gil_scoped_release> release;
  m.def("move_rows", move_rows, release);
  m.def("number_tokens", number_tokens, release);
  m.def("importance", importance, release);
  m.def("copy_table", copy_table, release);
}
