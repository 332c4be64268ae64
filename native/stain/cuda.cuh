// What the CUDA builds of all maps share: a thread a pixel, neighbouring threads on neighbouring pixels.
#pragma once
#include <cuda_runtime.h>

#include "clones.h"
#include "map.h"

namespace wsi {

constexpr int kThreads = 256;

// Written for each map: its tables in shared memory. Members: void load(const Map&), by all threads of a block, and
// void pixel(const uint8_t* px, uint8_t* out) const.
template <typename Map>
struct Staged;

// As many blocks as keep the device full; each walks on through the pixels, so that tables are staged once a block.
inline int blocks_for(int64_t n) {
  const int64_t wanted = (n + kThreads - 1) / kThreads;
  return static_cast<int>(wanted < 2048 ? wanted : 2048);
}

template <typename Map>
__global__ void map_pixels(Map map, const uint8_t* rgb, int64_t n_px, uint8_t* out) {
  __shared__ Staged<Map> staged;
  staged.load(map);
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride)
    staged.pixel(rgb + 3 * i, out + 3 * i);
}

// Four pixels a thread: three 4-byte words in and out. For arrays that begin at a multiple of 4.
template <typename Map>
__global__ void map_quads(Map map, const uint32_t* rgb, int64_t n_quads, uint32_t* out) {
  __shared__ Staged<Map> staged;
  staged.load(map);
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_quads; i += stride) {
    union { uint32_t words[3]; uint8_t bytes[12]; } in, mapped;
    for (int k = 0; k < 3; ++k) in.words[k] = rgb[3 * i + k];
    for (int k = 0; k < 4; ++k) staged.pixel(in.bytes + 3 * k, mapped.bytes + 3 * k);
    for (int k = 0; k < 3; ++k) out[3 * i + k] = mapped.words[k];
  }
}

// Pixel i goes to out[i / px_per_image][c][i % px_per_image], or to out[i][c].
template <typename Map, typename Element>
__global__ void map_elements(Map map, const uint8_t* rgb, int64_t n_px, int64_t px_per_image, const Element* levels,
                             Layout layout, Element* out) {
  __shared__ Staged<Map> staged;
  __shared__ Element staged_levels[768];
  staged.load(map);
  for (int i = threadIdx.x; i < 768; i += kThreads) staged_levels[i] = levels[i];
  __syncthreads();
  const bool planes = layout == Layout::kPlanes;
  const int64_t stride = int64_t{gridDim.x} * kThreads, step = planes ? px_per_image : 1;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride) {
    uint8_t px[3];
    staged.pixel(rgb + 3 * i, px);
    Element* to = out + (planes ? i + 2 * (i / px_per_image) * px_per_image : 3 * i);
    for (int c = 0; c < 3; ++c) to[c * step] = staged_levels[256 * c + px[c]];
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 4 == 0; }

template <typename Map>
int map_bytes_cuda(const Map& map, const uint8_t* rgb, int64_t n_px, uint8_t* out, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t n_quads = aligned(rgb) && aligned(out) ? n_px / 4 : 0, rest = n_px - 4 * n_quads;
  if (n_quads > 0)
    map_quads<<<blocks_for(n_quads), kThreads, 0, queue>>>(map, reinterpret_cast<const uint32_t*>(rgb), n_quads,
                                                           reinterpret_cast<uint32_t*>(out));
  if (rest > 0)
    map_pixels<<<blocks_for(rest), kThreads, 0, queue>>>(map, rgb + 12 * n_quads, rest, out + 12 * n_quads);
  return static_cast<int>(cudaGetLastError());
}

template <typename Map, typename Element>
int map_tensor_cuda(const Map& map, const uint8_t* rgb, int64_t n_images, int64_t n_px, const Element* levels,
                    Layout layout, Element* out, void* stream) {
  const int64_t all = n_images * n_px;
  if (all > 0)
    map_elements<<<blocks_for(all), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(map, rgb, all, n_px, levels,
                                                                                     layout, out);
  return static_cast<int>(cudaGetLastError());
}

#define WSI_BUILD_CUDA(Map)                                                                             \
  template int map_bytes_cuda(const Map&, const uint8_t*, int64_t, uint8_t*, void*);                    \
  template int map_tensor_cuda(const Map&, const uint8_t*, int64_t, int64_t, const uint16_t*, Layout,   \
                               uint16_t*, void*);                                                       \
  template int map_tensor_cuda(const Map&, const uint8_t*, int64_t, int64_t, const uint32_t*, Layout,   \
                               uint32_t*, void*);

}  // namespace wsi
