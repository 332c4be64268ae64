#include "cuda.cuh"
#include "sparse_map.h"

namespace wsi {

template <>
struct Staged<SparseMap> {
  float density[256], values[24];

  __device__ void load(const SparseMap& map) {
    for (int i = threadIdx.x; i < 256; i += kThreads) density[i] = map.density[i];
    if (threadIdx.x < 24) values[threadIdx.x] = map.values[threadIdx.x];
  }

  __device__ __forceinline__ void pixel(const uint8_t* px, uint8_t* out) const {
    int32_t bytes[3];
    sparse::map_pixel(density[px[0]], density[px[1]], density[px[2]], values, bytes);
    for (int c = 0; c < 3; ++c) out[c] = static_cast<uint8_t>(bytes[c]);
  }
};

WSI_BUILD_CUDA(SparseMap)

}  // namespace wsi
