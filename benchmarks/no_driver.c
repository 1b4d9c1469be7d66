/* What benchmarks/cross_export.py needs of CUDA's runtime and driver to compile for a GPU that is not
 * there: one H200, current, of which nobody ever asks more than what it is. */
#include <string.h>

#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = 65536;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  return cudaSuccess;
}

int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, 0;
}
/* Compiled packages are linked against these, and not run here. */
int cuFuncSetAttribute(void) { return 1; }
int cuGetErrorString(void) { return 1; }
int cuLaunchKernel(void) { return 1; }
int cuLaunchKernelEx(void) { return 1; }
int cuModuleGetFunction(void) { return 1; }
int cuModuleLoad(void) { return 1; }
int cuModuleLoadData(void) { return 1; }
int cuModuleUnload(void) { return 1; }
