// Binds csrc/ to Python as flashcl._C: the one file that knows Python, as the .cu files are the ones that know CUDA.
//
// A kernel is a .cu file with a plain C++ header beside it, and a file whose code only one GPU generation can run
// carries it as a suffix (sweep_sm90.cu); setup.py compiles it for that generation, the others for every architecture
// of FLASHCL_ARCHS. Tensors arrive by DLPack and streams as integers, so nothing here depends on a version of torch.
//
// Tensors on the CPU are emulated (emulate.cpp). Shapes are checked here, once, for both.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <sstream>
#include <string>

#include "device.h"
#include "kernels.h"
#include "tensors.h"

namespace flashcl {
extern const char* const resources;  // setup.py writes it: a line for each kernel, what ptxas gave it
}

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashcl::TILE;
using flashcl::Tensor;
using Matrix = Tensor<const void, 2>;
template <class T>
using Array = Tensor<T, -1, true>;
using Floats = Array<const float>;
using Ids = Array<const int32_t>;
using Result = Array<float>;
template <class T>
using Maybe = std::optional<T>;

void require(bool condition, const std::string& what) {
  if (!condition) throw nb::value_error(("flashcl._C: " + what).c_str());
}

// ---- build and device ----

std::string compiler() {
#ifdef __clang__
  return __VERSION__;  // names itself
#else
  return "gcc " __VERSION__;
#endif
}

std::string nanobind_version() {
  return NB_TOSTRING(NB_VERSION_MAJOR) "." NB_TOSTRING(NB_VERSION_MINOR) "." NB_TOSTRING(NB_VERSION_PATCH);
}

std::string abi() {
  constexpr int major = Py_LIMITED_API >> 24, minor = Py_LIMITED_API >> 16 & 0xff;
  return "cp" + std::to_string(major) + std::to_string(minor) + "-abi3";
}

nb::list architectures() {
  nb::list out;
  std::istringstream archs(NB_TOSTRING(FLASHCL_ARCHS));
  for (std::string arch; std::getline(archs, arch, '_');) out.append(nb::str(arch.c_str()));
  return out;
}

nb::dict build_info() {
  nb::dict out;
  out["nvcc"] = flashcl::nvcc_version();
  out["architectures"] = architectures();
  out["compiler"] = compiler().c_str();
  out["nanobind"] = nanobind_version().c_str();
  out["abi"] = abi().c_str();
  return out;
}

// ---- arguments ----

// The pointer of a tensor that must lie where the embeddings do and have this many elements; null of none.
struct Reader {
  int device_type, device_id;

  template <class T>
  T* operator()(const Array<T>& array, int64_t elements, const char* name) const {
    require(array.device_type() == device_type && array.device_id() == device_id,
            std::string(name) + " is on another device");
    require(int64_t(array.size()) >= elements, std::string(name) + " has fewer elements than its tiles");
    return array.data();
  }
  template <class T>
  T* operator()(const Maybe<Array<T>>& array, int64_t elements, const char* name) const {
    return array ? (*this)(*array, elements, name) : nullptr;
  }
};

struct Problem {
  flashcl::Block block;
  Reader reader;

  int64_t rows() const { return int64_t(block.schedule().tiles_n) * TILE; }  // whole tiles
  int64_t cols() const { return int64_t(block.schedule().tiles_m) * TILE; }
  int64_t tiles_n() const { return block.schedule().tiles_n; }
  int64_t tiles_m() const { return block.schedule().tiles_m; }
  int classes() const { return block.row_label ? 2 : 1; }
  bool on_cpu() const { return reader.device_type == nb::device::cpu::value; }
};

bool is(const Matrix& x, nb::dlpack::dtype_code code) {
  return x.dtype().code == uint8_t(code) && x.dtype().bits == 16;
}

// From one row to the next. DLPack may say 1 where there is one row.
int64_t row_stride(const Matrix& x) { return x.shape(0) > 1 ? x.stride(0) : int64_t(x.shape(1)); }

