// Function clones: the compiler builds a kernel once for each instruction set, and the loader takes the best one the
// processor has. Only elementwise IEEE operations in a fixed order are used, so that all of them give the same bits.
#pragma once
#include <cstdint>  // any header of the C library says whether it is glibc

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define WSI_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WSI_CLONES
#endif

#if defined(__CUDACC__)
#define WSI_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define WSI_INLINE inline __attribute__((always_inline))  // into each clone, so that it is built for it
#else
#define WSI_INLINE inline
#endif
