// Multiprocessors in plain C++: the threads of a block, or of the blocks of a cluster, run as fibers of one CPU thread,
// for tests of the kernels' own sources without a GPU.
//
// - A fiber runs until it waits: at a barrier, or where a warp's lanes must meet. Then another goes on; which one, is
//   drawn from a seed. A warp runs as far ahead of the others as its waits allow, so a missing barrier shows.
// - Every shared access is checked for bounds, for reading what nobody wrote, and for races: two accesses, at least one
//   of them a write, that no barrier orders (vector clocks). Global accesses are checked in host_memory.h.
// - Asynchronous work is done as late as it may be: defer() runs when no fiber can go on.
//
// The first fault ends the launch, and cudaGetErrorString tells it.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr int kMostThreads = 1024;
// Shared addresses start here, aligned as the hardware aligns them, so that an offset is never taken for an address.
constexpr uint32_t kSharedBase = 4096;

using Clocks = std::vector<uint32_t>;

struct Fiber {
  int id;
  bool started = false, done = false;
  bool (*ready)(void*) = nullptr;  // what it waits for; null: it can run
  void* context = nullptr;
  const char* waits_for = "";
  ucontext_t entry;
  jmp_buf at;
};

// The bytes of a 4-byte piece of shared memory as the race detector sees them.
struct Cell {
  int writer = -1;  // the thread of the last write; -1: never written
  uint32_t write_time = 0;
  bool pending = false;  // an asynchronous copy is on its way
  std::vector<std::pair<int, uint32_t>> readers;  // since the last write
};

struct Meeting {  // the lanes of a warp at an instruction that takes all of them
  int arrived = 0;
  uint64_t generation = 0;
  const char* name = nullptr;
  void* lanes[kWarp];
};

inline void merge(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

struct Barrier {
  int arrived = 0, count = 0;
  uint64_t generation = 0;
  Clocks pending, published;
};

// The blocks that run at a time: one, or those of a cluster. Threads are numbered through all of them.
struct Block {
  int threads = 0, size = 0;  // of all blocks, of each
  int ended = 0;              // threads that have ended
  std::vector<uint3> at;      // blockIdx of each
  size_t window = 0;          // bytes from the shared memory of one to that of the next
  size_t shared_size = 0;     // of each
  std::vector<Fiber> fibers;
  std::vector<Clocks> clocks;  // of each thread, and of one more actor: asynchronous hardware
  std::vector<Meeting> warps;
  std::vector<Barrier> barriers;  // 16 of each block
  Barrier cluster;
  std::vector<uint8_t> shared;
  // Block, actor of another one -> when that last touched its shared memory.
  std::map<std::pair<int, int>, uint32_t> foreign;
  std::vector<Cell> cells;
  std::vector<std::function<void()>> deferred;
  std::vector<std::function<void()>> at_exit;  // checks when the block has ended
};

inline Block block;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::mt19937 random_source;
inline std::string error;
inline std::function<void()> kernel_body;
inline char* stacks = nullptr;
inline uint64_t bank_conflicts = 0;

inline int actor() { return current->id; }
inline int rank() { return actor() / block.size; }  // of this thread's block in its cluster

// Ends the launch; does not return.
[[noreturn]] inline void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (error.empty()) {
    error = text;
    if (current != nullptr) {
      error += " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current->id % block.size) + ")";
    }
  }
  _longjmp(scheduler, 2);
}