void check_operand(const Matrix& x, const char* name) {
  const std::string who = name;
  require(x.shape(0) > 0 && x.shape(0) < (1u << 31) - TILE, who + " must have rows, fewer than 2^31");
  require(x.shape(1) > 0 && x.shape(1) % 8 == 0, who + " must have a multiple of 8 columns");
  require(x.shape(1) < (1u << 31) - TILE && row_stride(x) < int64_t(1) << 39, who + " is too wide for the copy engine");
  require(x.stride(1) == 1 && row_stride(x) % 8 == 0 && row_stride(x) > 0,
          who + " must have contiguous rows, 16-byte aligned");
  require(reinterpret_cast<uintptr_t>(x.data()) % 16 == 0, who + " must be 16-byte aligned");
}

Problem problem(const Matrix& x, const Matrix& y, const Floats& logit_scale, const Maybe<Floats>& row_bias,
                const Maybe<Floats>& col_bias, const Maybe<Ids>& row_id, const Maybe<Ids>& col_id,
                const Maybe<Ids>& row_range, const Maybe<Ids>& col_range, const Maybe<Ids>& row_label,
                const Maybe<Ids>& col_label, bool triangular) {
  check_operand(x, "x");
  check_operand(y, "y");
  const bool half = is(x, nb::dlpack::dtype_code::Float);
  require(half || is(x, nb::dlpack::dtype_code::Bfloat), "x must be float16 or bfloat16");
  require(y.dtype() == x.dtype() && y.shape(1) == x.shape(1), "y must have the dtype and the columns of x");
  require(y.device_type() == x.device_type() && y.device_id() == x.device_id(), "y is on another device");
  require(!triangular || (x.data() == y.data() && x.shape(0) == y.shape(0)), "a triangular problem has one x");
  require(!row_id == !col_id && !row_id == !row_range && !row_id == !col_range, "ids come with ids and ranges");
  require(!row_label == !col_label, "labels come with labels");

  Problem p;
  p.reader = {x.device_type(), x.device_id()};
  p.block.N = int(x.shape(0)), p.block.M = int(y.shape(0)), p.block.D = int(x.shape(1));
  p.block.half = half, p.block.triangular = triangular;
  p.block.x = x.data(), p.block.y = y.data();
  p.block.x_stride = row_stride(x), p.block.y_stride = row_stride(y);
  const Reader& read = p.reader;
  p.block.logit_scale = read(logit_scale, 1, "logit_scale");
  p.block.row_bias = read(row_bias, p.rows(), "row_bias");
  p.block.col_bias = read(col_bias, p.cols(), "col_bias");
  p.block.row_id = read(row_id, p.rows(), "row_id");
  p.block.col_id = read(col_id, p.cols(), "col_id");
  p.block.row_range = read(row_range, 2 * p.tiles_n(), "row_range");
  p.block.col_range = read(col_range, 2 * p.tiles_m(), "col_range");
  p.block.row_label = read(row_label, p.rows(), "row_label");
  p.block.col_label = read(col_label, p.cols(), "col_label");
  return p;
}

flashcl::Sums sums(const Problem& p, const Maybe<Result>& rows, const Maybe<Result>& cols,
                   const Maybe<Result>& softplus, const Maybe<Result>& scaled, const Maybe<Floats>& about) {
  const Reader& read = p.reader;
  return {read(rows, p.tiles_m() * p.rows(), "g_rows"), read(cols, p.tiles_n() * p.cols(), "g_cols"),
          read(softplus, p.tiles_m() * p.rows(), "softplus"), read(scaled, p.tiles_n() * p.tiles_m(), "scaled"),
          read(about, 1, "about")};
}

using G = Maybe<Tensor<void, 2, true>>;

