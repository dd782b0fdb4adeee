// The Python module gradnorm_kernels._C: build_info() and the launchers of launchers.h. The only file that knows pybind11.
//
// Pointers arrive as integers (a stream's cuda_stream), as objects with a method data_ptr() (tensors), or as None: no
// header of torch is needed, and one build serves every torch. Launchers run without the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "launchers.h"
#include "tiles.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

std::vector<std::string> split(const char* text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

// An empty text is None in Python.
py::object text_or_none(const char* text) {
  if (*text == '\0') return py::none();
  return py::str(text);
}

py::dict build_info() {
  using gradnorm::build;
  py::dict info;
  info["cxx_compiler"] = build.cxx_compiler;
  info["cuda_compiler"] = text_or_none(build.cuda_compiler);
  info["cuda"] = text_or_none(build.cuda_version);
  info["architectures"] = split(build.architectures);
  info["cpu_isas"] = split(build.cpu_isas);
  info["commit"] = text_or_none(build.commit);
  return info;
}

// A name as a Python string, which is made once: a launch has thirty of them, and there are some launches in each call.
// `name` is a literal.
PyObject* interned(const char* name) {
  static std::unordered_map<const char*, PyObject*> known;
  PyObject*& found = known[name];
  if (found == nullptr) found = PyUnicode_InternFromString(name);
  return found;
}

Address address_of(py::handle value) {
  if (value.is_none()) return 0;
  if (PyLong_Check(value.ptr())) return value.cast<Address>();
  return value.attr("data_ptr")().cast<Address>();
}

// The keyword arguments of a call, by which the fields of a launch are named; each must be there and be used.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void operator()(const char* name, T& field) {
    const py::handle value = PyDict_GetItem(given_.ptr(), interned(name));
    if (!value) throw py::type_error(std::string("missing argument: ") + name);
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(address_of(value));
    } else {
      field = value.cast<T>();
    }
    ++used_;
  }

  // Raises TypeError where something was given that no field takes.
  void end() const {
    if (used_ != given_.size()) throw py::type_error("an argument was given that the launch does not take");
  }

 private:
  const py::kwargs& given_;
  size_t used_ = 0;
};

void segmented_wgrad(const py::kwargs& given) {
  Fields field(given);
  gradnorm::SegmentedWgrad args;
  field("x", args.x);
  field("dy", args.dy);
  field("x_stride", args.x_stride);
  field("dy_stride", args.dy_stride);
  field("type", args.type);
  field("rows", args.rows);
  field("tokens", args.tokens);
  field("d_in", args.d_in);
  field("d_out", args.d_out);
  field("ends", args.ends);
  field("groups", args.groups);
  field("slots", args.samples);
  field("stretches", args.segments);
  field("sums", args.sums);
  field("sums_kept", args.sums_kept);
  field("open", args.open);
  field("total", args.total);
  field("sample_sq", args.sample_sq);
  field("group_sq", args.group_sq);
  field("gram", args.gram);
  field("workspace", args.workspace);
  field("isa", args.isa);
  field("threads", args.threads);
  field.end();
  py::gil_scoped_release unlocked;
  gradnorm::segmented_wgrad(args);
}

void bind_cpu(py::module_& m) {
  using namespace gradnorm;
  m.def("segmented_wgrad", &::segmented_wgrad);
  m.def("segmented_wgrad_workspace", &segmented_wgrad_workspace, py::arg("isa"), py::arg("tokens"), py::arg("d_in"),
        py::arg("d_out"), py::arg("gram_groups"), py::arg("segments"));
  m.attr("MOST_GRAM_GROUPS") = kMostGramGroups;
  m.attr("MOST_GRAM_SQUARES") = kMostGramSquares;
  m.def("best_isa", &best_isa);
  m.def("runs_isa", &runs_isa, py::arg("isa"));
}

