#include "cuda.cuh"
#include "lab_map.h"

namespace wsi {

template <>
struct Staged<LabMap> {
  float linear[256], values[26];
  const uint8_t* codes;  // too large for shared memory

  __device__ void load(const LabMap& map) {
    for (int i = threadIdx.x; i < 256; i += kThreads) linear[i] = map.linear[i];
    if (threadIdx.x < 26) values[threadIdx.x] = map.values[threadIdx.x];
    if (threadIdx.x == 0) codes = map.codes;
  }

  __device__ __forceinline__ void pixel(const uint8_t* px, uint8_t* out) const {
    int32_t at[3];
    lab::map_pixel(linear[px[0]], linear[px[1]], linear[px[2]], values, at);
    for (int c = 0; c < 3; ++c) out[c] = __ldg(codes + at[c]);
  }
};

WSI_BUILD_CUDA(LabMap)

}  // namespace wsi