flashcl::Output output(const Problem& p, const G& g) {
  if (!g) return {nullptr, 0};
  require(g->device_type() == p.reader.device_type && g->device_id() == p.reader.device_id, "g is on another device");
  require(g->dtype().bits == 16 && (g->dtype().code == uint8_t(nb::dlpack::dtype_code::Float)) == p.block.half,
          "g must have the dtype of x");
  require(int64_t(g->shape(0)) == p.rows() && int64_t(g->shape(1)) == p.cols(), "g must have whole tiles");
  require(reinterpret_cast<uintptr_t>(g->data()) % 16 == 0, "g must be 16-byte aligned");
  return {g->data(), g->stride(0)};
}

// (classes, lines), the classes any stride apart
using Coefficients = Tensor<const float, 2>;

flashcl::Side side(const Problem& p, int64_t lines, const Maybe<Coefficients>& weight, const Maybe<Coefficients>& lse,
                   const Maybe<Floats>& offset) {
  if (!weight) return {nullptr, nullptr, nullptr, 0};
  require(lse.has_value(), "weights come with log-sum-exps");
  for (const Coefficients& v : {*weight, *lse}) {
    require(v.device_type() == p.reader.device_type && v.device_id() == p.reader.device_id,
            "coefficients are on another device");
    require(int(v.shape(0)) == p.classes() && int64_t(v.shape(1)) >= lines, "coefficients must be (classes, lines)");
    require(v.stride(1) == 1 && (p.classes() == 1 || v.stride(0) == weight->stride(0)), "lines must be contiguous");
  }
  return {weight->data(), lse->data(), p.reader(offset, lines, "offset"), weight->stride(0)};
}

// ---- calls ----

template <class Args>
void call(const Args& args, bool on_cpu, uintptr_t stream, void (*emulate)(const Args&),
          int (*launch)(const Args&, void*)) {
  int error = 0;
  {
    nb::gil_scoped_release others_may_run;
    if (on_cpu)
      emulate(args);
    else
      error = launch(args, reinterpret_cast<void*>(stream));
  }
  if (error) throw std::runtime_error(std::string("flashcl._C: ") + flashcl::error_text(error));
}

void sweep(const Problem& p, const Result& row_sums, const Maybe<Floats>& row_center,
           const Maybe<Result>& row_deviation, const Maybe<Result>& col_sums, const Maybe<Floats>& col_center,
           const Maybe<Result>& col_deviation, uintptr_t stream) {
  const int64_t planes = 2 * p.classes(), along_rows = p.tiles_m() * p.rows(), along_cols = p.tiles_n() * p.cols();
  require((!row_center || row_deviation) && (!col_center || col_deviation), "centers come with deviations");
  require(!col_deviation || col_sums, "deviations of columns come with their statistics");
  require((!col_deviation || row_deviation) && (!row_deviation || p.classes() == 2),
          "deviations are of positives, along the rows too");
  const Reader& read = p.reader;
  const flashcl::SweepArgs args{
      p.block,
      {read(row_sums, planes * along_rows, "row_sums"), read(row_center, p.rows(), "row_center"),
       read(row_deviation, along_rows, "row_deviation")},
      {read(col_sums, planes * along_cols, "col_sums"), read(col_center, p.cols(), "col_center"),
       read(col_deviation, along_cols, "col_deviation")}};
  call(args, p.on_cpu(), stream, flashcl::emulate_sweep, flashcl::launch_sweep);
}

void grad(const Problem& p, const Coefficients& row_weight, const Coefficients& row_lse,
          const Maybe<Floats>& row_offset, const Maybe<Coefficients>& col_weight, const Maybe<Coefficients>& col_lse,
          const Maybe<Floats>& col_offset, const G& g, const Maybe<Result>& g_rows, const Maybe<Result>& g_cols,
          const Maybe<Result>& scaled, const Maybe<Floats>& about, uintptr_t stream) {
  require(!p.block.triangular, "G is made of rectangles");
  const flashcl::GradArgs args{p.block, side(p, p.rows(), row_weight, row_lse, row_offset),
                               side(p, p.cols(), col_weight, col_lse, col_offset),
                               sums(p, g_rows, g_cols, {}, scaled, about), output(p, g)};
  call(args, p.on_cpu(), stream, flashcl::emulate_grad, flashcl::launch_grad);
}

