#include "lab_map.h"

#include "cpu.h"

namespace wsi {
namespace {

constexpr int kBlock = 256;

// Table look-ups apart from arithmetic, so that the compiler makes vector code of the arithmetic.
WSI_INLINE void map_blocks(const LabMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  const float* linear = map.linear;
  const uint8_t* to_byte = map.codes;
  float v[26];
  std::copy(map.values, map.values + 26, v);  // a local copy: no store below can change it
  for (int64_t start = 0; start < n_px; start += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, n_px - start));
    float r[kBlock] = {}, g[kBlock] = {}, b[kBlock] = {};
    int32_t codes[3][kBlock];
    for (int i = 0; i < n; ++i) {
      const uint8_t* px = rgb + 3 * (start + i);
      r[i] = linear[px[0]], g[i] = linear[px[1]], b[i] = linear[px[2]];
    }
    for (int i = 0; i < kBlock; ++i) {
      int32_t c[3];
      lab::map_pixel(r[i], g[i], b[i], v, c);
      codes[0][i] = c[0], codes[1][i] = c[1], codes[2][i] = c[2];
    }
    uint8_t* to = out + 3 * start;
    for (int i = 0; i < n; ++i) {
      const uint8_t red = to_byte[codes[0][i]], green = to_byte[codes[1][i]], blue = to_byte[codes[2][i]];
      to[3 * i] = red, to[3 * i + 1] = green, to[3 * i + 2] = blue;
    }
  }
}

WSI_CLONES void map_pixels(const LabMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  map_blocks(map, rgb, n_px, out);
}

void map_pixels_portable(const LabMap& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  map_blocks(map, rgb, n_px, out);
}

}  // namespace

template <>
Kernel<LabMap> fastest(const LabMap&) {
  return map_pixels;
}

template <>
Kernel<LabMap> portable<LabMap>() {
  return map_pixels_portable;
}

WSI_BUILD_CPU(LabMap)

}  // namespace wsi
