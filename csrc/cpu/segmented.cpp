// Segmented weight gradient on a CPU: the loops around the micro-tile.
//
// Tokens are taken in phases, as many as fit the caches when packed. A phase packs its rows of dy and x (while the phase
// before it is multiplied) and then runs over units: strips of micro-tiles, taken by whichever thread is free. A unit
// adds its squares up in a fixed order, in float32 within a strip's vectors and in float64 from there on, and the units'
// sums are added in order: the same bits for any number of threads.
//
// Where inner products of the groups' sums are wanted, all tokens are one phase: the sums of all groups
// in a unit's rows and columns stay in a cache until their products are taken, and never go to memory.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "schedule.h"
#include "threads.h"

namespace gradnorm {

namespace {

using namespace cpu;

constexpr int64_t kPackTokens = 32;   // of one piece of packing
constexpr int64_t kUnitRows = 196;    // of a strip: its packed dy stays in the second cache
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds that are not worth a second thread
constexpr int64_t kAlignment = 64, kLine = kAlignment / sizeof(float), kDouble = sizeof(double) / sizeof(float);

const Kernel& kernel_of(int isa) {
#if defined(__x86_64__)
  if (isa == 1) return kernel_avx2;
  if (isa == 2) return kernel_avx512;
#endif
  (void)isa;
  return kernel_generic;
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How a weight is cut in panels and units, and where things lie in the workspace (all in floats).
struct Geometry {
  const Kernel& kernel;
  int64_t dy_panels, x_panels, row_blocks, units, limit;
  int64_t dy_floats, packed_floats, partial_floats;
  int64_t pairs;  // of groups whose inner products are wanted

  Geometry(int isa, int64_t tokens, int64_t d_in, int64_t d_out, int64_t gram_groups, int64_t segments)
      : kernel(kernel_of(isa)), pairs(gram_groups * (gram_groups + 1) / 2) {
    dy_panels = divide_up(d_out, kernel.rows);
    x_panels = divide_up(d_in, kernel.columns);
    row_blocks = divide_up(dy_panels, std::max<int64_t>(1, kUnitRows / kernel.rows));
    units = row_blocks * x_panels;
    limit = pairs ? tokens : std::min(tokens, most_tokens(d_in, d_out));
    dy_floats = dy_panels * dy_stride(limit);
    packed_floats = dy_floats + x_panels * x_stride(limit);
    // In one phase every segment may end a sample and a group.
    partial_floats = units * (pairs ? 2 * segments : most_partials(limit)) * kDouble;
  }

  // From a panel to the next, in floats: whole lines, and one more, or the panels' beginnings would often fall into one
  // set of a cache.
  int64_t dy_stride(int64_t tokens) const { return divide_up(kernel.rows * tokens, kLine) * kLine + kLine; }
  int64_t x_stride(int64_t tokens) const { return divide_up(kernel.columns * tokens, kLine) * kLine + kLine; }

  int64_t bytes() const {
    const int64_t floats = (pairs ? 1 : 2) * packed_floats + partial_floats + units * pairs * kDouble;
    return floats * static_cast<int64_t>(sizeof(float)) + kAlignment;
  }
};

class SegmentedWgradCall {
 public:
  explicit SegmentedWgradCall(const SegmentedWgrad& args)
      : args_(args),
        shape_(args.isa, args.tokens, args.d_in, args.d_out, args.gram ? groups_of(args) : 0,
               args.segments),
        schedule_(make_schedule(args, shape_.limit)) {
    const auto start = reinterpret_cast<uintptr_t>(args.workspace);
    packed_ = reinterpret_cast<float*>(divide_up(start, kAlignment) * kAlignment);
    partials_ = reinterpret_cast<double*>(packed_ + (shape_.pairs ? 1 : 2) * shape_.packed_floats);
    products_ = partials_ + shape_.partial_floats / kDouble;
  }

  void run() {
    const int threads = args_.tokens * args_.d_in * args_.d_out < kSerialWork ? 1 : args_.threads;
    const int phases = static_cast<int>(schedule_.phases.size());
    for (int p = -1; p < phases; ++p) {
      const int64_t units = p < 0 ? 0 : shape_.units;
      const int64_t pieces = p + 1 < phases ? 2 * divide_up(schedule_.phases[p + 1].tokens, kPackTokens) : 0;
      auto work = [&](int64_t item) {
        if (item < units) {
          multiply(p, item);
        } else {
          pack(p + 1, item - units);
        }
      };
      share(threads, units + pieces, work);
      if (p >= 0) reduce(schedule_.phases[p]);
    }
    if (args_.gram) reduce_products();
  }

 private:
  static int64_t groups_of(const SegmentedWgrad& args) { return args.groups[args.segments - 1] + 1; }

  float* packed(int phase) const { return packed_ + (phase % 2) * shape_.packed_floats; }

  void pack(int p, int64_t piece) const {
    const Phase& phase = schedule_.phases[p];
    const bool dy = piece % 2;
    const int64_t first = piece / 2 * kPackTokens, last = std::min(first + kPackTokens, phase.tokens);
    const int64_t size = args_.type == kFloat32 ? 4 : 2, stride = dy ? args_.dy_stride : args_.x_stride;
    const char* matrix = static_cast<const char*>(dy ? args_.dy : args_.x);
    const int64_t* const rows = args_.rows ? args_.rows + phase.first : nullptr;
    if (!rows) matrix += phase.first * stride * size;
    if (dy) {
      shape_.kernel.pack_dy(matrix, stride, args_.type, rows, args_.d_out, first, last, packed(p),
                            shape_.dy_stride(phase.tokens));
    } else {
      shape_.kernel.pack_x(matrix, stride, args_.type, rows, args_.d_in, first, last, packed(p) + shape_.dy_floats,
                           shape_.x_stride(phase.tokens));
    }
  }

  // One unit: the micro-tiles of a block of dy's panels and one of x's, over all of a phase's tokens.
  void multiply(int p, int64_t unit) const {
    const Phase& phase = schedule_.phases[p];
    const Kernel& kernel = shape_.kernel;
    const int64_t row_block = unit / shape_.x_panels, column = unit % shape_.x_panels * kernel.columns;
    const int64_t from = shape_.dy_panels * row_block / shape_.row_blocks;
    const int64_t to = shape_.dy_panels * (row_block + 1) / shape_.row_blocks;
    const float* const dy = packed(p);
    const float* const x = packed(p) + shape_.dy_floats + unit % shape_.x_panels * shape_.x_stride(phase.tokens);
    static_assert(most_partials(kMostTokens) >= kMostGramSquares);
    alignas(kAlignment) float squares[most_partials(kMostTokens) * kLanes];
    std::memset(squares, 0, phase.targets.size() * kLanes * sizeof(float));
    const Sums sums = args_.gram ? own_sums(from * kernel.rows, to * kernel.rows, column) : kept_sums();

    for (int b = phase.block; b < phase.block + phase.blocks; ++b) {
      const Block& block = schedule_.blocks[b];
      Tile tile;
      tile.x_panel = x + block.first * kernel.columns;
      tile.parts = schedule_.parts.data() + block.part;
      tile.part_count = block.parts;
      tile.columns = static_cast<int>(std::min<int64_t>(kernel.columns, args_.d_in - column));
      tile.stride = sums.stride;
      tile.open_in = block.open_in;
      tile.fresh = block.fresh;
      tile.total_set = block.group == 0;
      tile.group_square = block.group_square;
      tile.keep = !block.ends || sums.kept || !args_.total;
      tile.squares = squares;
      float* const running = sums.running + (sums.kept ? block.group * sums.group_stride : 0);
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t row = panel * kernel.rows, at = (row - sums.row) * sums.stride + column - sums.column;
        tile.dy_panel = dy + panel * shape_.dy_stride(phase.tokens) + block.first * kernel.rows;
        tile.rows = static_cast<int>(std::min<int64_t>(kernel.rows, args_.d_out - row));
        tile.running = running + at;
        tile.open = (block.alone ? running : sums.open) + at;
        tile.total = args_.total && !args_.gram ? args_.total + at : nullptr;
        kernel.tile(tile);
      }
    }
    if (args_.gram) finish_sums(sums, unit, std::min(to * kernel.rows, args_.d_out));

    double* const partials = partials_ + unit * static_cast<int64_t>(phase.targets.size());
    for (size_t index = 0; index < phase.targets.size(); ++index) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(squares[index * kLanes + lane]);
      partials[index] = sum;
    }
  }

