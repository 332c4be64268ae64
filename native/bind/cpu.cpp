// The Python face of the CPU kernels: checks what the caller gives, releases the GIL, computes nothing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../area/area.h"
#include "../conv/winograd.h"
#include "stain.h"

namespace nb = nanobind;
using namespace nb::literals;

// Channels and columns must lie dense; rows may be strided, so that a slice of a batch can be written.
using Image = nb::ndarray<const uint8_t, nb::shape<-1, -1, 3>, nb::device::cpu>;
using Output = nb::ndarray<uint8_t, nb::shape<-1, -1, 3>, nb::device::cpu>;
using Edges = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

// NumPy may give an axis of length 1 any stride: it is never stepped along.
template <typename Array>
void check_rows(const char* name, const Array& array) {
  if (array.stride(2) != 1 || (array.shape(1) > 1 && array.stride(1) != 3))
    throw std::invalid_argument(std::string(name) + ": columns and channels must be contiguous (strides 3 and 1)");
}

void check_edges(const char* name, const Edges& edges, int64_t out_size, int64_t source_size) {
  const std::string n(name);
  if (static_cast<int64_t>(edges.shape(0)) != out_size + 1)
    throw std::invalid_argument(n + ": needs one edge more than out has cells");
  const int64_t* e = edges.data();
  if (e[0] < 0 || e[out_size] > source_size << wsi::kFixedPointBits)
    throw std::invalid_argument(n + ": edges lie outside the source");
  for (int64_t i = 0; i < out_size; ++i)
    if (e[i + 1] <= e[i] || e[i + 1] - e[i] > wsi::kMaxCell)
      throw std::invalid_argument(n + ": edges must increase, by 1024 source pixels at most");
}

void area_average(Image source, Edges edges_y, Edges edges_x, Output out) {
  check_rows("source", source);
  check_rows("out", out);
  const int64_t out_h = out.shape(0), out_w = out.shape(1);
  if (out_h == 0 || out_w == 0) throw std::invalid_argument("out: has no cells");
  check_edges("edges_y", edges_y, out_h, source.shape(0));
  check_edges("edges_x", edges_x, out_w, source.shape(1));
  nb::gil_scoped_release release;
  std::vector<uint32_t> row_sums(3 * source.shape(1) + 1);
  wsi::area_average(source.data(), source.shape(1), source.stride(0), edges_y.data(), out_h, edges_x.data(), out_w,
                    out.data(), out.stride(0), row_sums.data());
}

using Maps = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewMaps = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

std::vector<std::string> winograd_instructions() {
  switch (wsi::best_instructions()) {
    case wsi::Instructions::kAvx512: return {"avx512f", "avx2"};
    case wsi::Instructions::kAvx2: return {"avx2"};
    default: return {};
  }
}

void winograd(Maps x, Maps filters, Values bias, NewMaps out, int64_t threads, const std::string& instructions) {
  const wsi::Convolution f{x.data(), filters.data(), bias.data(), out.data(), int64_t(x.shape(0)), int64_t(x.shape(1)),
                           int64_t(x.shape(2)), int64_t(x.shape(3)), int64_t(out.shape(3))};
  if (f.c_in % wsi::kLanes || f.c_out % wsi::kPanel)
    throw std::invalid_argument("x, out: channels must be multiples of 16 and 32");
  if (int64_t(filters.shape(0)) != wsi::kTransformed || int64_t(filters.shape(1)) != f.c_out / wsi::kPanel ||
      int64_t(filters.shape(2)) != f.c_in || int64_t(filters.shape(3)) != wsi::kPanel)
    throw std::invalid_argument("filters: must be (36, c_out / 32, c_in, 32)");
  if (int64_t(bias.shape(0)) != f.c_out) throw std::invalid_argument("bias: must be (c_out,)");
  for (int axis = 0; axis < 3; ++axis)
    if (out.shape(axis) != x.shape(axis)) throw std::invalid_argument("out: must have the images and sides of x");
  if (threads < 1) throw std::invalid_argument("threads: must be at least 1");
  const auto have = winograd_instructions();
  if (std::find(have.begin(), have.end(), instructions) == have.end())
    throw std::invalid_argument("instructions: this processor has no " + instructions);
  nb::gil_scoped_release release;
  wsi::winograd(f, threads, instructions == "avx2" ? wsi::Instructions::kAvx2 : wsi::Instructions::kAvx512);
}

