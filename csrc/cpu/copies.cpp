// Slices of a tensor to or from their place side by side.
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace ticketops {

void copy(const Copies& args) {
  // Long enough to be worth handing out, short enough to share among threads.
  constexpr int64_t task_bytes = 1 << 16;
  const int64_t slices = args.rows * args.count;
  const int64_t chunk = std::max<int64_t>(1, task_bytes / std::max<int64_t>(1, args.slice_bytes));
  auto one = [&](int64_t task) {
    const int64_t end = std::min((task + 1) * chunk, slices);
    for (int64_t i = task * chunk; i < end; ++i) {
      char* whole = args.whole + (i / args.count * args.groups + args.index[i % args.count]) * args.slice_bytes;
      char* part = args.part + i * args.slice_bytes;
      std::memcpy(args.scatter ? whole : part, args.scatter ? part : whole, args.slice_bytes);
    }
  };
  run_tasks((slices + chunk - 1) / chunk, args.threads,
            [](void* context, int64_t task, int) { (*static_cast<decltype(one)*>(context))(task); }, &one);
}

}  // namespace ticketops
