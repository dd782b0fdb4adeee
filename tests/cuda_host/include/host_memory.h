// Global memory as the tests see it: only registered buffers may be touched, and within one launch no two threads may
// write, or one write and another read, the same place (blocks run in any order, so that would be chance).
#pragma once

#include <unordered_map>

#include "host.h"

namespace host {

struct Region {
  uintptr_t begin, end;
};

inline std::vector<Region> regions;
inline std::unordered_map<uintptr_t, uint64_t> written;  // 2-byte pieces stored to in this launch -> who stored

inline void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what) {
  static size_t last = 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  if (at % alignment != 0) fail("global %s of %zu bytes at %p is not aligned", what, bytes, pointer);
  if (last < regions.size() && at >= regions[last].begin && at + bytes <= regions[last].end) return;
  for (size_t i = 0; i < regions.size(); ++i) {
    if (at >= regions[i].begin && at + bytes <= regions[i].end) {
      last = i;
      return;
    }
  }
  fail("global %s of %zu bytes at %p is outside of every buffer", what, bytes, pointer);
}

inline uint64_t writer_id() { return uint64_t(blockIdx.x) * kMostThreads + actor(); }

template <typename T>
T global_read(const T* pointer) {
  check_global(pointer, sizeof(T), alignof(T), "read");
  if (!written.empty()) {
    for (uintptr_t at = reinterpret_cast<uintptr_t>(pointer) / 2; at <= (reinterpret_cast<uintptr_t>(pointer) + sizeof(T) - 1) / 2; ++at) {
      const auto found = written.find(at);
      if (found != written.end() && found->second != writer_id()) fail("global memory is read that another thread of this launch writes");
    }
  }
  return *pointer;
}

template <typename T>
void global_write(T* pointer, T value) {
  check_global(pointer, sizeof(T), alignof(T), "write");
  for (uintptr_t at = reinterpret_cast<uintptr_t>(pointer) / 2; at <= (reinterpret_cast<uintptr_t>(pointer) + sizeof(T) - 1) / 2; ++at) {
    const auto [place, fresh] = written.emplace(at, writer_id());
    if (!fresh && place->second != writer_id()) fail("two threads of one launch write the same global memory");
  }
  *pointer = value;
}

}  // namespace host