#ifdef GRADNORM_WITH_CUDA
template <typename Launch, void (*launch)(const Launch&, void*)>
void call(const py::kwargs& given) {
  Fields fields(given);
  Launch args;
  void* stream;
  visit(fields, args);
  fields("stream", stream);
  fields.end();
  py::gil_scoped_release unlocked;
  launch(args, stream);
}

void visit(Fields& field, gradnorm::SegmentTable& args) {
  field("offsets", args.offsets);
  field("sample_ids", args.sample_ids);
  field("group_ids", args.group_ids);
  field("offsets_wide", args.offsets_wide);
  field("samples_wide", args.samples_wide);
  field("groups_wide", args.groups_wide);
  field("segments", args.segments);
  field("samples", args.samples);
  field("groups", args.groups);
  field("tokens", args.tokens);
  field("length", args.length);
  field("start", args.start);
  field("end", args.end);
  field("sample", args.sample);
  field("group", args.group);
  field("valid", args.valid);
}

void visit(Fields& field, gradnorm::Schedule& args) {
  field("start", args.start);
  field("end", args.end);
  field("sample", args.sample);
  field("group", args.group);
  field("valid", args.valid);
  field("wide", args.wide);
  field("segments", args.segments);
  field("samples", args.samples);
  field("groups", args.groups);
  field("tokens", args.tokens);
  field("length", args.length);
  field("gram_tokens", args.gram_tokens);
  field("splits", args.splits);
  field("anywhere", args.anywhere);
  field("stored", args.stored);
  field("inner", args.inner);
  field("workspace", args.workspace);
  field("spans", args.spans);
  field("info", args.info);
  field("state", args.state);
  field("segment_start", args.segment_start);
  field("segment_end", args.segment_end);
  field("segment_sample", args.segment_sample);
  field("segment_group", args.segment_group);
  field("split_start", args.split_start);
  field("split_first", args.split_first);
  field("split_last", args.split_last);
  field("outer", args.outer);
  field("inner_sample", args.inner_sample);
  field("token_row", args.token_row);
  field("sample_rank", args.sample_rank);
  field("group_rank", args.group_rank);
  field("sample_span", args.sample_span);
  field("group_span", args.group_span);
}

void visit(Fields& field, gradnorm::WgradNorm& args) {
  field("x", args.x);
  field("dy", args.dy);
  field("x_stride", args.x_stride);
  field("dy_stride", args.dy_stride);
  field("type", args.type);
  field("tokens", args.tokens);
  field("d_in", args.d_in);
  field("d_out", args.d_out);
  field("segment_start", args.segment_start);
  field("segment_end", args.segment_end);
  field("segment_sample", args.segment_sample);
  field("segment_group", args.segment_group);
  field("segments", args.segments);
  field("samples", args.samples);
  field("groups", args.groups);
  field("split_start", args.split_start);
  field("splits", args.splits);
  field("whole_rows", args.whole_rows);
  field("sample_sq", args.sample_sq);
  field("group_sq", args.group_sq);
  field("workspace", args.workspace);
  field("weight_grad", args.weight_grad);
  field("running", args.running);
  field("block_n", args.block_n);
  field("group_m", args.group_m);
  field("staggered", args.staggered);
  field("cluster", args.cluster);
  field("multiprocessors", args.multiprocessors);
}

void visit(Fields& field, gradnorm::Gram& args) {
  field("x", args.x);
  field("dy", args.dy);
  field("x_stride", args.x_stride);
  field("dy_stride", args.dy_stride);
  field("type", args.type);
  field("tokens", args.tokens);
  field("d_in", args.d_in);
  field("d_out", args.d_out);
  field("token_row", args.token_row);
  field("token_rank", args.token_rank);
  field("count", args.count);
  field("reach", args.reach);
  field("pairwise", args.pairwise);
  field("partials", args.partials);
  field("partial", args.partial);
}