void sigmoid(const Problem& p, const Floats& weight, const Result& softplus, const G& g, const Maybe<Result>& g_rows,
             const Maybe<Result>& g_cols, const Maybe<Result>& scaled, uintptr_t stream) {
  require(!p.block.triangular && p.classes() == 1, "the sum of softplus has rectangles of one class");
  const flashcl::SigmoidArgs args{p.block, p.reader(weight, p.rows(), "weight"),
                                  sums(p, g_rows, g_cols, softplus, scaled, {}), output(p, g)};
  call(args, p.on_cpu(), stream, flashcl::emulate_sigmoid, flashcl::launch_sigmoid);
}

using Statistics = Tensor<float, 3>;

void fold(const Array<const float>& sums, const Statistics& out, bool first, bool last, uintptr_t stream) {
  require(sums.ndim() == 4 && sums.shape(0) == out.shape(0) && sums.shape(1) == 2 && out.shape(1) == 2,
          "sums must be (K, 2, T, n)");
  const bool even = out.shape(0) == 1 || out.stride(0) == 2 * out.stride(1);
  require(sums.shape(3) >= out.shape(2) && out.stride(2) == 1 && even, "out must be (K, 2, n)");
  require(sums.device_type() == out.device_type() && sums.device_id() == out.device_id(), "out is on another device");
  const flashcl::FoldArgs args{sums.data(),        out.data(),        int(out.shape(0)),
                               int(sums.shape(2)), int(out.shape(2)), int64_t(sums.shape(3)),
                               out.stride(1),      first,             last};
  if (args.n > 0)
    call(args, out.device_type() == nb::device::cpu::value, stream, flashcl::emulate_fold, flashcl::launch_fold);
}

// ---- rows ----

using Output = Tensor<void, 2>;

template <class Array>
flashcl::Rows rows(const Array& x, const char* name) {
  const auto code = nb::dlpack::dtype_code(x.dtype().code);
  const bool brain = code == nb::dlpack::dtype_code::Bfloat, floating = code == nb::dlpack::dtype_code::Float;
  const int bits = x.dtype().bits;
  require(bits == 16 && (brain || floating) || bits == 32 && floating,
          std::string(name) + " must be bfloat16, float16 or float32");
  require(x.stride(1) == 1 || x.shape(1) == 1, std::string(name) + " must have contiguous rows");
  require(x.shape(0) < 1u << 31 && x.shape(1) < 1u << 30, std::string(name) + " is too large");
  const int64_t stride = x.shape(0) > 1 ? x.stride(0) : int64_t(x.shape(1));
  const bool aligned = reinterpret_cast<uintptr_t>(x.data()) % 16 == 0 && stride * bits % 128 == 0;
  const auto type = brain ? flashcl::Type::BFLOAT16 : bits == 16 ? flashcl::Type::FLOAT16 : flashcl::Type::FLOAT32;
  return {const_cast<void*>(static_cast<const void*>(x.data())), stride, type, aligned};
}

// `shift` as a number of rows down, less than `size`.
int64_t wrapped(int64_t shift, int64_t size) { return size ? (shift % size + size) % size : 0; }

