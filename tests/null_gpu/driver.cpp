// libcuda.so.1, the driver: torch looks its functions up by name when it starts, Triton when it launches a kernel.
#include <cstddef>

extern "C" void null_gpu_count(int what, size_t bytes) __attribute__((weak)); // of the preloaded runtime

#define SUCCEEDS(name)                                                                                         \
    int name() { return 0; }
#define MAKES(name)                                                                                            \
    int name(void **made) { return *made = (void *)16, 0; }
#define LAUNCHES(name)                                                                                         \
    int name() { return null_gpu_count ? null_gpu_count(0, 0) : void(), 0; }

extern "C" {
int cuDriverGetVersion(int *version) { return *version = 13020, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) { // as runtime.cpp has them, by CUdevice_attribute
    switch (attribute) {
    case 1: *value = 1024; break;        // threads of a block
    case 8: *value = 48 << 10; break;    // shared memory of a block
    case 10: *value = 32; break;         // warp
    case 12: *value = 64 << 10; break;   // registers of a block
    case 13: *value = 1755000; break;    // clock, kHz
    case 16: *value = 132; break;        // multiprocessors
    case 36: *value = 2619000; break;    // memory clock, kHz
    case 37: *value = 5120; break;       // memory bus, bits
    case 39: *value = 2048; break;       // threads of a multiprocessor
    case 75: *value = 9; break;          // compute capability
    case 97: *value = 227 << 10; break;  // shared memory of a block that asks for it
    default: *value = 0;
    }
    return 0;
}
int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuGetErrorName(int, const char **text) { return *text = "null GPU", 0; }
int cuGetErrorString(int, const char **text) { return *text = "null GPU", 0; }
int cuFuncGetAttribute(int *value, int attribute, void *) { return *value = attribute ? 0 : 1024, 0; }
int cuPointerGetAttribute(void *value, int, size_t place) { return *(size_t *)value = place, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count) { return *count = 2, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) { return *count = 2, 0; }
int cuOccupancyMaxActiveClusters(int *count) { return *count = 2, 0; }
MAKES(cuCtxGetCurrent)
MAKES(cuDevicePrimaryCtxRetain)
MAKES(cuLibraryLoadData)
MAKES(cuLibraryGetKernel)
MAKES(cuLibraryGetModule)
MAKES(cuKernelGetFunction)
MAKES(cuModuleLoad)
MAKES(cuModuleLoadData)
MAKES(cuModuleLoadDataEx)
MAKES(cuModuleGetFunction)
LAUNCHES(cuLaunchKernel)
LAUNCHES(cuLaunchKernelEx)
LAUNCHES(cuLaunchCooperativeKernel)
SUCCEEDS(cuCtxFromGreenCtx)
SUCCEEDS(cuCtxGetDevice)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxPopCurrent)
SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxPushCurrent)
SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuDevResourceGenerateDesc)
SUCCEEDS(cuDevSmResourceSplitByCount)
SUCCEEDS(cuDeviceGetDevResource)
SUCCEEDS(cuDeviceGetUuid)
SUCCEEDS(cuDevicePrimaryCtxRelease_v2)
SUCCEEDS(cuEventCreate)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuGreenCtxCreate)
SUCCEEDS(cuGreenCtxDestroy)
SUCCEEDS(cuGreenCtxStreamCreate)
SUCCEEDS(cuInit)
SUCCEEDS(cuKernelGetAttribute)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuLogsRegisterCallback)
SUCCEEDS(cuLogsUnregisterCallback)
SUCCEEDS(cuMemAddressFree)
SUCCEEDS(cuMemAddressReserve)
SUCCEEDS(cuMemAlloc_v2)
SUCCEEDS(cuMemCreate)
SUCCEEDS(cuMemExportToShareableHandle)
SUCCEEDS(cuMemFree_v2)
SUCCEEDS(cuMemGetAddressRange)
SUCCEEDS(cuMemGetAddressRange_v2)
SUCCEEDS(cuMemGetAllocationGranularity)
SUCCEEDS(cuMemGetAllocationPropertiesFromHandle)
SUCCEEDS(cuMemImportFromShareableHandle)
SUCCEEDS(cuMemMap)
SUCCEEDS(cuMemRelease)
SUCCEEDS(cuMemRetainAllocationHandle)
SUCCEEDS(cuMemSetAccess)
SUCCEEDS(cuMemUnmap)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuMulticastAddDevice)
SUCCEEDS(cuMulticastBindMem)
SUCCEEDS(cuMulticastCreate)
SUCCEEDS(cuMulticastUnbind)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuStreamGetCtx)
SUCCEEDS(cuStreamIsCapturing)
SUCCEEDS(cuStreamSynchronize)
SUCCEEDS(cuStreamWaitEvent)
SUCCEEDS(cuStreamWriteValue32)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuTensorMapEncodeTiled)
}
