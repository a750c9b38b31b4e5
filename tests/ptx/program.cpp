// Reads PTX, as nvcc and Triton write it.
#include "program.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace ptx {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("ptx: " + what); }

std::string trimmed(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\n\r"), last = s.find_last_not_of(" \t\n\r");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

bool starts_with(const std::string& s, const char* head) { return s.rfind(head, 0) == 0; }

// Without comments and the lines that are for debuggers.
std::string cleaned(const std::string& text) {
  std::istringstream lines(text);
  std::string out;
  for (std::string line; std::getline(lines, line);) {
    line = line.substr(0, line.find("//"));
    const std::string head = trimmed(line);
    if (starts_with(head, ".section")) break;
    if (starts_with(head, ".loc") || starts_with(head, ".file") || starts_with(head, ".pragma")) continue;
    out += line + "\n";
  }
  return out;
}

// "a, {b, c}, [d, {e}]" at its outermost commas.
std::vector<std::string> split(const std::string& s) {
  std::vector<std::string> out;
  int depth = 0;
  std::string part;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0)
      out.push_back(trimmed(part)), part.clear();
    else
      part += c;
  }
  if (!trimmed(part).empty()) out.push_back(trimmed(part));
  return out;
}

class Parser {
  Program& p_;
  // Inline assembly declares names in braces: the innermost one counts. Registers, labels and symbols.
  std::vector<std::map<std::string, int>> scopes_{1}, labels_{1};
  struct Jump {
    int at;
    std::string label;
    std::vector<size_t> scopes;
  };
  std::vector<size_t> open_{0};  // scopes that the parser is in
  std::vector<Jump> jumps_;
  std::map<std::string, uint64_t> symbols_;

 public:
  Parser(Program& program, const std::map<std::string, uint64_t>& symbols) : p_(program), symbols_(symbols) {}

  void symbol(const std::string& name, uint64_t value) { symbols_[name] = value; }

  void body(const std::string& s) {
    for (size_t i = 0; i < s.size();) {
      if (std::isspace(static_cast<unsigned char>(s[i])) || s[i] == ';') {
        ++i;
      } else if (s[i] == '{') {
        open_.push_back(scopes_.size()), scopes_.emplace_back(), labels_.emplace_back(), ++i;
      } else if (s[i] == '}') {
        open_.pop_back(), ++i;
      } else {
        size_t end = i;
        while (end < s.size() && (std::isalnum(static_cast<unsigned char>(s[end])) || s[end] == '_' || s[end] == '$'))
          ++end;
        if (end < s.size() && s[end] == ':' && end > i) {
          labels_[open_.back()][s.substr(i, end - i)] = int(p_.code.size()), i = end + 1;
          continue;
        }
        end = s.find(';', i);
        if (end == std::string::npos) fail("a statement without an end");
        statement(trimmed(s.substr(i, end - i))), i = end + 1;
      }
    }
    for (const Jump& jump : jumps_) p_.code[jump.at].target = label(jump);
  }

 private:
  int label(const Jump& jump) const {
    for (size_t i = jump.scopes.size(); i-- > 0;) {
      const auto found = labels_[jump.scopes[i]].find(jump.label);
      if (found != labels_[jump.scopes[i]].end()) return found->second;
    }
    fail("no label " + jump.label);
  }

  void statement(const std::string& s) {
    if (starts_with(s, ".reg")) return registers(s);
    if (starts_with(s, ".shared")) return shared(s);
    if (s[0] == '.') fail("unknown declaration: " + s);
    instruction(s);
  }

  // ".reg .f32 %f<13>" or ".reg .b32 a, b"
  void registers(const std::string& s) {
    std::istringstream words(s);
    std::string skip;
    words >> skip >> skip;
    std::string names;
    std::getline(words, names);
    for (const std::string& name : split(names)) {
      const size_t range = name.find('<');
      if (range == std::string::npos) {
        scopes_[open_.back()][name] = p_.registers++;
      } else {
        const int count = std::stoi(name.substr(range + 1));
        for (int i = 0; i < count; ++i)
          scopes_[open_.back()][name.substr(0, range) + std::to_string(i)] = p_.registers++;
      }
    }
  }

  // ".shared .align 8 .b8 name[4096]"
  void shared(const std::string& s) {
    const uint32_t align = std::stoul(s.substr(s.find(".align") + 6));
    const size_t bracket = s.find('['), name = s.find_last_of(" \t", bracket) + 1;
    p_.static_shared = (p_.static_shared + align - 1) / align * align;
    symbol(s.substr(name, bracket - name), SHARED_BASE + p_.static_shared);
    p_.static_shared += std::stoul(s.substr(bracket + 1));
  }

  void instruction(std::string s) {
    Instruction out;
    out.text = s;
    if (s[0] == '@') {
      out.negated = s[1] == '!';
      const size_t end = s.find_first_of(" \t");
      out.guard = place(s.substr(1 + out.negated, end - 1 - out.negated));
      s = trimmed(s.substr(end));
    }
    const size_t end = s.find_first_of(" \t\n");
    std::string operation = s.substr(0, end);
    const auto operands = end == std::string::npos ? std::vector<std::string>{} : split(s.substr(end));
    if (operation == "bra" || operation == "bra.uni") {
      jumps_.push_back({int(p_.code.size()), operands.at(0), open_});
    } else {
      for (const std::string& each : operands) operand(each, out.args);
      if (starts_with(operation, "mov.") && operands.at(0)[0] == '{') operation = "unpack" + operation.substr(3);
      if (starts_with(operation, "mov.") && operands.at(1)[0] == '{') operation = "pack" + operation.substr(3);
    }
    out.run = handler(operation);
    if (!out.run) fail("unknown operation: " + s.substr(0, 200));
    p_.code.push_back(std::move(out));
  }

