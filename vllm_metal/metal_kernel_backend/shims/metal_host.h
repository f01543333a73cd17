// Metal's language on the CPU: what the kernels use of MSL, in C++14. Every thread of a
// threadgroup is a fibre with its own stack; the functions of a simdgroup and the barriers pass
// control on until all of their threads have arrived. A simdgroup function that only some of its
// threads reach, undefined on a GPU, is an error here.
//
// All of it, and the kernel after it, is in namespace metal: there a name hides the one that the
// system's headers may have declared globally. Those are included here, before the macros.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define METAL_FUNC inline __attribute__((always_inline))
#define UNROLL
#define device
#define constant
#define thread
#define threadgroup

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

struct half2 {
  half x, y;
  half2() = default;
  half2(half x, half y) : x(x), y(y) {}
};
struct alignas(4) ushort2 {
  ushort x, y;
  ushort2() = default;
  ushort2(ushort x, ushort y) : x(x), y(y) {}
};
struct uint2 {
  uint x, y;
};
struct uint3 {
  uint x, y, z;
};
struct uint4 {
  uint x, y, z, w;
};

// bfloat16 as MLX has it: storage, with conversions that round to nearest even.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = uint16_t((word + 0x7fffu + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

template <typename To, typename From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type changes the type, not the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline half2 operator+(half2 a, half2 b) { return half2(half(a.x + b.x), half(a.y + b.y)); }
inline half2 operator*(half2 a, half2 b) { return half2(half(a.x * b.x), half(a.y * b.y)); }
inline float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
// Exact up to the last rounding: the product of two halves is a float.
inline half fma(half a, half b, half c) { return half(float(a) * float(b) + float(c)); }
inline half2 fma(half2 a, half2 b, half2 c) { return half2(fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)); }
// As in Metal and CUDA: of a NaN and a number, the number.
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline float max(float a, float b) { return a > b || b != b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float abs(float a) { return std::fabs(a); }
inline float floor(float a) { return std::floor(a); }

namespace fast {
inline float exp2(float x) { return std::exp2(x); }
} // namespace fast
namespace precise {
inline float tanh(float x) { return std::tanh(x); }
} // namespace precise

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

namespace host {

constexpr unsigned SIMD = 32;
constexpr size_t STACK_BYTES = 128 << 10;

// Saves the registers that a call preserves on the stack, stores the stack pointer through `save`,
// takes `load` as the stack pointer and returns there. The label is the name on every system: some
// would put an underscore in front. A new stack begins with a frame that returns to its entry.
extern "C" void metal_host_switch(void** save, void* load) __asm__("metal_host_switch");
#if defined(__x86_64__)
__asm__(
    ".text\nmetal_host_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");
constexpr int FRAME_WORDS = 8;  // 6 registers, where to return, the caller that an entry lacks
constexpr int RETURN_WORD = 6;
#elif defined(__aarch64__)
__asm__(
    ".text\n.p2align 2\nmetal_host_switch:\n"
    "  stp x19, x20, [sp, #-160]!\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x2, sp\n  str x2, [x0]\n  mov sp, x1\n"
    "  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  ldp x19, x20, [sp], #160\n  ret\n");
constexpr int FRAME_WORDS = 20;  // x19 to x30, d8 to d15
constexpr int RETURN_WORD = 11;  // x30
#else
#error "metal_host.h changes stacks on x86-64 and arm64 only"
#endif

struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, void (*entry)()) {
    uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t(15);
    void** frame = reinterpret_cast<void**>(end) - FRAME_WORDS;
    for (int i = 0; i < FRAME_WORDS; i++) {
      frame[i] = i == RETURN_WORD ? reinterpret_cast<void*>(entry) : nullptr;
    }
    stack_pointer = frame;
  }
  static void change(Context& from, Context& to) {
    metal_host_switch(&from.stack_pointer, to.stack_pointer);
  }
};

struct Meeting {
  unsigned arrived = 0;
  uint32_t words[2][SIMD];
  uint32_t matrices[2][SIMD][6];  // what lanes hold of the factors of a product
};

struct Fibre {
  Context context;
  char* stack = nullptr;
  unsigned index = 0;         // in the threadgroup
  unsigned simd_meetings = 0;  // attended so far
  unsigned barriers = 0;
  bool done = false;
};

