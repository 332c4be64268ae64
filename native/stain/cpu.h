// What the CPU builds of all maps share: the way from mapped bytes to a network's input.
#pragma once
#include <algorithm>

#include "clones.h"
#include "map.h"

namespace wsi {

template <typename Map>
using Kernel = void (*)(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out);

// Written for each map: the fastest kernel that this processor has, and the one that every processor has.
template <typename Map>
Kernel<Map> fastest(const Map& map);
template <typename Map>
Kernel<Map> portable();

template <typename Map>
void map_bytes(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  fastest(map)(map, rgb, n_px, out);
}

template <typename Map>
void map_bytes_portable(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  portable<Map>()(map, rgb, n_px, out);
}

template <typename Map, typename Element>
void map_tensor(const Map& map, const uint8_t* rgb, int64_t n_images, int64_t n_px, const Element* levels,
                Layout layout, Element* out) {
  constexpr int64_t kBlock = 512;  // mapped pixels stay in the first-level cache
  uint8_t mapped[3 * kBlock];
  const Kernel<Map> kernel = fastest(map);
  const Element *red = levels, *green = levels + 256, *blue = levels + 512;
  if (layout == Layout::kPixels) n_px *= n_images, n_images = 1;  // one row of pixels
  for (int64_t image = 0; image < n_images; ++image, rgb += 3 * n_px, out += 3 * n_px)
    for (int64_t start = 0; start < n_px; start += kBlock) {
      const int64_t n = std::min(kBlock, n_px - start);
      kernel(map, rgb + 3 * start, n, mapped);
      if (layout == Layout::kPlanes) {
        Element* to = out + start;
        for (int64_t i = 0; i < n; ++i) {
          to[i] = red[mapped[3 * i]];
          to[n_px + i] = green[mapped[3 * i + 1]];
          to[2 * n_px + i] = blue[mapped[3 * i + 2]];
        }
      } else {
        Element* to = out + 3 * start;
        for (int64_t i = 0; i < 3 * n; i += 3) {
          to[i] = red[mapped[i]];
          to[i + 1] = green[mapped[i + 1]];
          to[i + 2] = blue[mapped[i + 2]];
        }
      }
    }
}

#define WSI_BUILD_CPU(Map)                                                                              \
  template void map_bytes(const Map&, const uint8_t*, int64_t, uint8_t*);                               \
  template void map_bytes_portable(const Map&, const uint8_t*, int64_t, uint8_t*);                      \
  template void map_tensor(const Map&, const uint8_t*, int64_t, int64_t, const uint16_t*, Layout,       \
                           uint16_t*);                                                                  \
  template void map_tensor(const Map&, const uint8_t*, int64_t, int64_t, const uint32_t*, Layout,       \
                           uint32_t*);

}  // namespace wsi