void partner_products(const Matrix& x, const Matrix& y, int64_t shift, const Array<double>& out, uintptr_t stream) {
  const int64_t N = x.shape(0), M = y.shape(0);
  const flashcl::PartnerArgs args{rows(x, "x"), rows(y, "y"), Reader{x.device_type(), x.device_id()}(out, N, "out"),
                                  N, M, wrapped(shift, M), int(x.shape(1))};
  require(args.x.type != flashcl::Type::FLOAT32 && x.dtype() == y.dtype(), "x and y must be both of one 16-bit type");
  require(x.shape(1) == y.shape(1) && (M > 0 || N == 0), "y must have the columns of x, and rows");
  require(y.device_type() == x.device_type() && y.device_id() == x.device_id(), "y is on another device");
  if (N > 0)
    call(args, x.device_type() == nb::device::cpu::value, stream, flashcl::emulate_partner_products,
         flashcl::launch_partner_products);
}

void finish(const Matrix& acc, const Maybe<Matrix>& other, const Maybe<Floats>& weight, int64_t shift,
            const Floats& scale, const Output& out, uintptr_t stream) {
  const Reader read{acc.device_type(), acc.device_id()};
  const int64_t R = acc.shape(0), C = other ? other->shape(0) : 0, n = weight ? weight->size() : 0;
  const flashcl::FinishArgs args{rows(acc, "acc"), other ? rows(*other, "other") : flashcl::Rows{}, rows(out, "out"),
                                 read(weight, n, "weight"), read(scale, 1, "scale"), R, C, n, wrapped(shift, C),
                                 int(acc.shape(1))};
  require(args.acc.type == flashcl::Type::FLOAT32, "acc must be float32");
  require(out.shape(0) == acc.shape(0) && out.shape(1) == acc.shape(1), "out must have the shape of acc");
  require(out.device_type() == acc.device_type() && out.device_id() == acc.device_id(), "out is on another device");
  require(!other == !weight && n <= R && (C > 0 || n == 0), "other comes with weights, of no more rows than acc has");
  if (other) {
    require(args.other.type != flashcl::Type::FLOAT32 && other->shape(1) == acc.shape(1),
            "other must be bfloat16 or float16, with the columns of acc");
    require(other->device_type() == acc.device_type() && other->device_id() == acc.device_id(),
            "other is on another device");
  }
  if (R > 0)
    call(args, acc.device_type() == nb::device::cpu::value, stream, flashcl::emulate_finish, flashcl::launch_finish);
}

// ---- for the tests ----

// The tiles (unit, rank, n, m, wanted) of a walk over n x m tiles, in order.
nb::list schedule(int tiles_n, int tiles_m, bool triangular) {
  const flashcl::Schedule s{tiles_n, tiles_m, triangular};
  nb::list out;
  for (int unit = 0; unit < s.units(); ++unit)
    for (int rank = 0; rank < flashcl::CLUSTER; ++rank) {
      const flashcl::Place tile = s.at(unit, rank);
      out.append(nb::make_tuple(unit, rank, tile.n, tile.m, s.wanted(tile)));
    }
  return out;
}

// (warp, lane, place, row, column) of every accumulator of a tile.
nb::list fragment() {
  using flashcl::Fragment;
  nb::list out;
  for (int thread = 0; thread < 128; ++thread)
    for (int r = 0; r < Fragment::ROWS; ++r)
      for (int chunk = 0; chunk < Fragment::CHUNKS; ++chunk)
        for (int q = 0; q < Fragment::COLS; ++q)
          out.append(nb::make_tuple(thread / 32, thread % 32, Fragment::place(r, chunk, q),
                                    Fragment::row(thread / 32, thread % 32, r), Fragment::col(thread % 32, chunk, q)));
  return out;
}

}  // namespace

