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

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;  // no driver, no device
}

template <typename Array>
bool on_device(const Array& array, int device) {
  return array.device_id() == device;
}
bool on_device(float, int) { return true; }

// A stream belongs to a device; arrays of two devices cannot be meant.
template <typename... Args>
void check_device(const Args&... args) {
  int current = -1;
  check_launch(cudaGetDevice(&current));
  if (!(on_device(args, current) && ...)) throw std::invalid_argument("all arrays must lie on the current device");
}

// The two functions of a map. Args are its own arguments, which stand between rgb and out and are named `names`.
template <typename... Args, typename... Names>
void define(nb::module_& m, const char* name, const Names&... names) {
  m.def(name,
        [](Stain::Pixels rgb, Args... args, Stain::Out out, uintptr_t stream) {
          const int64_t n_px = Stain::check(rgb, out);
          check_device(rgb, args..., out);
          check_launch(wsi::map_bytes_cuda(Stain::map(args...), rgb.data(), n_px, out.data(), as_stream(stream)));
        },
        "rgb"_a.noconvert(), names..., "out"_a.noconvert(), "stream"_a,
        "As the CPU's, on device arrays, queued on a stream.");
  m.def((std::string(name) + "_tensor").c_str(),
        [](Stain::Images rgb, Args... args, Stain::Levels levels, Stain::Tensor out, uintptr_t stream) {
          const wsi::Layout layout = Stain::check(rgb, levels, out);
          check_device(rgb, args..., levels, out);
          const auto map = Stain::map(args...);
          check_launch(wsi::with_element(levels, out, [&](auto* from, auto* to) {
            return wsi::map_tensor_cuda(map, rgb.data(), rgb.shape(0), rgb.shape(1) * rgb.shape(2), from, layout, to,
                                        as_stream(stream));
          }));
        },
        "rgb"_a.noconvert(), names..., "levels"_a.noconvert(), "out"_a.noconvert(), "stream"_a,
        "As the CPU's, on device arrays, queued on a stream.");
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; wsi.native.twin specifies them. Nothing here waits for the device.";
  m.def("device_count", &device_count, "Devices that CUDA sees; 0 without a driver.");
  define<Stain::Rows, float>(m, "od_map", "tables"_a.noconvert(), "bias"_a);
  define<Stain::Table, Stain::SparseValues>(m, "sparse_map", "density"_a.noconvert(), "values"_a.noconvert());
  define<Stain::Table, Stain::Codes, Stain::LabValues>(m, "lab_map", "linear"_a.noconvert(), "codes"_a.noconvert(),
                                                       "values"_a.noconvert());
}
