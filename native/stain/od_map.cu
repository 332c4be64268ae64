#include "cuda.cuh"
#include "od_map.h"

namespace wsi {

// The tables lie in shared memory (12 KiB): a row is one 16-byte load. Compiled without contraction (-fmad=false).
template <>
struct Staged<OdMap> {
  float4 tables[768];
  float bias;

  __device__ void load(const OdMap& map) {
    const float* t = map.tables;
    for (int i = threadIdx.x; i < 768; i += kThreads)
      tables[i] = make_float4(t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]);
    if (threadIdx.x == 0) bias = map.bias;
  }

  __device__ __forceinline__ static uint8_t to_byte(float value) {  // above -1, which truncates to 0
    return static_cast<uint8_t>(static_cast<int>(value < 255.0f ? value : 255.0f));
  }

  __device__ __forceinline__ void pixel(const uint8_t* px, uint8_t* out) const {
    const float4 r = tables[px[0]], g = tables[256 + px[1]], b = tables[512 + px[2]];
    out[0] = to_byte(r.x * g.x * b.x + bias);
    out[1] = to_byte(r.y * g.y * b.y + bias);
    out[2] = to_byte(r.z * g.z * b.z + bias);
  }
};

WSI_BUILD_CUDA(OdMap)

}  // namespace wsi
