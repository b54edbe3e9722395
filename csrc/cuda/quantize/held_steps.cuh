// Observe, update, choose and fake-quantize in one kernel whose blocks of threads wait for each other: what depends on the
// whole tensor is known when all of them have looked at their part, which they keep meanwhile, so that memory is read once.
// Tensors that do not fit into all multiprocessors together go the other ways.
#pragma once

#include "cuda/quantize/held_columns.cuh"
#include "cuda/quantize/held_nvfp4.cuh"

namespace coreai::cuda {

// No multiprocessor has room for more threads.
constexpr int64_t kMostHeldBlocks = 2048 / kThreads;

// The single kernel that does a step: its blocks of threads, 0 if there is none.
struct HeldPlan {
  enum class Kind { kTensor, kColumns, kNVFP4 } kind;
  int64_t blocks;
  bool waits;         // whether they wait for each other, and so must be there at the same time
  int64_t workspace;  // numbers
};

// body(kernel, make): the kernel of a kind, and what makes its job of the workspace.
template <class Body>
void with_held_kernel(const cpu::FakeQuantize& job, const AfterRange& after, HeldPlan::Kind held, Body body) {
  with_16_or_32_bits(job.element, [&](auto element) {
    constexpr Element kElement = decltype(element)::value;
    const auto tiles = [&](float* workspace) { return held_tensor_job<kElement>(job, after, workspace); };
    if (held == HeldPlan::Kind::kNVFP4) return body(&step_of_held_nvfp4<kElement>, tiles);
    with_kind(job.affine.format, job.affine.offset != nullptr, [&](auto kind) {
      using K = decltype(kind);
      if (held == HeldPlan::Kind::kTensor) {
        body(&step_of_held_tensor<K, kElement>, tiles);
      } else {
        body(&step_of_held_columns<K, kElement>,
             [&](float* workspace) { return held_columns_job<kElement>(job, after, workspace); });
      }
    });
  });
}

// `way`: how the step would be done else. `device`: the current one, of so many multiprocessors.
template <class = void>
HeldPlan plan_held(const cpu::FakeQuantize& job, const AfterRange& after, StepWay way, bool aligned, int32_t device,
                   int64_t multiprocessors) {
  const cpu::Geometry& g = *job.geometry;
  HeldPlan plan = {.kind = HeldPlan::Kind::kTensor, .blocks = 0, .waits = true, .workspace = 0};
  with_16_or_32_bits(job.element, [&](auto element) {
    constexpr Element kElement = decltype(element)::value;
    const bool is_of_16 = way == StepWay::kOneByOne && aligned && g.numel <= kMostInRuns && is_nvfp4(job, after.rule);
    if (way == StepWay::kTensor || is_of_16) {
      if (is_of_16) plan.kind = HeldPlan::Kind::kNVFP4;
      plan.blocks = blocks_that_hold(held_tiles<kElement>(job), multiprocessors);
      plan.waits = plan.blocks > 1;
      plan.workspace = 2 * plan.blocks;
    } else if (way == StepWay::kOneByOne && aligned && is_by_columns(g) && g.numel <= kMostInRuns &&
               after.rule.scale_format != ScaleFormat::kE4M3) {
      const auto columns = plan_held_columns<kElement>(g);
      if (columns.chunk < 2 * (kThreads >> columns.shift)) return;  // what columns take, too few rows would share
      plan.kind = HeldPlan::Kind::kColumns;
      plan.blocks = columns.tiles * columns.parts * columns.groups;
      plan.waits = columns.parts > 1;
      plan.workspace = plan.waits ? 2 * columns.parts * g.blocks : 0;
    }
  });
  if (plan.blocks == 0 || !plan.waits) return plan;
  int64_t room = 0;
  if (plan.blocks <= kMostHeldBlocks * multiprocessors) {
    with_held_kernel(job, after, plan.kind,
                     [&](auto* kernel, auto) { room = blocks_at_once(kernel, kThreads, device) * multiprocessors; });
  }
  if (plan.blocks > room) plan.blocks = 0;
  return plan;
}

// Queues the kernel of a plan that has one. Whether it could be: else nothing was done.
template <class Stream>
bool queue_held(const cpu::FakeQuantize& job, const AfterRange& after, const HeldPlan& plan, float* workspace,
                Stream stream) {
  bool queued = true;
  with_held_kernel(job, after, plan.kind, [&](auto* kernel, auto make) {
    if (plan.waits) {
      queued = launch_at_once(kernel, plan.blocks, kThreads, stream, make(workspace));
    } else {
      COREAI_LAUNCH(kernel, plan.blocks, kThreads, stream, make(workspace));
    }
  });
  return queued;
}

}  // namespace coreai::cuda
