// The kernels, as plain functions: one set for a GPU (0 or a cudaError_t; work is queued on `stream`) and one for the
// CPU, which does to tiles of a CPU product what the GPU does to tiles of its own, lane by lane, for the tests.
#pragma once

#include "fold.h"
#include "grad.h"
#include "rows.h"
#include "sigmoid.h"
#include "sweep.h"

namespace flashcl {

#if FLASHCL_SM90
int launch_sweep(const SweepArgs& args, void* stream);
int launch_grad(const GradArgs& args, void* stream);
int launch_sigmoid(const SigmoidArgs& args, void* stream);
// For the tests: bytes of shared memory of a CTA, and whether tile.h's Fragment agrees with CuTe.
int shared_memory_of_sweep(bool by_label);
int shared_memory_of_grad(bool by_label);
int shared_memory_of_sigmoid();
bool fragment_is_right();
#else
constexpr int NOT_BUILT = 209;  // cudaErrorNoKernelImageForDevice
inline int launch_sweep(const SweepArgs&, void*) { return NOT_BUILT; }
inline int launch_grad(const GradArgs&, void*) { return NOT_BUILT; }
inline int launch_sigmoid(const SigmoidArgs&, void*) { return NOT_BUILT; }
#endif
int launch_fold(const FoldArgs& args, void* stream);
int launch_partner_products(const PartnerArgs& args, void* stream);
int launch_finish(const FinishArgs& args, void* stream);

void emulate_sweep(const SweepArgs& args);
void emulate_grad(const GradArgs& args);
void emulate_sigmoid(const SigmoidArgs& args);
void emulate_fold(const FoldArgs& args);
void emulate_partner_products(const PartnerArgs& args);
void emulate_finish(const FinishArgs& args);

}  // namespace flashcl