// One threadgroup at a time.
struct Machine {
  Context main;
  Fibre* fibres = nullptr;
  unsigned num_fibres = 0, live = 0, current = 0, idle = 0;
  Meeting* simdgroups = nullptr;
  unsigned barrier_arrived = 0;
  bool stuck = false;
  uint3 position;
  void (*body)(void*, uint3, uint) = nullptr;
  void* arguments = nullptr;
};
static thread_local Machine machine;

inline Fibre& self() { return machine.fibres[machine.current]; }

__attribute__((noinline)) inline void pass_on() {
  Fibre& from = self();
  unsigned next = machine.current;
  do {
    next = next + 1 == machine.num_fibres ? 0 : next + 1;
  } while (machine.fibres[next].done && next != machine.current);
  if (next == machine.current) {
    return;
  }
  machine.current = next;
  Context::change(from.context, machine.fibres[next].context);
}

// Waits until `arrived` has reached `needed`.
inline void wait(const unsigned& arrived, unsigned needed) {
  machine.idle = 0;
  while (*const_cast<const volatile unsigned*>(&arrived) < needed) {
    if (++machine.idle > 2 * machine.num_fibres + 2) {
      machine.stuck = true;
      Context::change(self().context, machine.main);
    }
    pass_on();
  }
}

inline Meeting& meet(unsigned& turn) {
  Fibre& fibre = self();
  Meeting& meeting = machine.simdgroups[fibre.index / SIMD];
  turn = fibre.simd_meetings++ & 1;
  meeting.arrived++;
  wait(meeting.arrived, SIMD * fibre.simd_meetings);
  return meeting;
}

inline Meeting& meet(uint32_t word, unsigned& turn) {
  Fibre& fibre = self();
  machine.simdgroups[fibre.index / SIMD].words[fibre.simd_meetings & 1][fibre.index % SIMD] = word;
  return meet(turn);
}

// The words that each lane gives.
template <size_t N>
inline const uint32_t (&exchange(const uint32_t (&words)[N]))[SIMD][6] {
  Fibre& fibre = self();
  Meeting& meeting = machine.simdgroups[fibre.index / SIMD];
  std::memcpy(meeting.matrices[fibre.simd_meetings & 1][fibre.index % SIMD], words, 4 * N);
  unsigned turn;
  meet(turn);
  return meeting.matrices[turn];
}

inline void run_fibre() {
  machine.body(machine.arguments, machine.position, self().index);
  Fibre& fibre = self();
  fibre.done = true;
  machine.idle = 0;
  if (--machine.live == 0) {
    Context::change(fibre.context, machine.main);
  }
  pass_on();
  std::abort();
}

// Runs every threadgroup of a grid; returns 0, or 1 where a simdgroup function or a barrier was
// not reached by all of its threads.
inline int run_grid(
    const uint* threadgroups, uint threads, void (*body)(void*, uint3, uint), void* arguments) {
  machine.num_fibres = threads;
  machine.fibres = new Fibre[threads];
  machine.simdgroups = new Meeting[(threads + SIMD - 1) / SIMD];
  machine.body = body;
  machine.arguments = arguments;
  machine.stuck = false;
  char* stacks = static_cast<char*>(std::malloc(STACK_BYTES * threads));
  for (uint z = 0; z < threadgroups[2] && !machine.stuck; z++) {
    for (uint y = 0; y < threadgroups[1] && !machine.stuck; y++) {
      for (uint x = 0; x < threadgroups[0] && !machine.stuck; x++) {
        machine.position = uint3{x, y, z};
        for (uint i = 0; i < threads; i++) {
          Fibre& fibre = machine.fibres[i];
          fibre.index = i;
          fibre.simd_meetings = fibre.barriers = 0;
          fibre.done = false;
          fibre.context.start(stacks + STACK_BYTES * i, run_fibre);
        }
        for (uint i = 0; i < (threads + SIMD - 1) / SIMD; i++) {
          machine.simdgroups[i].arrived = 0;
        }
        machine.barrier_arrived = 0;
        machine.live = threads;
        machine.current = 0;
        machine.idle = 0;
        Context::change(machine.main, machine.fibres[0].context);
      }
    }
  }
  std::free(stacks);
  delete[] machine.fibres;
  delete[] machine.simdgroups;
  return machine.stuck;
}

} // namespace host

