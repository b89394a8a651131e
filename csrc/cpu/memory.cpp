#include "cpu/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>

namespace ticketops {
namespace {

constexpr size_t alignment = 64;

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// A best-fit allocator over a few large mappings, in huge pages where the system has them. The smallest free block that
// is large enough is split; adjacent free blocks are merged. Mappings are never returned, since the next step needs
// them again.
class Pool {
 public:
  char* allocate(size_t size) {
    const std::lock_guard<std::mutex> guard(mutex);
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) {
      add(map(size));
      found = by_size_.lower_bound({size, nullptr});
    }
    const Block block = *found;
    remove(block);
    if (block.size > size) add({block.size - size, block.start + size});
    allocated_[block.start] = size;
    return block.start;
  }

  void deallocate(char* start) {
    const std::lock_guard<std::mutex> guard(mutex);
    const auto allocated = allocated_.find(start);
    Block block{allocated->second, start};
    allocated_.erase(allocated);
    auto next = free_.lower_bound(start);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        block = {before->second + block.size, before->first};
        remove({before->second, before->first});
      }
    }
    if (next != free_.end() && next->first == block.start + block.size) {
      const size_t size = next->second;
      remove({size, next->first});
      block.size += size;
    }
    add(block);
  }

  std::mutex mutex;

 private:
  struct Block {
    size_t size;
    char* start;
    bool operator<(const Block& other) const {
      return size != other.size ? size < other.size : start < other.start;
    }
  };

  void add(Block block) {
    by_size_.insert(block);
    free_[block.start] = block.size;
  }

  void remove(Block block) {
    by_size_.erase(block);
    free_.erase(block.start);
  }

  static Block map(size_t size) {
    constexpr size_t page = size_t{2} << 20, least = 16 * page;
    size = round_up(size < least ? least : size, page);
    void* mapped = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* start = static_cast<char*>(mapped) + (page - reinterpret_cast<uintptr_t>(mapped) % page) % page;
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
    return {size, start};
  }

  // Free blocks by size and by address, and the sizes of allocated blocks by address.
  std::set<Block> by_size_;
  std::map<char*, size_t> free_;
  std::unordered_map<char*, size_t> allocated_;
};

// Never destroyed: tensors may be freed after the end of main.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// Hold the lock during a fork. If another thread held it, the child would wait for ever.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

}  // namespace

#ifdef __SANITIZE_ADDRESS__
// Allocate each block separately, so that AddressSanitizer sees an access outside it.
void* allocate_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes)) throw std::bad_alloc();
  return memory;
}
void free_memory(void* memory) { std::free(memory); }
#else
void* allocate_memory(size_t bytes) { return pool().allocate(round_up(bytes ? bytes : 1, alignment)); }
void free_memory(void* memory) { pool().deallocate(static_cast<char*>(memory)); }
#endif

}  // namespace ticketops