  // Where the sums of the groups are, and the unfinished gradient: element (row, column) comes first.
  struct Sums {
    float* running;
    float* open;
    int64_t row, column, stride, group_stride;
    bool kept;  // one sum for each group
  };

  // In the caller's memory, of the whole weight.
  Sums kept_sums() const {
    return {args_.sums, args_.open, 0, 0, args_.d_in, args_.d_out * args_.d_in, args_.sums_kept};
  }

  // In memory of this thread's own, of one unit: all groups.
  Sums own_sums(int64_t first, int64_t last, int64_t column) const {
    static thread_local std::vector<float> memory;
    const int64_t stride = shape_.kernel.columns, size = (last - first) * stride;
    memory.resize((groups_of(args_) + 1) * size);
    return {memory.data(), memory.data() + groups_of(args_) * size, first, column, stride, size, true};
  }

  // The inner products of the groups' sums over one unit, and the sum over the groups.
  void finish_sums(const Sums& sums, int64_t unit, int64_t last) const {
    const int groups = static_cast<int>(groups_of(args_));
    const int64_t rows = last - sums.row;
    const int columns = static_cast<int>(std::min<int64_t>(shape_.kernel.columns, args_.d_in - sums.column));
    alignas(kAlignment) float lanes[kMostGramGroups * (kMostGramGroups + 1) / 2][kLanes];
    shape_.kernel.pairs(sums.running, sums.group_stride, groups, rows, columns, sums.stride, lanes);
    for (int64_t pair = 0; pair < shape_.pairs; ++pair) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[pair][lane]);
      products_[unit * shape_.pairs + pair] = sum;
    }
    if (!args_.total) return;
    float* const total = args_.total + sums.row * args_.d_in + sums.column;
    shape_.kernel.add_up(sums.running, sums.group_stride, groups, rows, columns, sums.stride, total, args_.d_in);
  }

  void reduce_products() const {
    const int64_t groups = groups_of(args_);
    for (int64_t unit = 0; unit < shape_.units; ++unit) {
      const double* product = products_ + unit * shape_.pairs;
      for (int64_t b = 0; b < groups; ++b) {
        for (int64_t a = 0; a <= b; ++a, ++product) {
          args_.gram[a * groups + b] += *product;
          if (a < b) args_.gram[b * groups + a] += *product;
        }
      }
    }
  }

  void reduce(const Phase& phase) const {
    const int64_t count = static_cast<int64_t>(phase.targets.size());
    for (int64_t unit = 0; unit < shape_.units; ++unit) {
      for (int64_t index = 0; index < count; ++index) *phase.targets[index] += partials_[unit * count + index];
    }
  }

  const SegmentedWgrad& args_;
  const Geometry shape_;
  const cpu::Schedule schedule_;
  float* packed_;
  double* partials_;
  double* products_;
};

}  // namespace

void segmented_wgrad(const SegmentedWgrad& args) {
  SegmentedWgradCall(args).run();
}

int64_t segmented_wgrad_workspace(int isa, int64_t tokens, int64_t d_in, int64_t d_out, int64_t gram_groups,
                                  int64_t segments) {
  return Geometry(isa, tokens, d_in, d_out, gram_groups, segments).bytes();
}

bool runs_isa(int isa) {
#if defined(__x86_64__)
  if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == 2) {
    return runs_isa(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return isa == 0;
}

int best_isa() {
  for (int isa = 2; isa > 0; --isa) {
    if (runs_isa(isa)) return isa;
  }
  return 0;
}

}  // namespace gradnorm
