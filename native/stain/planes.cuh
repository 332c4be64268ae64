// Launches shared by the CUDA twins: a thread a pixel, neighbouring threads on neighbouring pixels.
#pragma once
#include <cstdint>

#include "clones.h"

namespace wsi {

constexpr int kThreads = 256;

// As many blocks as keep the device full; each walks on through the pixels, so that tables are staged once a block.
inline int blocks_for(int64_t n_px) {
  const int64_t wanted = (n_px + kThreads - 1) / kThreads;
  return static_cast<int>(wanted < 2048 ? wanted : 2048);
}

// Writes pixel i of (n_images, px_per_image, 3) to its place in (n_images, 3, px_per_image).
template <typename Element>
__device__ __forceinline__ void store_planes(int64_t i, int64_t px_per_image, const uint8_t* px, const Element* levels,
                                             Element* out) {
  const int64_t image = i / px_per_image;
  Element* at = out + 3 * image * px_per_image + (i - image * px_per_image);
  for (int c = 0; c < 3; ++c) at[c * px_per_image] = levels[256 * c + px[c]];
}

}  // namespace wsi
