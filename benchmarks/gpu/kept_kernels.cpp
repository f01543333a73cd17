// Keeps on disk what NVRTC compiles, and gives it to the next process that compiles the same text.
//
//   g++ -std=c++17 -O2 -shared -fPIC -o kept_kernels.so benchmarks/gpu/kept_kernels.cpp -ldl
//   KEPT_KERNELS=FOLDER LD_PRELOAD=$PWD/kept_kernels.so python ...
//
// macOS keeps compiled kernels, and so does MLX CUDA with its own. Those of `mx.fast.cuda_kernel` it
// compiles again in each process (`CustomKernel::eval_gpu` asks for no disk cache): seconds a kernel,
// and every test of the engine is a process. The tests and benchmarks of this folder are run with this
// library in front of NVRTC; nothing of `vllm_metal` knows it.
//
// A file is named by a hash of NVRTC's version and of all that it is asked to compile: text, headers,
// options and names. It holds the names as the compiler wrote them and the binary. It is written under
// another name and renamed, so that processes can share the folder.

#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

using Program = void*;
using Result = int;

constexpr Result SUCCESS = 0;

struct Request {
  std::string text;                                         // all that decides what comes out
  std::vector<std::string> names;                           // as the caller wrote them
  std::vector<std::pair<std::string, std::string>> lowered; // as the caller and the compiler did
  std::string binary;
  bool kept = false;                                        // read from a file, not compiled
};

std::mutex mutex;

std::map<Program, Request>& requests() {
  static auto* all = new std::map<Program, Request>;  // used until the process ends
  return *all;
}

// NVRTC's own function. Python loads MLX with names that only MLX sees, so the next one after this
// library may not be found: then NVRTC is asked, which is loaded by now.
void* original_address(const char* name) {
  void* address = dlsym(RTLD_NEXT, name);
  for (const char* library : {"libnvrtc.so.13", "libnvrtc.so.12"}) {
    if (address) break;
    if (void* nvrtc = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) address = dlsym(nvrtc, name);
  }
  if (!address) {
    fprintf(stderr, "kept_kernels: NVRTC has no %s\n", name);
    abort();
  }
  return address;
}

template <typename... Arguments>
Result original(const char* name, Arguments... arguments) {
  return reinterpret_cast<Result (*)(Arguments...)>(original_address(name))(arguments...);
}

// FNV-1a of 64 bits, from two beginnings.
std::string hash(const std::string& text) {
  char digits[33];
  std::uint64_t parts[2] = {0xcbf29ce484222325u, 0x9e3779b97f4a7c15u};
  for (unsigned char byte : text) {
    for (auto& part : parts) part = (part ^ byte) * 0x100000001b3u;
  }
  snprintf(digits, sizeof digits, "%016llx%016llx", static_cast<unsigned long long>(parts[0]),
           static_cast<unsigned long long>(parts[1]));
  return digits;
}

std::filesystem::path file_of(const Request& request) {
  const char* folder = getenv("KEPT_KERNELS");
  return folder ? std::filesystem::path(folder) / hash(request.text) : std::filesystem::path();
}

void append(std::string& text, const char* part) {
  text += part ? part : "";
  text += '\0';
}

void put(std::ostream& file, const std::string& part) {
  std::uint64_t size = part.size();
  file.write(reinterpret_cast<const char*>(&size), sizeof size);
  file.write(part.data(), static_cast<std::streamsize>(size));
}

bool get(std::istream& file, std::string& part) {
  std::uint64_t size = 0;
  if (!file.read(reinterpret_cast<char*>(&size), sizeof size) || size > (1u << 30)) return false;
  part.resize(size);
  return static_cast<bool>(file.read(part.data(), static_cast<std::streamsize>(size)));
}

bool read_kept(Request& request) {
  std::ifstream file(file_of(request), std::ios::binary);
  if (!file) return false;
  for (const auto& name : request.names) {
    std::string lowered;
    if (!get(file, lowered)) return false;
    request.lowered.emplace_back(name, lowered);
  }
  return get(file, request.binary);
}