inline void yield() {
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

// Let the other fibers run until test() holds. `what` is for the message when it never does.
template <typename Test>
void wait_until(const char* what, Test test) {
  if (test()) return;
  current->ready = [](void* context) { return (*static_cast<Test*>(context))(); };
  current->context = &test;
  current->waits_for = what;
  yield();
  current->ready = nullptr;
}

// Asynchronous work (a bulk copy, a matrix product): run when no fiber can go on, in a drawn order.
inline void defer(std::function<void()> work) { block.deferred.push_back(std::move(work)); }

// Happens-before: what `who` did until now comes before what anybody does after acquire().
inline void release(Clocks& into, int who) {
  merge(into, block.clocks[who]);
  ++block.clocks[who][who];
}
inline void acquire(const Clocks& from, int who) { merge(block.clocks[who], from); }
inline bool before(int other, uint32_t time, int who) { return other == who || block.clocks[who][other] >= time; }

// --- Barriers -----------------------------------------------------------------------------------------------------

inline void complete(Barrier& barrier) {
  barrier.published = barrier.pending;
  barrier.pending.clear();
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void barrier_arrive(int id, int count) {
  if (id < 0 || id >= 16) fail("barrier %d does not exist", id);
  if (count <= 0 || count % kWarp != 0) fail("barrier %d counts %d threads, not whole warps", id, count);
  Barrier& barrier = block.barriers[16 * rank() + id];
  if (barrier.arrived == 0) barrier.count = count;
  if (barrier.count != count) fail("barrier %d: a thread counts %d threads, another %d", id, count, barrier.count);
  release(barrier.pending, actor());
  if (++barrier.arrived == count) complete(barrier);
}

inline void barrier_sync(int id, int count) {
  Barrier& barrier = block.barriers[16 * rank() + (id & 15)];
  const uint64_t generation = barrier.generation;
  barrier_arrive(id, count);
  wait_until("a barrier", [&] { return barrier.generation != generation; });
  acquire(barrier.published, actor());
}

// --- What takes all lanes of a warp --------------------------------------------------------------------------------

// Each lane hands in the address of its own arguments; the last to come runs `all` on the 32 of them. Orders nothing
// in memory, as on the hardware.
template <typename Arguments, typename All>
void warp_collective(const char* name, Arguments& mine, All all) {
  Meeting& meeting = block.warps[actor() / kWarp];
  if (meeting.arrived == 0) meeting.name = name;
  if (std::strcmp(meeting.name, name) != 0) fail("lanes of a warp part: one is at %s, another at %s", name, meeting.name);
  meeting.lanes[actor() % kWarp] = &mine;
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == kWarp) {
    Arguments* lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = static_cast<Arguments*>(meeting.lanes[lane]);
    all(lanes);
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_until(name, [&] { return meeting.generation != generation; });
}

inline void warp_sync() {
  Clocks& mine = block.clocks[actor()];
  warp_collective("__syncwarp", mine, [](Clocks* (&)[kWarp]) {
    const int first = actor() / kWarp * kWarp;
    Clocks all;
    for (int lane = first; lane < first + kWarp; ++lane) release(all, lane);
    for (int lane = first; lane < first + kWarp; ++lane) acquire(all, lane);
  });
}

// --- Clusters of blocks --------------------------------------------------------------------------------------------

// barrier.cluster.arrive.release and wait.acquire. Threads that have ended count as arrived.
inline void cluster_sync() {
  Barrier& barrier = block.cluster;
  const uint64_t generation = barrier.generation;
  release(barrier.pending, actor());
  ++barrier.arrived;
  wait_until("a barrier of the cluster", [&] {
    if (barrier.generation == generation && barrier.arrived + block.ended == block.threads) complete(barrier);
    return barrier.generation != generation;
  });
  acquire(barrier.published, actor());
}

// `who` touches the shared memory of the block of this rank, which must not have ended then: check_foreign.
inline void touch_foreign(int rank, int who) { block.foreign[{rank, who}] = block.clocks[who][who]; }

// Whether every block ended after what others did to its shared memory, not by chance: a thread of it knew.
inline void check_foreign() {
  for (const auto& [key, time] : block.foreign) {
    bool known = false;
    for (int i = key.first * block.size; i < (key.first + 1) * block.size; ++i) known |= before(key.second, time, i);
    if (!known) fail("block %d of a cluster may end before another one is done with its shared memory", key.first);
  }
}

// --- Shared memory -------------------------------------------------------------------------------------------------

// A shared address is one of the thread's own block, unless its upper bits name another block of the cluster, by rank.
constexpr int kRankShift = 24;

inline uint32_t shared_address_in(int rank, uint32_t address) {
  return (address & ((1u << kRankShift) - 1)) | uint32_t(rank + 1) << kRankShift;
}
inline int shared_rank(uint32_t address) { return address >> kRankShift ? int(address >> kRankShift) - 1 : rank(); }
// For messages, too.
inline uint32_t shared_offset(uint32_t address) { return (address & ((1u << kRankShift) - 1)) - kSharedBase; }

inline uint8_t* shared_bytes(uint32_t address, size_t bytes, size_t alignment) {
  const uint32_t offset = shared_offset(address);
  if (offset + bytes > block.shared_size) {
    fail("shared access out of bounds: %zu bytes at %d of %zu", bytes, int(offset), block.shared_size);
  }
  if (offset % alignment != 0) fail("shared access of %zu bytes at %u is not aligned", alignment, offset);
  return block.shared.data() + shared_rank(address) * block.window + offset;
}

template <typename Visit>
void each_cell(uint32_t address, size_t bytes, Visit visit) {
  const uint32_t offset = shared_offset(address);
  Cell* cells = &block.cells[shared_rank(address) * block.window / 4];
  for (uint32_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) visit(cells[i], i * 4);
}

// The bytes at an address, for `who` to read.
inline const uint8_t* shared_read(uint32_t address, size_t bytes, size_t alignment, int who) {
  const uint8_t* data = shared_bytes(address, bytes, alignment);
  each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    if (cell.pending) fail("shared offset %u is read before the copy into it has been waited for", at);
    if (cell.writer < 0) fail("shared offset %u is read, but nobody wrote it", at);
    if (!before(cell.writer, cell.write_time, who)) {
      fail("race at shared offset %u: read by thread %d, written by thread %d, no barrier between", at, who, cell.writer);
    }
    const uint32_t now = block.clocks[who][who];
    for (auto& reader : cell.readers) {
      if (reader.first == who) {
        reader.second = now;
        return;
      }
    }
    cell.readers.emplace_back(who, now);
  });
  return data;
}