void visit(Fields& field, gradnorm::SplitFixup& args) {
  field("workspace", args.workspace);
  field("elements", args.elements);
  field("split_start", args.split_start);
  field("split_first", args.split_first);
  field("split_last", args.split_last);
  field("outer", args.outer);
  field("inner_sample", args.inner_sample);
  field("inner", args.inner);
  field("samples", args.samples);
  field("groups", args.groups);
  field("sample_sq", args.sample_sq);
  field("group_sq", args.group_sq);
  field("products", args.products);
  field("sums", args.sums);
  field("width", args.width);
  field("type", args.type);
  field("weight_grad", args.weight_grad);
}

void visit(Fields& field, gradnorm::Finish& args) {
  field("state", args.state);
  field("info", args.info);
  field("samples", args.samples);
  field("groups", args.groups);
  field("wgrad_samples", args.wgrad_samples);
  field("wgrad_groups", args.wgrad_groups);
  field("wgrad_rows", args.wgrad_rows);
  field("wgrad_group_rows", args.wgrad_group_rows);
  field("fixup_samples", args.fixup_samples);
  field("fixup_groups", args.fixup_groups);
  field("fixup_rows", args.fixup_rows);
  field("gram_samples", args.gram_samples);
  field("sample_span", args.sample_span);
  field("sample_reach", args.sample_reach);
  field("gram_groups", args.gram_groups);
  field("group_span", args.group_span);
  field("group_reach", args.group_reach);
  field("pairs", args.pairs);
  field("partials", args.partials);
  field("products", args.products);
  field("slabs", args.slabs);
  field("first", args.first);
  field("last", args.last);
  field("sample_sq", args.sample_sq);
  field("group_sq", args.group_sq);
  field("group_gram", args.group_gram);
  field("weight_grad", args.weight_grad);
  field("d_in", args.d_in);
}

void visit(Fields& field, gradnorm::TokenSums& args) {
  field("values", args.values);
  field("token_row", args.token_row);
  field("sample_span", args.sample_span);
  field("info", args.info);
  field("samples", args.samples);
  field("out", args.out);
}

template <size_t kCount>
std::vector<int> columns(const gradnorm::WgradTile (&tiles)[kCount]) {
  std::vector<int> found;
  for (const gradnorm::WgradTile& tile : tiles) found.push_back(tile.columns);
  return found;
}

void bind_cuda(py::module_& m) {
  using namespace gradnorm;
  m.def("driver_version", &driver_version);
  m.def("segment_table", &call<SegmentTable, &segment_table>);
  m.def("schedule", &call<Schedule, &schedule>);
  m.def("wgrad_norm_sm80", &call<WgradNorm, &wgrad_norm_sm80>);
  m.def("wgrad_norm_sm90", &call<WgradNorm, &wgrad_norm_sm90>);
  m.def("wgrad_norm_sm80_rows", &wgrad_norm_sm80_rows, py::arg("d_in"), py::arg("d_out"), py::arg("block_n"));
  m.def("wgrad_norm_sm90_rows", &wgrad_norm_sm90_rows, py::arg("d_in"), py::arg("d_out"), py::arg("block_n"));
  m.def("gram_sm80", &call<Gram, &gram_sm80>);
  m.def("split_fixup", &call<SplitFixup, &split_fixup>);
  m.def("split_fixup_rows", &split_fixup_rows, py::arg("width"));
  m.def("finish", &call<Finish, &finish>);
  m.def("token_sums", &call<TokenSums, &token_sums>);
  m.attr("GRAM_TILE") = kGramTile;
  m.attr("FIXUP_GROUPS") = kFixupGroups;
  py::dict tiles;  // architecture -> the columns of the tiles that its wgrad is compiled for
  tiles[py::int_(80)] = columns(kSm80WgradTiles);
  tiles[py::int_(90)] = columns(kSm90WgradTiles);
  m.attr("WGRAD_TILES") = tiles;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of gradnorm_kernels; called by its backends, which check the arguments first.";
  m.def("build_info", &build_info, "What this module was built with and for.");
  bind_cpu(m);
#ifdef GRADNORM_WITH_CUDA
  bind_cuda(m);
#endif
}
