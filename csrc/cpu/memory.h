// Memory for results and scratch. It is reused from step to step, so that the system does not map and clear it again.
#pragma once

#include <cstddef>

namespace ticketops {

// Returns uninitialised memory, aligned to 64 bytes. Both functions are thread-safe. Throws std::bad_alloc.
void* allocate_memory(size_t bytes);
void free_memory(void* memory);

}  // namespace ticketops
