// What the stain kernels' arguments must be, on either device.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>

#include "../stain/lab_map.h"
#include "../stain/od_map.h"

namespace wsi {

namespace nb = nanobind;

template <typename Device>
struct StainArrays {
  using Pixels = nb::ndarray<const uint8_t, nb::c_contig, Device>;
  using Out = nb::ndarray<uint8_t, nb::c_contig, Device>;
  using Images = nb::ndarray<const uint8_t, nb::shape<-1, -1, -1, 3>, nb::c_contig, Device>;
  using Planes = nb::ndarray<nb::shape<-1, 3, -1, -1>, nb::c_contig, Device>;
  using Levels = nb::ndarray<nb::ro, nb::shape<3, 256>, nb::c_contig, Device>;
  using OdTables = nb::ndarray<const float, nb::shape<3, 256, 4>, nb::c_contig, Device>;
  using Linear = nb::ndarray<const float, nb::shape<256>, nb::c_contig, Device>;
  using Codes = nb::ndarray<const uint8_t, nb::shape<kLabCodes>, nb::c_contig, Device>;
  using Values = nb::ndarray<const float, nb::shape<26>, nb::c_contig, Device>;

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

  static void check_bias(float bias) {
    if (!(bias > -1.0f && bias <= 1.0f)) throw std::invalid_argument("bias: must be above -1 and at most 1");
  }

  // Pixels an image.
  static int64_t check(const Images& rgb, const Levels& levels, const Planes& out) {
    if (out.shape(0) != rgb.shape(0) || out.shape(2) != rgb.shape(1) || out.shape(3) != rgb.shape(2))
      throw std::invalid_argument("out: must be (n, 3, h, w) for rgb (n, h, w, 3)");
    // NumPy has no bfloat16: its bits come as uint16.
    const bool bits = levels.dtype() == nb::dtype<uint16_t>() &&
                      out.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    if (!(levels.dtype() == out.dtype() || bits) || (out.itemsize() != 2 && out.itemsize() != 4))
      throw std::invalid_argument("levels: must have the dtype of out, of 2 or 4 bytes");
    return static_cast<int64_t>(rgb.shape(1) * rgb.shape(2));
  }
};

// Calls kernel(levels, out) with the element type that has the size of out's.
template <typename Levels, typename Planes, typename Kernel>
auto with_element(const Levels& levels, const Planes& out, Kernel kernel) {
  if (out.itemsize() == 2)
    return kernel(static_cast<const uint16_t*>(levels.data()), static_cast<uint16_t*>(out.data()));
  return kernel(static_cast<const uint32_t*>(levels.data()), static_cast<uint32_t*>(out.data()));
}

}  // namespace wsi
