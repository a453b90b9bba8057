// Release of the memory of a mapped file that is larger than the memory (madvise).
#pragma once

#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace seemore::SEEMORE_ISA {

// Take the pages within [begin, end) of a shared mapping of a file out of this process's memory. Their contents stay:
// the system keeps them while there is room, and writes them to the file. Does nothing elsewhere than on Unix.
inline void release_pages(const void* begin, const void* end) {
#if defined(__unix__) || defined(__APPLE__)
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
  static_cast<void>(begin), static_cast<void>(end);
#endif
}

}  // namespace seemore::SEEMORE_ISA
