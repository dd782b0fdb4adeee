// Global memory as the tests see it: only registered buffers may be touched. Within one launch no two threads may write,
// or one write and another read, the same place: blocks run in any order, so that would be chance. Threads of one block
// may where a barrier lies between. A read of what another thread writes later is not noticed.
#pragma once

#include <unordered_map>

#include "host.h"

namespace host {

struct Region {
  uintptr_t begin, end;
};

inline std::vector<Region> regions;
struct Writer {
  unsigned block;
  int thread;
  uint32_t time;  // of the thread's clock
};
inline std::unordered_map<uintptr_t, Writer> written;  // 2-byte pieces stored to in this launch -> who stored last

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

// Whether what was written is there for the current thread: it wrote it itself, or a barrier of its block lies between.
inline bool visible(const Writer& writer) {
  return writer.block == blockIdx.x && before(writer.thread, writer.time, actor());
}

template <typename Visit>
void each_piece(const void* pointer, size_t bytes, Visit visit) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t piece = at / 2; piece <= (at + bytes - 1) / 2; ++piece) visit(piece);
}

template <typename T>
T global_read(const T* pointer) {
  check_global(pointer, sizeof(T), alignof(T), "read");
  if (!written.empty()) {
    each_piece(pointer, sizeof(T), [](uintptr_t piece) {
      const auto found = written.find(piece);
      if (found == written.end() || visible(found->second)) return;
      fail("global memory is read that another thread of this launch writes, no barrier between");
    });
  }
  return *pointer;
}

template <typename T>
void global_write(T* pointer, T value) {
  check_global(pointer, sizeof(T), alignof(T), "write");
  each_piece(pointer, sizeof(T), [](uintptr_t piece) {
    const Writer me{blockIdx.x, actor(), block.clocks[actor()][actor()]};
    const auto [place, fresh] = written.emplace(piece, me);
    if (fresh) return;
    if (!visible(place->second)) fail("two threads of one launch write the same global memory, no barrier between");
    place->second = me;
  });
  *pointer = value;
}

}  // namespace host
