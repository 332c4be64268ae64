#include "lab_map.h"

#include <algorithm>

#include "planes.h"

namespace wsi {
namespace {

constexpr int kBlock = 256;

// Table look-ups apart from arithmetic, so that the compiler makes vector code of the arithmetic.
WSI_INLINE void map_blocks(const uint8_t* rgb, int64_t n_px, const float* linear, const uint8_t* to_byte,
                           const float* values, uint8_t* out) {
  float v[26];
  std::copy(values, values + 26, v);  // a local copy: no store below can change it
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

WSI_CLONES void map_pixels(const uint8_t* rgb, int64_t n_px, const float* linear, const uint8_t* to_byte,
                           const float* values, uint8_t* out) {
  map_blocks(rgb, n_px, linear, to_byte, values, out);
}

}  // namespace

void lab_map_portable(const uint8_t* rgb, int64_t n_px, const LabMap& map, uint8_t* out) {
  map_blocks(rgb, n_px, map.linear, map.codes, map.values, out);
}

void lab_map(const uint8_t* rgb, int64_t n_px, const LabMap& map, uint8_t* out) {
  map_pixels(rgb, n_px, map.linear, map.codes, map.values, out);
}

template <typename Element>
void lab_map_planes(const uint8_t* rgb, int64_t n_images, int64_t n_px, const LabMap& map, const Element* levels,
                    Element* out) {
  map_to_planes(rgb, n_images, n_px, levels, out, [=](const uint8_t* from, int64_t n, uint8_t* to) {
    map_pixels(from, n, map.linear, map.codes, map.values, to);
  });
}

template void lab_map_planes(const uint8_t*, int64_t, int64_t, const LabMap&, const uint16_t*, uint16_t*);
template void lab_map_planes(const uint8_t*, int64_t, int64_t, const LabMap&, const uint32_t*, uint32_t*);

}  // namespace wsi
