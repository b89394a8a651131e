#include "cpu/threads.h"

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace ticketops {
namespace {

// The entry point that GCC's `#pragma omp parallel` calls. libgomp, LLVM's libomp and Intel's libiomp5 all export it.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

#ifdef __linux__
int find_in_library(dl_phdr_info* library, size_t, void* result) {
  const char* slash = std::strrchr(library->dlpi_name, '/');
  const char* name = slash ? slash + 1 : library->dlpi_name;
  if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libomp", 6) && std::strncmp(name, "libiomp5", 8)) return 0;
  void* handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
  *static_cast<void**>(result) = symbol;
  return symbol != nullptr;
}
#endif

// Looks up the OpenMP runtime that torch has loaded. Linking one could load a second runtime into the process, because
// torch's wheels rename theirs, and the threads of the two would compete for the cores.
Parallel find_parallel() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#ifdef __linux__
  if (!symbol) dl_iterate_phdr(find_in_library, &symbol);
#endif
  return reinterpret_cast<Parallel>(symbol);
}

Parallel parallel() {
  static const Parallel found = find_parallel();
  return found;
}

struct Job {
  int64_t tasks;
  Body body;
  void* context;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_thread{0};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int thread = job.next_thread++;
  for (int64_t task; (task = job.next_task++) < job.tasks;) job.body(job.context, task, thread);
}

// A thread that starts parallel regions in place of the thread that forked. After a fork, the OpenMP runtime of the
// child still assigns a team of threads to the forking thread, but a fork does not copy those threads: the next
// parallel region would wait for them for ever. A new thread has no team yet and gets one of its own.
class Deputy {
 public:
  void run(Job& job, unsigned threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = &job;
    threads_ = threads;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !job_; });
  }

  // Runs jobs until the process ends.
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return job_; });
      parallel()(work, job_, threads_, 0);
      job_ = nullptr;
      changed_.notify_all();
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Job* job_ = nullptr;
  unsigned threads_ = 0;
};

// Per thread. A deputy is never destroyed, because after another fork its mutex may be in any state.
thread_local bool has_forked = false;
thread_local Deputy* deputy = nullptr;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  has_forked = true;
  deputy = nullptr;
});

// Returns the calling thread's deputy, or null if the system cannot start a thread.
Deputy* find_deputy() {
  if (deputy) return deputy;
  auto made = std::make_unique<Deputy>();
  try {
    std::thread([made = made.get()] { made->serve(); }).detach();
  } catch (const std::system_error&) {
    return nullptr;
  }
  return deputy = made.release();
}

}  // namespace

void run_tasks(int64_t tasks, int threads, Body body, void* context) {
  Job job{tasks, body, context};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || !parallel()) return work(&job);
  if (!has_forked) return parallel()(work, &job, static_cast<unsigned>(threads), 0);
  if (Deputy* found = find_deputy()) return found->run(job, static_cast<unsigned>(threads));
  work(&job);
}

bool threads_available() { return parallel() != nullptr; }

}  // namespace ticketops
