#include "cpu/threads.h"

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif
#include <pthread.h>

#include <atomic>
#include <cstring>

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

// The team of threads does not survive a fork, and waiting for it would hang: a forked child works alone.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

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

}  // namespace

void run_tasks(int64_t tasks, int threads, Body body, void* context) {
  Job job{tasks, body, context};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1 && parallel() && !forked)
    parallel()(work, &job, static_cast<unsigned>(threads), 0);
  else
    work(&job);
}

bool threads_available() { return parallel() != nullptr; }

}  // namespace ticketops
