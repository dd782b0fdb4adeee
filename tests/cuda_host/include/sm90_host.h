// What is Hopper's own, in plain C++: mbarriers, tensor copies, wgmma on descriptors, setmaxnreg. Section numbers are
// those of the PTX ISA, version 9.0. The names that kernels use are in overlay/device/sm90_ptx.cuh.
//
// - A tensor copy fills its box with NaN when it is issued, reads global memory and arrives when no thread can go on.
//   What of its box is inside the map must be in the buffer that the map's address is in.
// - A wgmma fills its accumulators with NaN when it is issued. They hold the result, computed from what shared memory
//   holds by then, when it has been waited for. Its operands are found by decoding the descriptors, not by knowing the
//   kernel.
// - mbarriers carry happens-before; each has an asynchronous actor of its own for the copies it counts.
#pragma once

#include <cmath>
#include <map>
#include <memory>

#include "host.h"
#include "host_memory.h"

namespace host {

inline int defect = 0;  // which of a test's broken expressions is in force; none: 0

struct TensorMap {
  uint64_t address, sizes[3], strides[2];
  uint32_t box[3];
};

struct Mbarrier {
  int count, missing, actor;  // arrivals of a phase, those not in yet; the actor of its copies
  int64_t bytes = 0;          // announced and not arrived
  uint64_t phase = 0;
  int maker;
  uint32_t made;
  bool fenced = false;
  bool foreign = false;  // another block of the cluster has arrived
  Clocks pending, published;
};

struct Product {  // one wgmma of one thread
  float* sum;
  uint64_t number;  // of this warpgroup's
};

struct Issued {  // one wgmma of a warpgroup
  uint64_t a, b;
  int columns, major;
  bool add;
  std::vector<float> result;  // [64, columns], when the first thread has waited for it
};

struct WgmmaThread {
  bool fenced = false;
  uint64_t next = 0;
  std::vector<std::vector<Product>> groups = {{}};  // the last one is open
  std::map<float*, std::vector<float>> sums;        // what the accumulators in flight will hold
};

constexpr int kAsyncActors = 32;  // of a block
constexpr int kRegisterFile = 65536;

struct Hopper {
  std::map<uint32_t, Mbarrier> barriers;           // by address, with the rank of the block
  std::vector<WgmmaThread> threads;
  std::vector<std::map<uint64_t, Issued>> issued;  // of each warpgroup
  std::vector<int> registers;                      // of each warp's threads
  std::vector<int> free_registers;                 // of each block
};

inline std::weak_ptr<Hopper> hopper_of_block;

// The state of the blocks that run; their end is checked for what nobody waited for.
inline Hopper& hopper() {
  if (std::shared_ptr<Hopper> state = hopper_of_block.lock()) return *state;
  auto state = std::make_shared<Hopper>();
  hopper_of_block = state;
  const int asynchronous = kAsyncActors * int(block.at.size()), actors = block.threads + 1 + asynchronous;
  for (int i = 0; i < asynchronous; ++i) block.clocks.emplace_back();
  for (int i = 0; i < actors; ++i) {
    block.clocks[i].resize(actors, 0);
    if (i > block.threads) block.clocks[i][i] = 1;
  }
  state->threads.resize(block.threads);
  state->issued.resize(block.threads / 128 + 1);
  // 168 a thread of 384: __launch_bounds__ lets the compiler take no more, in steps of 8.
  state->registers.assign(block.threads / kWarp, kRegisterFile / block.size / 8 * 8);
  state->free_registers.assign(block.at.size(), kRegisterFile - state->registers[0] * block.size);
  block.at_exit.push_back([state] {
    for (const auto& [address, barrier] : state->barriers) {
      if (barrier.bytes != 0) fail("a block ends while the mbarrier at %u still expects bytes", shared_offset(address));
    }
    for (const WgmmaThread& thread : state->threads) {
      if (thread.groups.size() > 1 || !thread.groups[0].empty()) fail("a block ends with a wgmma in flight");
    }
  });
  return *state;
}

inline Mbarrier& mbarrier_at(uint32_t given) {
  const uint32_t address = shared_address_in(shared_rank(given), given);
  const auto found = hopper().barriers.find(address);
  if (found == hopper().barriers.end()) fail("no mbarrier was initialised at shared offset %u", shared_offset(address));
  Mbarrier& barrier = found->second;
  if (!before(barrier.maker, barrier.made, actor())) fail("an mbarrier is used before its initialisation is visible");
  return barrier;
}

inline void mbarrier_init(uint32_t given, uint32_t count) {
  const uint32_t address = shared_address_in(rank(), given);
  shared_bytes(address, 8, 8);
  Hopper& state = hopper();
  if (count == 0 || state.barriers.count(address)) fail("an mbarrier is initialised wrongly or twice");
  const int who = block.threads + 1 + int(state.barriers.size());
  const size_t most = kAsyncActors * block.at.size();
  if (state.barriers.size() >= most) fail("more mbarriers than the host execution has actors");
  Mbarrier barrier{};
  barrier.count = barrier.missing = int(count);
  barrier.actor = who;
  barrier.maker = actor();
  barrier.made = block.clocks[actor()][actor()];
  state.barriers[address] = barrier;
}

inline void mbarrier_init_fence() {
  for (auto& [address, barrier] : hopper().barriers) {
    if (barrier.maker == actor()) barrier.fenced = true;
  }
}

inline void mbarrier_advance(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  merge(barrier.published, barrier.pending);
  barrier.pending.clear();
  barrier.missing = barrier.count;
  ++barrier.phase;
}

inline void mbarrier_arrive(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = mbarrier_at(address);
  if (barrier.missing == 0) fail("more arrivals at an mbarrier than it counts");
  barrier.bytes += bytes;
  --barrier.missing;
  release(barrier.pending, actor());
  mbarrier_advance(barrier);
}

// An arrival at the mbarrier at the same place in another block of the cluster.
inline void mbarrier_arrive_at(int target, uint32_t address) {
  if (target < 0 || target >= int(block.at.size())) fail("block %d of a cluster of %zu", target, block.at.size());
  const uint32_t there = shared_address_in(target, address);
  if (target != rank()) {
    touch_foreign(target, actor());
    mbarrier_at(there).foreign = true;
  }
  mbarrier_arrive(there, 0);
}

// `cluster`: the wait is for arrivals of every block of the cluster.
inline void mbarrier_wait(uint32_t address, uint32_t parity, bool cluster = false) {
  Mbarrier& barrier = mbarrier_at(address);
  if (parity > 1) fail("a parity of %u", parity);
  wait_until("an mbarrier", [&] { return (barrier.phase & 1) != parity; });
  if (barrier.foreign && !cluster) fail("a wait in the block's scope for arrivals of another block");
  acquire(barrier.published, actor());
}

// The buffers that this address is in: of views of one storage, maybe several.
inline std::vector<Region> regions_at(uintptr_t address) {
  std::vector<Region> found;
  for (const Region& region : regions) {
    if (address >= region.begin && address < region.end) found.push_back(region);
  }
  return found;
}

// The 128-byte swizzle: bits 4-6 of a shared address ^= bits 7-9.
inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// What of a map's box at (column, row, base) is inside, zeros elsewhere, swizzled as for `to`.
inline std::vector<uint8_t> tensor_box(const TensorMap& map, uint32_t to, int column, int row, int base) {
  const std::vector<Region> buffers = regions_at(map.address);
  const int64_t first = std::max(column, 0);
  const int64_t last = std::min(int64_t(column) + map.box[0], int64_t(map.sizes[0]));
  std::vector<uint8_t> data(map.box[0] * map.box[1] * map.box[2] * 2, 0);
  for (uint32_t k = 0; k < map.box[2]; ++k) {
    for (uint32_t j = 0; j < map.box[1]; ++j) {
      const int64_t r = int64_t(row) + j, b = int64_t(base) + k;
      if (r < 0 || b < 0 || r >= int64_t(map.sizes[1]) || b >= int64_t(map.sizes[2]) || first >= last) continue;
      const uintptr_t line = map.address + r * map.strides[0] + b * map.strides[1];
      bool inside = false;
      for (const Region& region : buffers) {
        inside |= line + 2 * first >= region.begin && line + 2 * last <= region.end;
      }
      if (!inside) fail("a tensor copy reads row %lld, %lld outside of its map's buffer", (long long)b, (long long)r);
      for (int64_t c = first; c < last; ++c) {
        const uint32_t at = to + ((k * map.box[1] + j) * map.box[0] + uint32_t(c - column)) * 2;
        std::memcpy(&data[swizzle128(at) - to], reinterpret_cast<const uint16_t*>(line) + c, 2);
      }
    }
  }
  return data;
}

// A copy into the block of this rank, at the same place there as `to` is here, counted by the mbarrier at the same
// place.
inline void tensor_load_to(int target, uint32_t to, const TensorMap& given, uint32_t barrier_address, int column,
                           int row, int base) {
  const TensorMap map = given;
  const uint32_t there = shared_address_in(target, to);
  Mbarrier& barrier = mbarrier_at(shared_address_in(target, barrier_address));
  if (!barrier.fenced) fail("the copy engine uses an mbarrier whose initialisation was not fenced for it");
  const uint32_t bytes = map.box[0] * map.box[1] * map.box[2] * 2;
  async_write_begin(there, bytes, 128, actor());
  Clocks issued;
  release(issued, actor());
  const bool foreign = target != rank();
  defer([=, &barrier] {
    bool ended = true;
    for (int i = target * block.size; i < (target + 1) * block.size; ++i) ended &= block.fibers[i].done;
    if (ended) fail("a tensor copy arrives after the block has ended");
    acquire(issued, barrier.actor);
    const std::vector<uint8_t> data = tensor_box(map, to, column, row, base);
    async_write_end(there, bytes, data.data(), barrier.actor);
    barrier.bytes -= bytes;
    if (foreign) touch_foreign(target, barrier.actor);
    release(barrier.pending, barrier.actor);
    mbarrier_advance(barrier);
  });
}

inline void tensor_load(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row, int base) {
  tensor_load_to(rank(), to, map, barrier, column, row, base);
}

// The same into every block of the cluster whose bit is set in `blocks`. When each of them arrives, is chance.
inline void tensor_load_multicast(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row, int base,
                                  uint32_t blocks) {
  const int size = int(block.at.size());
  if (blocks == 0 || blocks >> size) fail("a copy to the blocks %u of a cluster of %d", blocks, size);
  for (int target = 0; target < size; ++target) {
    if (blocks >> target & 1) tensor_load_to(target, to, map, barrier, column, row, base);
  }
}

// Where 16 bytes of an operand lie: 9.7.15.5.1.2 and the matrix descriptor. `mn`, `k` index elements along M or N and
// along K; of the contiguous one only every eighth is asked for.
struct Operand {
  uint32_t start, leading, stride;
  int swizzle;  // bytes: 16 (none), 32, 64, 128
  bool mn_major;