using Stain = wsi::StainArrays<nb::device::cpu>;

template <typename Map>
void map_bytes(const Map& map, const Stain::Pixels& rgb, const Stain::Out& out, bool portable = false) {
  const int64_t n_px = Stain::check(rgb, out);
  nb::gil_scoped_release release;
  (portable ? wsi::map_bytes_portable<Map> : wsi::map_bytes<Map>)(map, rgb.data(), n_px, out.data());
}

template <typename Map>
void map_tensor(const Map& map, const Stain::Images& rgb, const Stain::Levels& levels, const Stain::Tensor& out) {
  const wsi::Layout layout = Stain::check(rgb, levels, out);
  const auto n = static_cast<int64_t>(rgb.shape(0)), n_px = static_cast<int64_t>(rgb.shape(1) * rgb.shape(2));
  nb::gil_scoped_release release;
  wsi::with_element(levels, out, [&](auto* from, auto* to) {
    wsi::map_tensor(map, rgb.data(), n, n_px, from, layout, to);
  });
}

// The three functions of a map. Args are its own arguments, which stand between rgb and out and are named `names`.
template <typename... Args, typename... Names>
void define(nb::module_& m, const char* name, const Names&... names) {
  const std::string n(name);
  m.def(name, [](Stain::Pixels rgb, Args... args, Stain::Out out) { map_bytes(Stain::map(args...), rgb, out); },
        "rgb"_a.noconvert(), names..., "out"_a.noconvert(), "Map pixels into out; see wsi.native.twin.");
  m.def((n + "_portable").c_str(),
        [](Stain::Pixels rgb, Args... args, Stain::Out out) { map_bytes(Stain::map(args...), rgb, out, true); },
        "rgb"_a.noconvert(), names..., "out"_a.noconvert(), "The same on the oldest processor of its kind, for tests.");
  m.def((n + "_tensor").c_str(),
        [](Stain::Images rgb, Args... args, Stain::Levels levels, Stain::Tensor out) {
          map_tensor(Stain::map(args...), rgb, levels, out);
        },
        "rgb"_a.noconvert(), names..., "levels"_a.noconvert(), "out"_a.noconvert(),
        "Map pixels, and on to a network's input; see wsi.native.twin.");
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels; wsi.native.twin specifies them.";
  m.def("area_average", &area_average, "source"_a.noconvert(), "edges_y"_a.noconvert(), "edges_x"_a.noconvert(),
        "out"_a.noconvert(), "Average source over the cells between the edges into out; see wsi.native.twin.");
  m.def("winograd", &winograd, "x"_a.noconvert(), "filters"_a.noconvert(), "bias"_a.noconvert(), "out"_a.noconvert(),
        "threads"_a, "instructions"_a, "Convolve x into out; see wsi.nn.winograd.");
  m.def("winograd_instructions", &winograd_instructions, "What winograd can use here, the best first; empty: it can't.");
  define<Stain::Rows, float>(m, "od_map", "tables"_a.noconvert(), "bias"_a);
  define<Stain::Table, Stain::SparseValues>(m, "sparse_map", "density"_a.noconvert(), "values"_a.noconvert());
  define<Stain::Table, Stain::Codes, Stain::LabValues>(m, "lab_map", "linear"_a.noconvert(), "codes"_a.noconvert(),
                                                       "values"_a.noconvert());
}
