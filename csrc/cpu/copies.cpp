// Copies slices of many tensors, with a conversion between float32 and bfloat16 where requested.
#include "cpu/parallel.h"

namespace ticketops::TICKETOPS_ISA {
namespace {

struct Byte {
  char value;
};

template <typename T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;

template <typename T>
TICKETOPS_INLINE void move(const T* source, T* target, int64_t n) {
  // For a single element an assignment is faster than a call of memcpy.
  if (n == 1) {
    *target = *source;
  } else {
    __builtin_memcpy(target, source, n * sizeof(T));
  }
}

template <typename A, typename B>
TICKETOPS_INLINE void move(const A* source, B* target, int64_t n) {
  for_row(n, [=](int64_t, auto load, auto store) { store(target, load(source)); });
}

// The same with non-temporal stores, which bypass the caches. Writes zeros if `source` is null.
template <typename A>
TICKETOPS_INLINE void move_streaming(const A* source, float* target, int64_t n) {
  for_row(n, [=](int64_t i, auto load, auto store) {
    const Float x = source ? load(source) : Float{};
    if (i + W <= n && is_aligned(target + i))
      stream(target + i, x);
    else
      store(target, x);
  });
}

// Copies the elements [begin, end), counted in the order of writing.
template <typename A, typename B, bool streams = false>
void copy_slices(const Copy& copy, int64_t begin, int64_t end) {
  const int64_t slice = copy.slice, first = begin / slice;
  int64_t inside = begin % slice, row = first / copy.count, i = first % copy.count;
  while (begin < end) {
    const int64_t n = min(slice - inside, end - begin);
    const int64_t from = copy.from ? copy.from[i] : i, to = copy.to ? copy.to[i] : i;
    B* target = static_cast<B*>(copy.target) + (row * copy.target_slices + to) * slice + inside;
    const A* source =
        from < 0 ? nullptr : static_cast<const A*>(copy.source) + (row * copy.source_slices + from) * slice + inside;
    if constexpr (streams) {
      move_streaming(source, target, n);
    } else if (!source) {
      __builtin_memset(target, 0, n * sizeof(B));
    } else {
      move(source, target, n);
    }
    begin += n;
    inside = 0;
    if (++i == copy.count) {
      i = 0;
      ++row;
    }
  }
}

// The same for a gather of slices of one element each. The target is contiguous.
template <typename A, typename B>
void copy_numbers(const Copy& copy, int64_t begin, int64_t end) {
  constexpr int64_t block = 64;
  while (begin < end) {
    const int64_t row = begin / copy.count, i = begin % copy.count;
    const int64_t n = min(block, min(copy.count - i, end - begin));
    const A* source = static_cast<const A*>(copy.source) + row * copy.source_slices;
    A numbers[block];
    for (int64_t j = 0; j < n; ++j) numbers[j] = copy.from[i + j] < 0 ? A{} : source[copy.from[i + j]];
    move(numbers, static_cast<B*>(copy.target) + begin, n);
    begin += n;
  }
}

template <typename A, typename B>
void copy_part(const Copy& copy, int64_t begin, int64_t end) {
  if (copy.slice == 1 && copy.from) {
    return copy_numbers<A, B>(copy, begin, end);
  }
  if constexpr (is_float<B>) {
    if (copy.streams) {
      copy_slices<A, B, true>(copy, begin, end);
      return fence();
    }
  }
  copy_slices<A, B>(copy, begin, end);
}

}  // namespace

void copy(const Copies& args) {
  parallel(args.tasks, args.threads, [&](int64_t task, int) {
    // Binary search for the last copy whose first task is at or before this one.
    int64_t low = 0, high = args.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (args.copies[middle].first_task <= task ? low : high) = middle;
    }
    const Copy& copy = args.copies[low];
    const int64_t begin = (task - copy.first_task) * copy_task;
    const int64_t end = min(begin + copy_task, copy.rows * copy.count * copy.slice);
    switch (copy.elements) {
      case Elements::bytes: return copy_part<Byte, Byte>(copy, begin, end);
      case Elements::float_to_float: return copy_part<float, float>(copy, begin, end);
      case Elements::bf16_to_bf16: return copy_part<Bf16, Bf16>(copy, begin, end);
      case Elements::float_to_bf16: return copy_part<float, Bf16>(copy, begin, end);
      case Elements::bf16_to_float: return copy_part<Bf16, float>(copy, begin, end);
    }
  });
}

}  // namespace ticketops::TICKETOPS_ISA