  Operand(uint64_t descriptor, bool mn_major_) : mn_major(mn_major_) {
    start = uint32_t(descriptor & 0x3fff) << 4;
    leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
    stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const int modes[4] = {16, 128, 64, 32};
    swizzle = modes[descriptor >> 62];
    if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset, which is not modelled here");
    if (descriptor & 0x3FF1C000C000C000) fail("a matrix descriptor with bits that nothing is said of");
    if (swizzle > 16 && (start & (swizzle * 8 - 1) & ~127u)) fail("an operand starts inside its swizzle");
  }

  uint32_t at(int mn, int k) const {
    const uint32_t atom = mn_major ? k % 8 * swizzle : mn % 8 * swizzle;
    uint32_t address;
    if (mn_major && swizzle == 16) {
      address = start + mn / 8 * stride + k / 8 * leading + atom;
    } else if (mn_major) {
      address = start + mn * 2 / swizzle * leading + mn * 2 % swizzle + k / 8 * stride + atom;
    } else if (swizzle == 16) {
      address = start + mn / 8 * stride + k / 8 * leading + atom;
    } else {
      address = start + mn / 8 * stride + k * 2 + atom;
    }
    return address ^ (address >> 7 & (swizzle / 16 - 1)) << 4;
  }

  // Calls visit(address, mn, k) for each 16 bytes of [first, last) by 16.
  template <typename Visit>
  void each(int first, int last, Visit visit) const {
    for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
      for (int mn = first; mn < last; mn += mn_major ? 8 : 1) visit(at(mn, k), mn, k);
    }
  }

