// The host target's program as a primitive of MLX, for tests/metal_kernel_backend/lazy_target.py.
//
// MLX's Python package has no primitive whose evaluation calls back, and its C++ headers do. This
// file is compiled with them and called through ctypes with the addresses of MLX's arrays.

#include <memory>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

using mlx::core::array;

// A compiled kernel: (buffers, threadgroups, threads of a threadgroup) -> 0, or 1 where only some
// threads reached a simdgroup function or a barrier. See HOST_PROGRAM in host_target.py.
using Program = int (*)(void* const* buffers, const unsigned* groups, unsigned threads);

class HostLaunch : public mlx::core::Primitive {
 public:
  HostLaunch(mlx::core::Stream stream, Program program, const unsigned* groups, unsigned threads)
      : Primitive(stream),
        program_(program),
        groups_(groups, groups + 3),
        threads_(threads) {}

  // Outputs are allocated at once and written in the stream's order, like every operation's. What
  // the program writes through an input stays in that input's buffer, as on a GPU.
  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    std::vector<void*> buffers;
    for (const auto& input : inputs) {
      buffers.push_back(const_cast<char*>(input.data<char>()));
    }
    for (auto& output : outputs) {
      output.set_data(mlx::core::allocator::malloc(output.nbytes()));
      buffers.push_back(output.data<char>());
    }
    auto task = [program = program_, buffers, groups = groups_, threads = threads_]() {
      if (program(buffers.data(), groups.data(), threads)) {
        throw std::runtime_error("a barrier was reached by only some threads of a kernel");
      }
    };
    mlx::core::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("HostLaunch runs on the CPU");
  }

  const char* name() const override {
    return "HostLaunch";
  }

 private:
  Program program_;
  std::vector<unsigned> groups_;
  unsigned threads_;
};

// Replaces the arrays at `outputs` by results of a launch that has not run, of their shapes and
// types. `inputs` are row-contiguous.
extern "C" void lazy_launch(
    Program program,
    const unsigned* groups,
    unsigned threads,
    array* const* inputs,
    unsigned num_inputs,
    array* const* outputs,
    unsigned num_outputs) {
  auto stream = mlx::core::default_stream(mlx::core::Device::cpu);
  auto primitive = std::make_shared<HostLaunch>(stream, program, groups, threads);
  std::vector<array> given;
  for (unsigned i = 0; i < num_inputs; i++) {
    given.push_back(*inputs[i]);
  }
  std::vector<mlx::core::Shape> shapes;
  std::vector<mlx::core::Dtype> dtypes;
  for (unsigned i = 0; i < num_outputs; i++) {
    shapes.push_back(outputs[i]->shape());
    dtypes.push_back(outputs[i]->dtype());
  }
  auto made = array::make_arrays(std::move(shapes), dtypes, primitive, given);
  for (unsigned i = 0; i < num_outputs; i++) {
    *outputs[i] = made[i];
  }
}

// The number of elements of the array at an address, by which the caller checks the address.
extern "C" size_t array_size(const array* given) {
  return given->size();
}