// The bytes at an address, for `who` to write.
inline uint8_t* shared_write(uint32_t address, size_t bytes, size_t alignment, int who) {
  uint8_t* data = shared_bytes(address, bytes, alignment);
  each_cell(address, bytes, [&](Cell& cell, uint32_t at) {
    if (cell.pending) fail("shared offset %u is written while a copy into it is on its way", at);
    if (cell.writer >= 0 && !before(cell.writer, cell.write_time, who)) {
      fail("race at shared offset %u: written by threads %d and %d, no barrier between", at, who, cell.writer);
    }
    for (const auto& reader : cell.readers) {
      if (!before(reader.first, reader.second, who)) {
        fail("race at shared offset %u: written by thread %d while thread %d may still read", at, who, reader.first);
      }
    }
    cell.readers.clear();
    cell.writer = who;
    cell.write_time = block.clocks[who][who];
  });
  return data;
}

// An asynchronous copy starts: from now on anything may lie there, so it is filled with NaN.
inline void async_write_begin(uint32_t address, size_t bytes, size_t alignment, int who) {
  std::memset(shared_write(address, bytes, alignment, who), 0xff, bytes);
  each_cell(address, bytes, [](Cell& cell, uint32_t) { cell.pending = true; });
}

// It arrives, and counts as a write of `who` at this moment.
inline void async_write_end(uint32_t address, size_t bytes, const void* data, int who) {
  each_cell(address, bytes, [](Cell& cell, uint32_t) { cell.pending = false; });
  std::memcpy(shared_write(address, bytes, 1, who), data, bytes);
}

// --- Running a block -----------------------------------------------------------------------------------------------

inline void fiber_main() {
  kernel_body();
  current->done = true;
  ++block.ended;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it waits. False: the launch has failed.
__attribute__((noinline)) inline bool resume(Fiber& fiber) {
  current = &fiber;
  const unsigned id = fiber.id % block.size;
  blockIdx = block.at[fiber.id / block.size];
  threadIdx = {id % blockDim.x, id / blockDim.x % blockDim.y, id / blockDim.x / blockDim.y};
  const int code = _setjmp(scheduler);
  if (code == 0) {
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
  }
  current = nullptr;
  return code != 2;
}

__attribute__((noinline)) inline bool run_guarded(const std::function<void()>& work) {
  if (_setjmp(scheduler) != 0) return false;
  work();
  return true;
}

inline bool can_run(Fiber& fiber) { return !fiber.done && (fiber.ready == nullptr || fiber.ready(fiber.context)); }

// Runs the lanes of a warp while any of them can go on. Sets `progress`; false: the launch has failed.
inline bool run_warp(int warp, bool& progress) {
  for (bool again = true; again;) {
    again = false;
    const int turn = random_source() % kWarp;
    for (int i = 0; i < kWarp; ++i) {
      Fiber& fiber = block.fibers[warp * kWarp + (i + turn) % kWarp];
      if (!can_run(fiber)) continue;
      again = progress = true;
      if (!resume(fiber)) return false;
    }
  }
  return true;
}

// The blocks of a cluster, or one block, from start to end. False: `error` says what went wrong.
inline bool run_blocks(const std::vector<uint3>& at, size_t shared_size) {
  const int size = blockDim.x * blockDim.y * blockDim.z, threads = size * int(at.size());
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block = Block{};
  block.threads = threads;
  block.size = size;
  block.at = at;
  block.fibers.resize(threads);
  block.clocks.assign(threads + 1, Clocks(threads + 1, 0));
  for (int i = 0; i <= threads; ++i) block.clocks[i][i] = 1;
  block.warps.resize(threads / kWarp);
  block.barriers.resize(16 * at.size());
  block.shared_size = shared_size;
  block.window = shared_size / 4 * 4 + 4;
  block.shared.assign(block.window * at.size(), 0xff);
  block.cells.resize(block.window / 4 * at.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.id = i;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks + kStack * i;
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, fiber_main, 0);
  }
  std::vector<int> order(threads / kWarp);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  for (;;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), random_source);
    for (int warp : order) {
      if (!run_warp(warp, progress)) return false;
    }
    if (progress) continue;
    if (!block.deferred.empty()) {
      const size_t pick = random_source() % block.deferred.size();
      const std::function<void()> work = std::move(block.deferred[pick]);
      block.deferred.erase(block.deferred.begin() + pick);
      if (!run_guarded(work)) return false;
      continue;
    }
    for (const Fiber& fiber : block.fibers) {
      if (!fiber.done) {
        error = "deadlock: thread " + std::to_string(fiber.id % block.size) + " waits for ever at " + fiber.waits_for;
        return false;
      }
    }
    if (!run_guarded(check_foreign)) return false;
    for (const auto& check : block.at_exit) {
      if (!run_guarded(check)) return false;
    }
    return true;
  }
}

}  // namespace host