  // The elements as float, to[mn + k * pitch].
  template <typename Widen>
  void fetch(int count, float* to, int pitch, Widen widen) const {
    each(0, count, [&](uint32_t address, int mn, int k) {
      uint16_t elements[8];
      std::memcpy(elements, shared_bytes(address, 16, 16), 16);
      for (int i = 0; i < 8; ++i) to[mn_major ? mn + i + k * pitch : mn + (k + i) * pitch] = widen(elements[i]);
    });
  }
};

// A warp reads its 16 rows of a and all of b.
inline void check_operands(const Issued& product) {
  const int row = actor() / kWarp % 4 * 16;
  const auto read = [](uint32_t address, int, int) { shared_read(address, 16, 16, actor()); };
  Operand(product.a, product.major).each(row, row + 16, read);
  Operand(product.b, product.major).each(0, product.columns, read);
}

inline void wgmma_fence() {
  int nothing = 0;
  warp_collective("wgmma.fence", nothing, [](int* (&)[kWarp]) {});
  hopper().threads[actor()].fenced = true;
}

inline void wgmma(float* sum, int columns, uint64_t a, uint64_t b, bool add, int major) {
  int nothing = 0;
  warp_collective("wgmma", nothing, [](int* (&)[kWarp]) {});
  WgmmaThread& thread = hopper().threads[actor()];
  const Issued mine{a, b, columns, major, add, {}};
  const auto [place, first] = hopper().issued[actor() / 128].emplace(thread.next, mine);
  const Issued& theirs = place->second;
  if (!first && (theirs.a != a || theirs.b != b || theirs.add != add || theirs.columns != columns)) {
    fail("the threads of a warpgroup issue different wgmmas");
  }
  // 9.7.15.7.1: a fence lies between any other use of the registers and the first wgmma that uses them.
  if (!thread.fenced) fail("a wgmma without a wgmma.fence since its registers were used");
  if (!thread.sums.count(sum)) {
    thread.sums[sum].assign(sum, sum + columns / 2);
    std::fill(sum, sum + columns / 2, std::nanf(""));
  }
  thread.groups.back().push_back({sum, thread.next++});
  if (actor() % kWarp == 0) check_operands(mine);
}

