// The Python face of the CUDA kernels: device arrays come by DLPack, work is queued on the caller's stream.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "stain.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Stain = wsi::StainArrays<nb::device::cuda>;

// The stream is the number that frameworks give (torch: Stream.cuda_stream, cupy: Stream.ptr); 0 is the default one.
void* as_stream(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void check_launch(int error) {
  if (error != 0)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// A stream belongs to a device; arrays of two devices cannot be meant.
template <typename First, typename... Rest>
void check_device(const First& first, const Rest&... rest) {
  int current = -1;
  check_launch(cudaGetDevice(&current));
  if (first.device_id() != current || ((rest.device_id() != current) || ...))
    throw std::invalid_argument("all arrays must lie on the current device");
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;  // no driver, no device
}

void od_map(Stain::Pixels rgb, Stain::OdTables tables, float bias, Stain::Out out, uintptr_t stream) {
  const int64_t n_px = Stain::check(rgb, out);
  Stain::check_bias(bias);
  check_device(rgb, tables, out);
  check_launch(wsi::od_map_cuda(rgb.data(), n_px, tables.data(), bias, out.data(), as_stream(stream)));
}

void od_map_planes(Stain::Images rgb, Stain::OdTables tables, float bias, Stain::Levels levels, Stain::Planes out,
                   uintptr_t stream) {
  const int64_t n_px = Stain::check(rgb, levels, out);
  Stain::check_bias(bias);
  check_device(rgb, tables, levels, out);
  check_launch(wsi::with_element(levels, out, [&](auto* from, auto* to) {
    return wsi::od_map_planes_cuda(rgb.data(), rgb.shape(0), n_px, tables.data(), bias, from, to, as_stream(stream));
  }));
}

void lab_map(Stain::Pixels rgb, Stain::Linear linear, Stain::Codes codes, Stain::Values values, Stain::Out out,
             uintptr_t stream) {
  const int64_t n_px = Stain::check(rgb, out);
  check_device(rgb, linear, codes, values, out);
  check_launch(wsi::lab_map_cuda(rgb.data(), n_px, {linear.data(), codes.data(), values.data()}, out.data(),
                                 as_stream(stream)));
}

void lab_map_planes(Stain::Images rgb, Stain::Linear linear, Stain::Codes codes, Stain::Values values,
                    Stain::Levels levels, Stain::Planes out, uintptr_t stream) {
  const int64_t n_px = Stain::check(rgb, levels, out);
  check_device(rgb, linear, codes, values, levels, out);
  check_launch(wsi::with_element(levels, out, [&](auto* from, auto* to) {
    return wsi::lab_map_planes_cuda(rgb.data(), rgb.shape(0), n_px, {linear.data(), codes.data(), values.data()}, from,
                                    to, as_stream(stream));
  }));
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; wsi.native.twin specifies them. Nothing here waits for the device.";
  m.def("device_count", &device_count, "Devices that CUDA sees; 0 without a driver.");
  m.def("od_map", &od_map, "rgb"_a.noconvert(), "tables"_a.noconvert(), "bias"_a, "out"_a.noconvert(), "stream"_a,
        "As the CPU's, on device arrays, queued on a stream.");
  m.def("od_map_planes", &od_map_planes, "rgb"_a.noconvert(), "tables"_a.noconvert(), "bias"_a,
        "levels"_a.noconvert(), "out"_a.noconvert(), "stream"_a, "As the CPU's, queued on a stream.");
  m.def("lab_map", &lab_map, "rgb"_a.noconvert(), "linear"_a.noconvert(), "codes"_a.noconvert(),
        "values"_a.noconvert(), "out"_a.noconvert(), "stream"_a, "As the CPU's, queued on a stream.");
  m.def("lab_map_planes", &lab_map_planes, "rgb"_a.noconvert(), "linear"_a.noconvert(), "codes"_a.noconvert(),
        "values"_a.noconvert(), "levels"_a.noconvert(), "out"_a.noconvert(), "stream"_a,
        "As the CPU's, queued on a stream.");
}
