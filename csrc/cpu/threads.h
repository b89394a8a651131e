// Work shared among threads of the OpenMP runtime that torch has loaded.
#pragma once

#include <cstdint>

namespace ticketops {

using Body = void (*)(void* context, int64_t task, int thread);

// Calls body(context, task, thread) for every task in [0, tasks), on at most `threads` threads; `thread` tells them
// apart. Tasks are handed out as threads become free, so each must leave its result where no other task writes: then the
// results depend neither on the order nor on the number of threads.
void run_tasks(int64_t tasks, int threads, Body body, void* context);

// Whether an OpenMP runtime was found; without one, all tasks run on the calling thread.
bool threads_available();

}  // namespace ticketops
