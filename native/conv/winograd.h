// Convolutions of 3 x 3 with stride 1 and a margin of 1 by minimal filtering, F(4 x 4, 3 x 3): A. Lavin and S. Gray,
// "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308. An output tile of 4 x 4 pixels takes
// 36 multiplications a pair of channels where the definition takes 144.
#pragma once
#include <cstdint>

namespace wsi {

constexpr int kLanes = 16;      // input channels come in multiples of this
constexpr int kPanel = 32;      // output channels, likewise
constexpr int kTransformed = 36;  // numbers of a transformed filter, or of a transformed 6 x 6 piece of the input

// What a convolution is made of, channels-last. `filters` are transformed: (36, c_out / 32, c_in, 32).
struct Convolution {
  const float* x;        // (n, h, w, c_in)
  const float* filters;
  const float* bias;     // (c_out,)
  float* y;              // (n, h, w, c_out)
  int64_t n, h, w, c_in, c_out;
};

enum class Instructions { kNone, kAvx2, kAvx512 };

// The best this processor has; without AVX2 there is no kernel.
Instructions best_instructions();

// Each number of y is the same sum in the same order whatever the threads, the batch and the instructions.
void winograd(const Convolution& convolution, int64_t threads, Instructions instructions);

}  // namespace wsi
