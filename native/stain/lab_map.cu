#include <cuda_runtime.h>

#include "lab_map.h"
#include "planes.cuh"

namespace wsi {
namespace {

__device__ __forceinline__ void map_pixel(const uint8_t* px, const float* linear, const uint8_t* to_byte,
                                          const float* values, uint8_t* out) {
  int32_t codes[3];
  lab::map_pixel(linear[px[0]], linear[px[1]], linear[px[2]], values, codes);
  for (int c = 0; c < 3; ++c) out[c] = __ldg(to_byte + codes[c]);
}

struct Shared {
  float linear[256], values[26];
};

__device__ __forceinline__ void stage(const LabMap& map, Shared& shared) {
  for (int i = threadIdx.x; i < 256; i += kThreads) shared.linear[i] = map.linear[i];
  if (threadIdx.x < 26) shared.values[threadIdx.x] = map.values[threadIdx.x];
  __syncthreads();
}

__global__ void map_pixels(const uint8_t* rgb, int64_t n_px, LabMap map, uint8_t* out) {
  __shared__ Shared shared;
  stage(map, shared);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride)
    map_pixel(rgb + 3 * i, shared.linear, map.codes, shared.values, out + 3 * i);
}

template <typename Element>
__global__ void map_planes(const uint8_t* rgb, int64_t n_px, int64_t px_per_image, LabMap map, const Element* levels,
                           Element* out) {
  __shared__ Shared shared;
  __shared__ Element shared_levels[768];
  for (int i = threadIdx.x; i < 768; i += kThreads) shared_levels[i] = levels[i];
  stage(map, shared);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n_px; i += stride) {
    uint8_t px[3];
    map_pixel(rgb + 3 * i, shared.linear, map.codes, shared.values, px);
    store_planes(i, px_per_image, px, shared_levels, out);
  }
}

}  // namespace

int lab_map_cuda(const uint8_t* rgb, int64_t n_px, const LabMap& map, uint8_t* out, void* stream) {
  if (n_px > 0)
    map_pixels<<<blocks_for(n_px), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rgb, n_px, map, out);
  return static_cast<int>(cudaGetLastError());
}

template <typename Element>
int lab_map_planes_cuda(const uint8_t* rgb, int64_t n_images, int64_t n_px, const LabMap& map, const Element* levels,
                        Element* out, void* stream) {
  const int64_t all = n_images * n_px;
  if (all > 0)
    map_planes<<<blocks_for(all), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rgb, all, n_px, map, levels, out);
  return static_cast<int>(cudaGetLastError());
}

template int lab_map_planes_cuda(const uint8_t*, int64_t, int64_t, const LabMap&, const uint16_t*, uint16_t*, void*);
template int lab_map_planes_cuda(const uint8_t*, int64_t, int64_t, const LabMap&, const uint32_t*, uint32_t*, void*);

}  // namespace wsi