void keep(const Request& request) {
  const auto path = file_of(request);
  if (path.empty()) return;
  const auto unfinished = path.string() + "." + std::to_string(getpid());
  {
    std::ofstream file(unfinished, std::ios::binary);
    for (const auto& [name, lowered] : request.lowered) put(file, lowered);
    put(file, request.binary);
    if (!file) return;
  }
  std::error_code ignored;
  std::filesystem::rename(unfinished, path, ignored);
}

Request* kept(Program program) {
  std::lock_guard lock(mutex);
  auto found = requests().find(program);
  return found != requests().end() && found->second.kept ? &found->second : nullptr;
}

}  // namespace

extern "C" {

Result nvrtcCreateProgram(Program* program, const char* source, const char* name, int count,
                          const char* const* headers, const char* const* include_names) {
  Result result = original("nvrtcCreateProgram", program, source, name, count, headers,
                           include_names);
  if (result != SUCCESS) return result;
  Request request;
  int version[2] = {};
  original("nvrtcVersion", &version[0], &version[1]);
  append(request.text, (std::to_string(version[0]) + "." + std::to_string(version[1])).c_str());
  append(request.text, source);
  for (int i = 0; i < count; i++) {
    append(request.text, include_names[i]);
    append(request.text, headers[i]);
  }
  std::lock_guard lock(mutex);
  requests()[*program] = std::move(request);
  return result;
}

Result nvrtcAddNameExpression(Program program, const char* name) {
  {
    std::lock_guard lock(mutex);
    auto& request = requests()[program];
    append(request.text, name);
    request.names.push_back(name);
  }
  return original("nvrtcAddNameExpression", program, name);
}

Result nvrtcCompileProgram(Program program, int count, const char* const* options) {
  Request* request;
  {
    std::lock_guard lock(mutex);
    request = &requests()[program];
  }
  for (int i = 0; i < count; i++) append(request->text, options[i]);
  if (read_kept(*request)) {
    request->kept = true;
    return SUCCESS;
  }
  request->lowered.clear();
  Result result = original("nvrtcCompileProgram", program, count, options);
  if (result != SUCCESS) return result;
  for (const auto& name : request->names) {
    const char* lowered = nullptr;
    if (original("nvrtcGetLoweredName", program, name.c_str(), &lowered) != SUCCESS) return result;
    request->lowered.emplace_back(name, lowered);
  }
  std::size_t size = 0;
  if (original("nvrtcGetCUBINSize", program, &size) != SUCCESS || size == 0) return result;
  request->binary.resize(size);
  if (original("nvrtcGetCUBIN", program, request->binary.data()) == SUCCESS) keep(*request);
  return result;
}

Result nvrtcGetLoweredName(Program program, const char* name, const char** lowered) {
  if (Request* request = kept(program)) {
    for (const auto& [written, compiled] : request->lowered) {
      if (written == name) {
        *lowered = compiled.c_str();
        return SUCCESS;
      }
    }
  }
  return original("nvrtcGetLoweredName", program, name, lowered);
}

Result nvrtcGetCUBINSize(Program program, std::size_t* size) {
  if (Request* request = kept(program)) {
    *size = request->binary.size();
    return SUCCESS;
  }
  return original("nvrtcGetCUBINSize", program, size);
}

Result nvrtcGetCUBIN(Program program, char* binary) {
  if (Request* request = kept(program)) {
    std::memcpy(binary, request->binary.data(), request->binary.size());
    return SUCCESS;
  }
  return original("nvrtcGetCUBIN", program, binary);
}

Result nvrtcDestroyProgram(Program* program) {
  {
    std::lock_guard lock(mutex);
    requests().erase(*program);
  }
  return original("nvrtcDestroyProgram", program);
}

}  // extern "C"
