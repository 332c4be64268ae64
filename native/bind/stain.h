// What the stain kernels' arguments must be, on either device.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

#include "../stain/lab_map.h"
#include "../stain/od_map.h"
#include "../stain/sparse_map.h"

namespace wsi {

namespace nb = nanobind;

template <typename Device>
struct StainArrays {
  using Pixels = nb::ndarray<const uint8_t, nb::c_contig, Device>;
  using Out = nb::ndarray<uint8_t, nb::c_contig, Device>;
  using Images = nb::ndarray<const uint8_t, nb::shape<-1, -1, -1, 3>, nb::c_contig, Device>;
  using Tensor = nb::ndarray<nb::shape<-1, 3, -1, -1>, Device>;
  using Levels = nb::ndarray<nb::ro, nb::shape<3, 256>, nb::c_contig, Device>;
  using Rows = nb::ndarray<const float, nb::shape<3, 256, 4>, nb::c_contig, Device>;
  using Table = nb::ndarray<const float, nb::shape<256>, nb::c_contig, Device>;
  using Codes = nb::ndarray<const uint8_t, nb::shape<kLabCodes>, nb::c_contig, Device>;
  using LabValues = nb::ndarray<const float, nb::shape<26>, nb::c_contig, Device>;
  using SparseValues = nb::ndarray<const float, nb::shape<24>, nb::c_contig, Device>;

  static OdMap map(const Rows& tables, float bias) {
    if (!(bias > -1.0f && bias <= 1.0f)) throw std::invalid_argument("bias: must be above -1 and at most 1");
    return {tables.data(), bias};
  }
  static SparseMap map(const Table& density, const SparseValues& values) { return {density.data(), values.data()}; }
  static LabMap map(const Table& linear, const Codes& codes, const LabValues& values) {
    return {linear.data(), codes.data(), values.data()};
  }

  // Pixels to map.
  static int64_t check(const Pixels& rgb, const Out& out) {
    if (rgb.ndim() < 1 || rgb.shape(rgb.ndim() - 1) != 3) throw std::invalid_argument("rgb: must be (..., 3)");
    bool same = rgb.ndim() == out.ndim();
    for (size_t i = 0; same && i < rgb.ndim(); ++i) same = rgb.shape(i) == out.shape(i);
    if (!same) throw std::invalid_argument("out: must have the shape of rgb");
    if (rgb.data() < out.data() + out.size() && out.data() < rgb.data() + rgb.size())
      throw std::invalid_argument("out: must not overlap rgb");
    return static_cast<int64_t>(rgb.size() / 3);
  }

  static Layout check(const Images& rgb, const Levels& levels, const Tensor& out) {
    if (out.shape(0) != rgb.shape(0) || out.shape(2) != rgb.shape(1) || out.shape(3) != rgb.shape(2))
      throw std::invalid_argument("out: must be (n, 3, h, w) for rgb (n, h, w, 3)");
    // NumPy has no bfloat16: its bits come as uint16.
    const bool bits = levels.dtype() == nb::dtype<uint16_t>() &&
                      out.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    if (!(levels.dtype() == out.dtype() || bits) || (out.itemsize() != 2 && out.itemsize() != 4))
      throw std::invalid_argument("levels: must have the dtype of out, of 2 or 4 bytes");
    const auto h = static_cast<int64_t>(out.shape(2)), w = static_cast<int64_t>(out.shape(3));
    if (lies(out, {3 * h * w, h * w, w, 1})) return Layout::kPlanes;
    if (lies(out, {3 * h * w, 1, 3 * w, 3})) return Layout::kPixels;
    throw std::invalid_argument("out: must be contiguous, or channels-last");
  }

 private:
  // An axis of length 1 is never stepped along, and may have any stride.
  static bool lies(const Tensor& out, const int64_t (&strides)[4]) {
    bool so = true;
    for (size_t i = 0; i < 4; ++i) so = so && (out.shape(i) <= 1 || out.stride(i) == strides[i]);
    return so;
  }
};

// Calls kernel(levels, out) with the element type that has the size of out's.
template <typename Levels, typename Tensor, typename Kernel>
auto with_element(const Levels& levels, const Tensor& out, Kernel kernel) {
  if (out.itemsize() == 2)
    return kernel(static_cast<const uint16_t*>(levels.data()), static_cast<uint16_t*>(out.data()));
  return kernel(static_cast<const uint32_t*>(levels.data()), static_cast<uint32_t*>(out.data()));
}

}  // namespace wsi
