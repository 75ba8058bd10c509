// Launching of decode.
#include "decode_plan.h"

namespace aar::cuda {

int decode(const Decode& call, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  const DecodePlan plan = plan_for(call);
  const auto kernel = call.next_out != nullptr ? decode_kernel<true> : decode_kernel<false>;
  if (plan.shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(call.batch * plan.slices * plan.parts), kDecodeThreads, size_t(plan.shared), stream>>>(call, plan);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace aar::cuda
