// Runs tasks on threads of the OpenMP runtime that torch has loaded.
#pragma once

#include <cstdint>

namespace ticketops {

using Body = void (*)(void* context, int64_t task, int thread);

// Calls body(context, task, thread) for every task in [0, tasks) on at most `threads` threads; `thread` is the thread's
// index, for its scratch. Tasks are scheduled dynamically, so no two tasks may write to the same place. The results
// then depend neither on the order nor on the number of threads.
void run_tasks(int64_t tasks, int threads, Body body, void* context);

// Returns true if an OpenMP runtime was found. Without one, all tasks run on the calling thread.
bool threads_available();

}  // namespace ticketops
