// Metal's language for a compile-only check with clang, stricter than Metal's own compiler: every
// address space is a type of its own, doubles do not exist, functions of Metal's library are only
// declared, so that the optimiser knows nothing of their results. It has
// what the kernels use and what MLX's text around a kernel needs, nothing more.

#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))
#define INFINITY (__builtin_huge_valf())

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef int int32_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat16_t;
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));

struct half2 {
  half x, y;
  half2() = default;
  METAL_FUNC half2(half x, half y) : x(x), y(y) {}
};
struct ushort2 {
  ushort x, y;
  ushort2() = default;
  METAL_FUNC ushort2(ushort x, ushort y) : x(x), y(y) {}
};
METAL_FUNC half2 operator+(half2 a, half2 b) { return half2(half(a.x + b.x), half(a.y + b.y)); }
METAL_FUNC half2 operator*(half2 a, half2 b) { return half2(half(a.x * b.x), half(a.y * b.y)); }

namespace metal {

template <typename To, typename From>
METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type changes the type, not the size");
  return __builtin_bit_cast(To, from);
}

half2 fma(half2, half2, half2);
float fma(float, float, float);
float min(float, float);
float max(float, float);
int min(int, int);
int max(int, int);
float abs(float);
float floor(float);

namespace fast {
float exp2(float);
}
namespace precise {
float tanh(float);
}

// A lane has two elements of a matrix. What a product gives is known to the hardware alone.
template <typename T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "the one size of Metal");
  typedef T elements __attribute__((ext_vector_type(2)));
  elements held;
  METAL_FUNC thread elements& thread_elements() { return held; }
};
simdgroup_matrix<float, 8, 8>::elements multiply_accumulate_8x8(
    simdgroup_matrix<half, 8, 8>::elements, simdgroup_matrix<half, 8, 8>::elements,
    simdgroup_matrix<float, 8, 8>::elements);
METAL_FUNC void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<half, 8, 8> a,
    simdgroup_matrix<half, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
  d.held = multiply_accumulate_8x8(a.held, b.held, c.held);
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float simd_shuffle_xor(float, ushort);
float simd_sum(float);
float simd_max(float);
bool simd_any(bool);

} // namespace metal

// From here on these words are errors: Metal has neither doubles nor the C++ library.
#pragma GCC poison double std
