// Area averaging of 8-bit RGB, exact in integers. Specification: wsi/native/twin.py.
#pragma once
#include <cstdint>

namespace wsi {

constexpr int kFixedPointBits = 12;            // cell edges are in 1/4096 source pixel
constexpr int64_t kOnePixel = int64_t{1} << kFixedPointBits;
// A cell spans at most 1024 px: its sum stays below 2^52, so that doubles hold it exactly, here and in the twin.
constexpr int64_t kMaxCell = kOnePixel << 10;

// source: (h, w, 3), rows source_stride bytes apart. edges: strictly increasing, in [0, 4096 * size].
// out: (out_h, out_w, 3), rows out_stride bytes apart. row_sums: scratch of 3 * w + 1.
void area_average(const uint8_t* source, int64_t w, int64_t source_stride,
                  const int64_t* edges_y, int64_t out_h, const int64_t* edges_x, int64_t out_w,
                  uint8_t* out, int64_t out_stride, uint32_t* row_sums);

}  // namespace wsi