inline void wgmma_commit() {
  int nothing = 0;
  warp_collective("wgmma.commit_group", nothing, [](int* (&)[kWarp]) {});
  hopper().threads[actor()].groups.emplace_back();
}

// Elements of D in a thread's registers: 9.7.15.5.1.1.
template <typename Widen>
void wgmma_finish(const Product& product, Widen widen) {
  WgmmaThread& thread = hopper().threads[actor()];
  Issued& issued = hopper().issued[actor() / 128].at(product.number);
  const int columns = issued.columns;
  if (actor() % kWarp == 0) check_operands(issued);
  if (issued.result.empty()) {
    std::vector<float> a(64 * 16), b(16 * columns);
    Operand(issued.a, issued.major).fetch(64, a.data(), 64, widen);
    Operand(issued.b, issued.major).fetch(columns, b.data(), columns, widen);
    issued.result.assign(64 * columns, 0.0f);
    for (int m = 0; m < 64; ++m) {
      float* line = &issued.result[m * columns];
      for (int k = 0; k < 16; ++k) {
        const float left = a[m + k * 64];
        const float* right = &b[k * columns];
        for (int n = 0; n < columns; n += 64) {
          for (int i = 0; i < 64; ++i) line[n + i] += left * right[n + i];
        }
      }
    }
  }
  std::vector<float>& sum = thread.sums.at(product.sum);
  const int t = actor() % 128;
  for (int i = 0; i < columns / 2; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    sum[i] = (issued.add ? sum[i] : 0.0f) + issued.result[row * columns + column];
  }
}

template <typename Widen>
void wgmma_wait(int later, Widen widen) {
  int nothing = 0;
  warp_collective("wgmma.wait_group", nothing, [](int* (&)[kWarp]) {});
  WgmmaThread& thread = hopper().threads[actor()];
  while (int(thread.groups.size()) - 1 > later) {
    for (const Product& product : thread.groups.front()) wgmma_finish(product, widen);
    thread.groups.erase(thread.groups.begin());
  }
  if (thread.groups.size() > 1 || !thread.groups[0].empty()) return;
  for (const auto& [sum, values] : thread.sums) {
    // Until here they are the products': what a thread writes may come before or after what the tensor cores write.
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isnan(sum[i])) fail("an accumulator is written while a wgmma on it is in flight");
    }
    std::copy(values.begin(), values.end(), sum);
  }
  thread.sums.clear();
  thread.fenced = false;
  // A warpgroup's products that all its threads are done with are forgotten.
  uint64_t done = thread.next;
  const int first = actor() / 128 * 128;
  for (int i = first; i < first + 128; ++i) {
    const WgmmaThread& other = hopper().threads[i];
    uint64_t oldest = other.next;
    for (const auto& group : other.groups) {
      if (!group.empty()) oldest = std::min(oldest, group[0].number);
    }
    done = std::min(done, oldest);
  }
  auto& issued = hopper().issued[actor() / 128];
  issued.erase(issued.begin(), issued.lower_bound(done));
}

inline void set_registers(int count, bool more) {
  int nothing = 0;
  warp_collective("setmaxnreg", nothing, [](int* (&)[kWarp]) {});
  if (count < 24 || count > 256 || count % 8 != 0) fail("setmaxnreg of %d", count);
  if (actor() % kWarp != 0) return;
  Hopper& state = hopper();
  int& mine = state.registers[actor() / kWarp];
  const int wanted = (count - mine) * kWarp;
  if (more ? wanted < 0 : wanted > 0) fail("setmaxnreg of %d from %d in the wrong direction", count, mine);
  int& free_registers = state.free_registers[rank()];
  wait_until("setmaxnreg", [&] { return free_registers >= wanted; });
  free_registers -= wanted;
  mine = count;
}

}  // namespace host
