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

// Linking an OpenMP runtime of our own could bring a second one into the process (torch's wheels rename theirs), whose
// threads would fight with torch's for the cores. So the one that torch has loaded is looked up.
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

// A fork copies the calling thread, and with it the runtime's note of the team that this thread commands, but none of the
// team: the first parallel region would wait for it for ever. A thread that is made afterwards commands none yet. So the
// thread that forked has a deputy, which gets a team of its own.
class Deputy {
 public:
  void run(Job& job, unsigned threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = &job;
    threads_ = threads;
    changed_.notify_all();
    changed_.wait(lock, [this] { return !job_; });
  }

  // Serves to the end of the process.
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

// Of the calling thread. A deputy is never destroyed: after another fork nobody knows who held its mutex.
thread_local bool has_forked = false;
thread_local Deputy* deputy = nullptr;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  has_forked = true;
  deputy = nullptr;
});

// None where the system grants no thread.
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
