// In the place of csrc/emulate.cpp: tensors on the CPU go through the launches, and so through the PTX of the kernels.
#include <stdexcept>

#include "device.h"
#include "kernels.h"

namespace flashcl {

extern const char* const resources;
const char* const resources = "";  // setup.py has ptxas's report here

namespace {

template <class Args>
void run(const Args& args, int (*launch)(const Args&, void*)) {
  if (const int error = launch(args, nullptr)) throw std::runtime_error(error_text(error));
}

}  // namespace

void emulate_sweep(const SweepArgs& args) { run(args, launch_sweep); }
void emulate_grad(const GradArgs& args) { run(args, launch_grad); }
void emulate_sigmoid(const SigmoidArgs& args) { run(args, launch_sigmoid); }
void emulate_fold(const FoldArgs& args) { run(args, launch_fold); }
void emulate_partner_products(const PartnerArgs& args) { run(args, launch_partner_products); }
void emulate_finish(const FinishArgs& args) { run(args, launch_finish); }

}  // namespace flashcl
