// Memory for results and scratch, kept from step to step instead of being mapped and cleared anew by the system.
#pragma once

#include <cstddef>

namespace ticketops {

// Not initialised, aligned to 64 bytes. Any thread may call either; throws std::bad_alloc.
void* take_memory(size_t bytes);
void give_memory(void* memory);

}  // namespace ticketops
