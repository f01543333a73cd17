// Metal's language on CUDA: what the kernels use of MSL, in terms of CUDA C++. A simdgroup is
// a warp, threadgroup memory is shared memory; address spaces need no names. The word `device` is
// taken out of the text before: `__device__` expands to something that contains it.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

#define METAL_FUNC __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define constant
#define thread
#define threadgroup

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;

struct alignas(4) MetalUshort2 {
  ushort x, y;
  METAL_FUNC MetalUshort2(ushort x, ushort y) : x(x), y(y) {}
};
#define ushort2 MetalUshort2

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type changes the type, not the size");
  return *reinterpret_cast<To*>(&from);
}

METAL_FUNC half2 fma(half2 a, half2 b, half2 c) { return __hfma2(a, b, c); }

namespace fast {
METAL_FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
} // namespace fast

namespace precise {
METAL_FUNC float tanh(float x) { return ::tanhf(x); }
} // namespace precise

#define ROUNDED_PRODUCT
METAL_FUNC float rounded_product(float a, float b) { return __fmul_rn(a, b); }

#define ROUGH_INVERSE
METAL_FUNC float rough_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// In one instruction; the compiler takes two when both masks are constants.
#define BITS_OVER
METAL_FUNC uint bits_over(uint word, uint mask, uint other) {
  uint bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(bits) : "r"(word), "r"(mask), "r"(other));
  return bits;
}

// Two bytes with those of 0x64 between them, in one instruction.
#define BYTES_OVER
METAL_FUNC uint bytes_over(uint word, int upper) {
  return __byte_perm(word, 0x64646464u, upper ? 0x4341 : 0x4240);
}

#define ROUNDED_HALVES
METAL_FUNC half2 rounded_halves(float a, float b) { return __floats2half2_rn(a, b); }

// Products of matrices of halves, added to floats: lines of the sum are 0..7, in c, and 8..15, in d.
// Each lane holds the elements that PTX says.
#define TENSOR_CORES
METAL_FUNC void multiply_16x8x16(
    float (&c)[2], float (&d)[2], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
METAL_FUNC void multiply_16x8x8(float (&c)[2], float (&d)[2], uint a0, uint a1, uint b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])
      : "r"(a0), "r"(a1), "r"(b0));
}
METAL_FUNC uint transpose_8x8(uint halves) {
  uint transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(halves));
  return transposed;
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

METAL_FUNC float simd_shuffle_xor(float x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
METAL_FUNC bool simd_any(bool x) { return __any_sync(0xffffffffu, x); }
METAL_FUNC float simd_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  return x;
}
METAL_FUNC float simd_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  }
  return x;
}
