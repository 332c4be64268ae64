// From interleaved bytes to planes of any element, through a map of pixels that stays in the first-level cache.
#pragma once
#include <algorithm>
#include <cstdint>

namespace wsi {

// levels: (3, 256), what each byte becomes. Bits are moved, not computed with: an element is what has 2 or 4 bytes.
template <typename Element, typename MapPixels>
inline void map_to_planes(const uint8_t* rgb, int64_t n_images, int64_t n_px, const Element* levels, Element* out,
                          MapPixels map_pixels) {
  constexpr int64_t kBlock = 512;
  uint8_t mapped[3 * kBlock];
  for (int64_t image = 0; image < n_images; ++image, rgb += 3 * n_px, out += 3 * n_px)
    for (int64_t start = 0; start < n_px; start += kBlock) {
      const int64_t n = std::min(kBlock, n_px - start);
      map_pixels(rgb + 3 * start, n, mapped);
      Element *red = out + start, *green = red + n_px, *blue = green + n_px;
      for (int64_t i = 0; i < n; ++i) {
        red[i] = levels[mapped[3 * i]];
        green[i] = levels[256 + mapped[3 * i + 1]];
        blue[i] = levels[512 + mapped[3 * i + 2]];
      }
    }
}

}  // namespace wsi
