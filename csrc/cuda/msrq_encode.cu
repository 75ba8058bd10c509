// Launching of encode: how a batch is spread over the multiprocessors.
#include <cstring>

#include "encode_plan.h"

namespace aar::cuda {
namespace {

using Kernel = void (*)(Encode, EncodePlan);

Kernel kernel_of(const Encode& call) {
  const int width = padded_dim(call.tables.dim);
  return width == 32 ? encode_kernel<32, 2> : width == 64 ? encode_kernel<64, 2> : encode_kernel<128, 1>;
}

struct Device {
  int processors = 0, shared = 0;
  bool clusters = false;
};

cudaError_t describe(int id, const Encode& call, Device* device) {
  cudaError_t error = cudaSuccess;
  const auto get = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, id);
  };
  get(&device->processors, cudaDevAttrMultiProcessorCount);
  get(&device->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // The code that runs may have been compiled for an older GPU than this one, and then knows no clusters.
  cudaFuncAttributes attributes = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel_of(call));
  device->clusters = attributes.ptxVersion >= 90;
  return error;
}

cudaError_t configure(const Encode& call, const EncodePlan& plan, cudaLaunchConfig_t& config,
                      cudaLaunchAttribute& attribute, cudaStream_t stream) {
  const Kernel kernel = kernel_of(call);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
  if (error == cudaSuccess && plan.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  config = {};
  config.gridDim = dim3(unsigned(plan.clusters * plan.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return error;
}

cudaError_t make_plan(const Encode& call, int id, EncodePlan* plan) {
  Device device;
  cudaError_t error = describe(id, call, &device);
  if (error != cudaSuccess) return error;
  *plan = plan_for(call, device.processors, device.shared, device.clusters ? 16 : 1, kChunk);
  if (plan->shared > device.shared) return cudaErrorInvalidConfiguration;
  // A cluster lies within one group of multiprocessors, and not all groups have room for 16 blocks.
  while (plan->cluster > 1) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute attribute;
    int most = 0;
    error = configure(call, *plan, config, attribute, nullptr);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveClusters(&most, kernel_of(call), &config);
    if (error == cudaSuccess && most >= plan->clusters) break;
    cudaGetLastError();  // a refusal must not be reported by whatever the caller calls next
    *plan = plan_for(call, device.processors, device.shared, plan->cluster / 2, kChunk);
  }
  return cudaSuccess;
}

}  // namespace

int plan_encode(const Encode& call, EncodePlan* plan) {
  // Asking the driver takes longer than a small launch, and calls come in runs of one shape.
  struct Key {
    int device, batch, length, dim, codes, taps, scales;
    Scale scale[kMaxScales];
  };
  thread_local Key last_key = {};
  thread_local EncodePlan last_plan = {};
  Key key = {};
  cudaError_t error = cudaGetDevice(&key.device);
  if (error != cudaSuccess) return error;
  key = {key.device, call.batch, call.length, call.tables.dim, call.tables.codes, call.tables.taps, call.scales, {}};
  std::memcpy(key.scale, call.scale, sizeof(Scale) * size_t(call.scales));
  if (std::memcmp(&key, &last_key, sizeof key) != 0) {
    error = make_plan(call, key.device, &last_plan);
    if (error != cudaSuccess) return error;
    last_key = key;
  }
  *plan = last_plan;
  return cudaSuccess;
}

int encode(const Encode& call, const EncodePlan& plan, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attribute;
  const cudaError_t error = configure(call, plan, config, attribute, stream);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel_of(call), call, plan);
}

}  // namespace aar::cuda
