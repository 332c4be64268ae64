#include "area.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace wsi {

void area_average(const uint8_t* source, int64_t w, int64_t source_stride,
                  const int64_t* edges_y, int64_t out_h, const int64_t* edges_x, int64_t out_w,
                  uint8_t* out, int64_t out_stride, uint32_t* row_sums) {
  const int64_t x_begin = edges_x[0] >> kFixedPointBits;
  const int64_t x_end = std::min(w, (edges_x[out_w] + kOnePixel - 1) >> kFixedPointBits);
  for (int64_t oy = 0; oy < out_h; ++oy) {
    // Down the columns first: one multiply-add a byte, which compilers turn into vector code.
    const int64_t top = edges_y[oy], bottom = edges_y[oy + 1];
    std::memset(row_sums + 3 * x_begin, 0, sizeof(uint32_t) * 3 * (x_end - x_begin));
    for (int64_t y = top >> kFixedPointBits; y << kFixedPointBits < bottom; ++y) {
      const uint32_t cover = static_cast<uint32_t>(std::min(bottom, (y + 1) << kFixedPointBits) -
                                                   std::max(top, y << kFixedPointBits));
      const uint8_t* row = source + y * source_stride;
      for (int64_t i = 3 * x_begin; i < 3 * x_end; ++i) row_sums[i] += cover * row[i];
    }
    uint8_t* out_row = out + oy * out_stride;
    for (int64_t ox = 0; ox < out_w; ++ox) {
      const int64_t left = edges_x[ox], right = edges_x[ox + 1];
      uint64_t sum[3] = {0, 0, 0};
      for (int64_t x = left >> kFixedPointBits; x << kFixedPointBits < right; ++x) {
        const uint64_t cover = static_cast<uint64_t>(std::min(right, (x + 1) << kFixedPointBits) -
                                                     std::max(left, x << kFixedPointBits));
        for (int c = 0; c < 3; ++c) sum[c] += cover * row_sums[3 * x + c];
      }
      const double inverse = 1.0 / (static_cast<double>(bottom - top) * static_cast<double>(right - left));
      for (int c = 0; c < 3; ++c)
        out_row[3 * ox + c] = static_cast<uint8_t>(std::floor(static_cast<double>(sum[c]) * inverse + 0.5));
    }
  }
}

}  // namespace wsi
