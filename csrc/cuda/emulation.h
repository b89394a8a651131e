// The part of CUDA that the kernels use, for a CPU: each thread of a block is a CPU thread, and blocks run one after
// another. The sanitizers can then check the kernels for wrong addresses, races between barriers and undefined
// behaviour.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// One block runs at a time, so static variables serve as shared memory.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace ticketops::cuda {

class Barrier {
 public:
  explicit Barrier(unsigned members) : members_(members) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned turn = turn_;
    if (++arrived_ == members_) {
      arrived_ = 0;
      ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  const unsigned members_;
  unsigned arrived_ = 0, turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

inline Barrier* block_barrier;
inline std::deque<Barrier>* warp_barriers;

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, void*, Arguments... arguments) {
  blockDim = threads;
  gridDim = dim3(static_cast<unsigned>(blocks));
  const unsigned members = threads.x * threads.y;
  Barrier barrier(members);
  std::deque<Barrier> warps;
  for (unsigned first = 0; first < members; first += 32) warps.emplace_back(std::min(32u, members - first));
  block_barrier = &barrier;
  warp_barriers = &warps;
  std::vector<std::thread> team;
  for (unsigned member = 0; member < members; ++member)
    team.emplace_back([=, &barrier] {
      threadIdx = dim3(member % threads.x, member / threads.x, 0);
      for (int64_t block = 0; block < blocks; ++block) {
        blockIdx = dim3(static_cast<unsigned>(block), 0, 0);
        kernel(arguments...);
        barrier.wait();
      }
    });
  for (std::thread& member : team) member.join();
  return nullptr;
}

}  // namespace ticketops::cuda

inline void __syncthreads() { ticketops::cuda::block_barrier->wait(); }

// All threads of the warp must call it; the kernels never call it with a partial mask. It synchronises one warp, not
// the block, as on a GPU.
inline unsigned __ballot_sync(unsigned, bool vote) {
  static bool votes[1024];
  const unsigned member = threadIdx.y * blockDim.x + threadIdx.x, first = member / 32 * 32;
  ticketops::cuda::Barrier& warp = (*ticketops::cuda::warp_barriers)[member / 32];
  votes[member] = vote;
  warp.wait();
  unsigned word = 0;
  for (unsigned lane = 0; lane < 32 && first + lane < blockDim.x * blockDim.y; ++lane)
    word |= static_cast<unsigned>(votes[first + lane]) << lane;
  warp.wait();
  return word;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