  void operand(const std::string& s, std::vector<int>& out) {
    const size_t bar = s.find('|');
    if (bar != std::string::npos) {
      out.push_back(place(s.substr(0, bar))), out.push_back(place(s.substr(bar + 1)));
    } else if (s[0] == '{') {
      for (const std::string& each : split(s.substr(1, s.size() - 2))) operand(each, out);
    } else if (s[0] == '[') {
      const auto parts = split(s.substr(1, s.size() - 2));
      const size_t plus = parts[0].find('+');
      out.push_back(place(trimmed(parts[0].substr(0, plus))));
      out.push_back(constant(plus == std::string::npos ? 0 : std::stoll(parts[0].substr(plus + 1))));
      for (size_t i = 1; i < parts.size(); ++i) operand(parts[i], out);
    } else {
      out.push_back(place(s));
    }
  }

  int constant(uint64_t value) {
    p_.constants.push_back(value);
    return ~int(p_.constants.size() - 1);
  }

  // Of a register, a number or a symbol.
  int place(const std::string& s) {
    for (size_t i = open_.size(); i-- > 0;) {
      const auto found = scopes_[open_[i]].find(s);
      if (found != scopes_[open_[i]].end()) return found->second;
    }
    if (starts_with(s, "0f") || starts_with(s, "0F") || starts_with(s, "0d") || starts_with(s, "0D"))
      return constant(std::stoull(s.substr(2), nullptr, 16));
    if (std::isdigit(static_cast<unsigned char>(s[0]))) return constant(std::stoull(s, nullptr, 0));
    if (s[0] == '-') return constant(uint64_t(std::stoll(s, nullptr, 0)));
    const auto symbol = symbols_.find(s);
    if (symbol != symbols_.end()) return constant(symbol->second);
    if (s == "_" || s[0] == '%') {  // a result that nobody wants, or a special register
      auto [found, fresh] = p_.specials.try_emplace(s, p_.registers);
      p_.registers += fresh;
      return found->second;
    }
    fail("unknown name: " + s);
  }
};

// ".param .align 64 .b8 name[512], .param .u64 .ptr .global .align 1 name": one behind the other.
void parameters(const std::string& s, Program& program, Parser& parser) {
  std::vector<std::string> names;
  size_t end = 0;
  for (const std::string& each : split(s)) {
    const size_t bracket = each.find('['), name = each.find_last_of(" \t", bracket) + 1, type = each.find(".u");
    size_t size, align;
    if (bracket != std::string::npos) {
      size = std::stoul(each.substr(bracket + 1)), align = std::stoul(each.substr(each.find(".align") + 6));
    } else {
      if (type == std::string::npos) fail("unknown parameter: " + each);
      size = align = std::stoul(each.substr(type + 2)) / 8;
    }
    end = (end + align - 1) / align * align;
    names.push_back(each.substr(name, bracket - name));
    program.layout.push_back({end, size});
    end += size;
  }
  program.memory.resize(end + 63), program.parameter_bytes = end;
  const uint64_t base = reinterpret_cast<uint64_t>(program.parameters());
  for (size_t i = 0; i < names.size(); ++i) parser.symbol(names[i], base + program.layout[i].offset);
}

}  // namespace

std::vector<std::unique_ptr<Program>> parse(const std::string& raw) {
  const std::string text = cleaned(raw);
  std::map<std::string, uint64_t> symbols;
  for (size_t at = text.find(".extern .shared"); at != std::string::npos; at = text.find(".extern .shared", at + 1)) {
    const size_t bracket = text.find('[', at), name = text.find_last_of(" \t", bracket) + 1;
    symbols[text.substr(name, bracket - name)] = SHARED_BASE;  // kernels here have static or dynamic memory, not both
  }
  std::vector<std::unique_ptr<Program>> out;
  for (size_t at = text.find(".entry"); at != std::string::npos; at = text.find(".entry", at)) {
    const size_t open = text.find('(', at), close = text.find(')', open), begin = text.find('{', close);
    size_t end = begin;
    for (int depth = 0;; ++end) {
      depth += (text[end] == '{') - (text[end] == '}');
      if (depth == 0) break;
    }
    auto program = std::make_unique<Program>();
    program->name = trimmed(text.substr(at + 6, open - at - 6));
    for (const std::string directive : {".maxntid", ".reqntid"}) {
      const size_t threads = text.find(directive, close);
      if (threads < begin) program->max_threads = std::stoi(text.substr(threads + directive.size()));
    }
    Parser parser(*program, symbols);
    parameters(text.substr(open + 1, close - open - 1), *program, parser);
    parser.body(text.substr(begin + 1, end - begin - 1));
    out.push_back(std::move(program));
    at = end;
  }
  return out;
}

}  // namespace ptx