inline float simd_shuffle_xor(float x, ushort mask) {
  unsigned turn, lane = host::self().index % host::SIMD;
  host::Meeting& meeting = host::meet(as_type<uint32_t>(x), turn);
  return as_type<float>(meeting.words[turn][lane ^ mask]);
}
inline float simd_sum(float x) {
  for (ushort mask = 16; mask > 0; mask /= 2) {
    x += simd_shuffle_xor(x, mask);
  }
  return x;
}
inline float simd_max(float x) {
  for (ushort mask = 16; mask > 0; mask /= 2) {
    x = max(x, simd_shuffle_xor(x, mask));
  }
  return x;
}
inline bool simd_any(bool x) {
  unsigned turn;
  host::Meeting& meeting = host::meet(x, turn);
  uint32_t any = 0;
  for (unsigned i = 0; i < host::SIMD; i++) {
    any |= meeting.words[turn][i];
  }
  return any;
}
inline void simdgroup_barrier(mem_flags) {
  unsigned turn;
  host::meet(0, turn);
}
inline void threadgroup_barrier(mem_flags) {
  host::machine.barrier_arrived++;
  unsigned needed = ++host::self().barriers * host::machine.num_fibres;
  host::wait(host::machine.barrier_arrived, needed);
}

namespace host {

// Half i of a word that a lane has given.
inline float half_of(uint32_t word, int i) {
  return float(as_type<half>(uint16_t(i ? word >> 16 : word)));
}

// The sum of A and B's products, with the elements of 16 x K, K x 8 and 16 x 8 matrices in the lanes
// that PTX names.
template <int K, size_t N>
inline void multiply(float (&c)[2], float (&d)[2], const uint32_t (&words)[N]) {
  int lane = self().index % SIMD;
  const auto& given = exchange(words);
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float& sum = i < 2 ? c[i] : d[i - 2];
    for (int k = 0; k < K; k++) {
      uint32_t a = given[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      uint32_t b = given[column * 4 + k % 8 / 2][K / 4 + k / 8];
      sum += half_of(a, k % 2) * half_of(b, k % 2);
    }
  }
}

} // namespace host

inline void multiply_16x8x16(
    float (&c)[2], float (&d)[2], uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  host::multiply<16>(c, d, {a0, a1, a2, a3, b0, b1});
}
inline void multiply_16x8x8(float (&c)[2], float (&d)[2], uint a0, uint a1, uint b0) {
  host::multiply<8>(c, d, {a0, a1, b0});
}
inline uint transpose_8x8(uint halves) {
  int lane = host::self().index % host::SIMD;
  const auto& given = host::exchange<1>({halves});
  uint transposed = 0;
  for (int i = 0; i < 2; i++) {
    int line = lane % 4 * 2 + i, column = lane / 4;
    uint32_t word = given[line * 4 + column / 2][0];
    transposed |= (column % 2 ? word >> 16 : word & 0xffffu) << (16 * i);
  }
  return transposed;
}

// An 8 x 8 matrix, two neighbouring elements of a line to a lane, as Apple's GPUs have it.
template <typename T, int COLUMNS, int LINES>
struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && LINES == 8, "the one size of Metal");
  T elements[2];
  T (&thread_elements())[2] { return elements; }
};

inline void simdgroup_multiply_accumulate(
    simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<half, 8, 8> a,
    simdgroup_matrix<half, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
  auto lane_of = [](int line, int column) {
    return line / 4 * 16 + column / 4 * 8 + line % 4 * 2 + column % 4 / 2;
  };
  auto element = [](const uint32_t* words, int which, int column) {
    return float(as_type<half>(uint16_t(column % 2 ? words[which] >> 16 : words[which])));
  };
  int lane = host::self().index % host::SIMD;
  const auto& given = host::exchange<2>({as_type<uint32_t>(a), as_type<uint32_t>(b)});
  int line = lane / 16 * 4 + lane / 2 % 4, column = lane / 8 % 2 * 4 + lane % 2 * 2;
  for (int i = 0; i < 2; i++) {
    float sum = c.elements[i];
    for (int k = 0; k < 8; k++) {
      sum += element(given[lane_of(line, k)], 0, k) *
          element(given[lane_of(k, column + i)], 1, column + i);
    }
    d.elements[i] = sum;
  }
}

} // namespace metal
