// A kernel in PTX, read from its text: instructions with their operands as places in the registers of a thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ptx {

struct Thread;
struct Instruction;

// What becomes of a thread after an instruction: it goes on with the next one, or gives up its turn before; it jumped,
// waits at this one, or is done.
enum class Then { NEXT, YIELDS, JUMPED, WAITS, EXITS };
using Handler = Then (*)(Thread&, const Instruction&);

struct Instruction {
  Handler run;
  int guard = -1;  // place of the predicate, or -1
  bool negated = false;
  int target = -1;        // of a branch
  std::vector<int> args;  // places, flat: {a, b} is two, [base + offset] is two; a negative one is constant ~place
  std::string text;       // for messages
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<uint64_t> constants;
  int registers = 0;                    // places of a thread
  std::map<std::string, int> specials;  // %tid.x and the like: place
  std::vector<char> memory;             // of the parameters, whose addresses are constants
  size_t parameter_bytes = 0;
  struct Parameter {
    size_t offset, size;  // bytes
  };
  std::vector<Parameter> layout;
  uint32_t static_shared = 0;  // bytes
  int max_threads = 0;         // of a CTA

  void* parameters() {  // 64-byte aligned, as tensor maps ask for
    return reinterpret_cast<void*>((reinterpret_cast<uint64_t>(memory.data()) + 63) / 64 * 64);
  }
};

// Shared memory begins here, as on a GPU: address 0 is nobody's.
constexpr uint32_t SHARED_BASE = 1024;

// All kernels of a module. Throws std::runtime_error where it holds something unknown.
std::vector<std::unique_ptr<Program>> parse(const std::string& text);

// What runs an operation, as PTX spells it ("add.f32"). Null if nothing does.
Handler handler(const std::string& operation);

}  // namespace ptx