NB_MODULE(_C, m) {
  m.doc() = "CUDA kernels of flashcl.";
  m.def("build_info", &build_info, "What this binary was built with: nvcc, architectures, compiler, nanobind, abi.");
  m.def(
      "resources", [] { return flashcl::resources; },
      "A line for each kernel: its mangled name, and what ptxas gave it.");
  m.def("device_count", &flashcl::device_count, "Number of GPUs; 0 without a GPU or a usable driver.");
  m.def("device_status", &flashcl::device_status, "Why device_count() is 0, as the CUDA runtime says it.");

  const auto none = nb::none();
  nb::class_<Problem>(m, "Block", "A block of logits (csrc/block.h). Holds pointers only: keep the tensors alive.")
      .def(
          "__init__",
          [](Problem* self, Matrix x, Matrix y, Floats logit_scale, Maybe<Floats> row_bias, Maybe<Floats> col_bias,
             Maybe<Ids> row_id, Maybe<Ids> col_id, Maybe<Ids> row_range, Maybe<Ids> col_range,
             Maybe<Ids> row_label, Maybe<Ids> col_label, bool triangular) {
            new (self) Problem(problem(x, y, logit_scale, row_bias, col_bias, row_id, col_id, row_range, col_range,
                                       row_label, col_label, triangular));
          },
          "x"_a, "y"_a, "logit_scale"_a, "row_bias"_a = none,
          "col_bias"_a = none, "row_id"_a = none, "col_id"_a = none,
          "row_range"_a = none, "col_range"_a = none, "row_label"_a = none,
          "col_label"_a = none, "triangular"_a = false);
  m.def("sweep", &sweep, "block"_a, "row_sums"_a, "row_center"_a = none,
        "row_deviation"_a = none, "col_sums"_a = none, "col_center"_a = none,
        "col_deviation"_a = none, "stream"_a = 0, "Statistics of the rows and columns of every tile.");
  m.def("grad", &grad, "block"_a, "row_weight"_a, "row_lse"_a,
        "row_offset"_a = none, "col_weight"_a = none, "col_lse"_a = none,
        "col_offset"_a = none, "g"_a = none,
        "g_rows"_a = none, "g_cols"_a = none, "scaled"_a = none,
        "about"_a = none, "stream"_a = 0, "G of a block and sums of it.");
  m.def("sigmoid", &sigmoid, "block"_a, "weight"_a, "softplus"_a, "g"_a = none,
        "g_rows"_a = none, "g_cols"_a = none,
        "scaled"_a = none, "stream"_a = 0, "Sums of softplus, G of a block and sums of it.");
  m.def("fold", &fold, "sums"_a, "out"_a, "first"_a = false, "last"_a = false, "stream"_a = 0,
        "Merges the statistics of tiles into out; the first ones are all that is in it, with the last ones it becomes "
        "the log-sum-exp as two floats, high and low.");
  m.def("partner_products", &partner_products, "x"_a, "y"_a, "shift"_a, "out"_a,
        "stream"_a = 0, "out_i = <x_i, y_j> with j = (i + shift) mod M, summed in float64.");
  m.def("finish", &finish, "acc"_a, "other"_a.none(), "weight"_a.none(), "shift"_a,
        "scale"_a, "out"_a, "stream"_a = 0,
        "out_i = scale (acc_i + weight_i other_j) with j = (i + shift) mod C; without a weight scale acc_i.");

  m.attr("TILE") = TILE;
  m.def("schedule", &schedule, "tiles_n"_a, "tiles_m"_a, "triangular"_a, "For tests: the walk over the tiles.");
  m.def("fragment", &fragment, "For tests: where every accumulator of a tile is.");
#if FLASHCL_SM90
  m.def(
      "shared_memory",
      [] {
        nb::dict out;
        out["sweep"] = flashcl::shared_memory_of_sweep(false);
        out["sweep by label"] = flashcl::shared_memory_of_sweep(true);
        out["grad"] = flashcl::shared_memory_of_grad(false);
        out["grad by label"] = flashcl::shared_memory_of_grad(true);
        out["sigmoid"] = flashcl::shared_memory_of_sigmoid();
        return out;
      },
      "For tests: bytes of shared memory of a CTA of each kernel.");
  m.def("fragment_is_right", &flashcl::fragment_is_right, "For tests: whether CuTe agrees with fragment().");
#endif
}
