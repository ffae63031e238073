// CUDA's runtime without a GPU: memory, copies, streams and events are real, in host memory; kernels do nothing.
//
// Preloaded (LD_PRELOAD) before the real runtime, it lets torch's CUDA code run to its end. Every call is counted, by the
// device that was current in the calling thread; a callback may look at those whose place in the program matters.
#include "null_gpu.h"

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

using Error = cudaError_t;
constexpr int MOST_DEVICES = 8;
static std::atomic<long> counts[KINDS][MOST_DEVICES];
static thread_local int current = 0;
static void (*observer)(int what, long bytes) = nullptr;

static int devices() {
    const char *given = getenv("NULL_GPU_DEVICES");
    return given ? atoi(given) : 1;
}

// ---- what the tests ask (by ctypes)

extern "C" {
int null_gpu_kinds() { return KINDS; }
const char *null_gpu_name(int what) {
    static const char *names[] = {
#define X(name) #name,
        COUNTED(X)
#undef X
    };
    return names[what];
}
long null_gpu_counted(int what, int device) { return counts[what][device]; }
int null_gpu_current() { return current; }
void null_gpu_observe(void (*callback)(int, long)) { observer = callback; }
void null_gpu_count(int what, size_t bytes) {
    counts[what][current]++;
    if (observer) observer(what, (long)bytes);
}
}

// ---- memory: one large reservation each for the GPU and for pinned host memory, given out front to back; what is freed
// is given out again to the next of its size, as a real driver does sooner or later

struct Region {
    char *begin, *end, *next;
    std::mutex lock;
    std::unordered_map<void *, size_t> sizes;
    std::unordered_multimap<size_t, void *> free;

    explicit Region(size_t size) {
        void *found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) {
            perror("null GPU: no address space");
            abort();
        }
        begin = next = (char *)found;
        end = begin + size;
    }
    void *take(size_t size) {
        std::lock_guard<std::mutex> held(lock);
        size = (size + 4095) / 4096 * 4096;
        void *place = next;
        auto again = free.find(size);
        if (again != free.end()) {
            place = again->second;
            free.erase(again);
        } else {
            next += size;
        }
        sizes[place] = size;
        return place;
    }
    void give(void *place) {
        std::lock_guard<std::mutex> held(lock);
        auto known = sizes.find(place);
        if (known == sizes.end()) return;
        madvise(place, known->second, MADV_DONTNEED);
        free.emplace(known->second, place);
        sizes.erase(known);
    }
    bool holds(const void *place) const { return place >= begin && place < end; }
};

static Region &gpu_memory() {
    static Region region(1ull << 40);
    return region;
}
static Region &pinned_memory() {
    static Region region(1ull << 36);
    return region;
}

static Error copy(void *to, const void *from, size_t size, bool blocking) {
    bool to_gpu = gpu_memory().holds(to), from_gpu = gpu_memory().holds(from);
    if (to_gpu && from_gpu)
        null_gpu_count(copy_on_gpu, size);
    else if (to_gpu)
        null_gpu_count(pinned_memory().holds(from) ? copy_to_gpu : copy_to_gpu_pageable, size);
    else if (from_gpu)
        null_gpu_count(pinned_memory().holds(to) ? copy_to_host : copy_to_host_pageable, size);
    if (blocking) null_gpu_count(copy_blocking, size);
    memmove(to, from, size);
    return cudaSuccess;
}

static double milliseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

static int nothing() { return 0; }

#define SUCCEEDS(name, ...)                                                                                    \
    Error name(__VA_ARGS__) { return cudaSuccess; }

extern "C" {
// ---- devices

Error cudaGetDeviceCount(int *count) { return *count = devices(), cudaSuccess; }
Error cudaGetDevice(int *device) { return *device = current, cudaSuccess; }
Error cudaSetDevice(int device) { return current = device, cudaSuccess; }
Error cudaDriverGetVersion(int *version) { return *version = 13020, cudaSuccess; }
Error cudaRuntimeGetVersion(int *version) { return *version = 13020, cudaSuccess; }
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
const char *cudaGetErrorString(Error) { return "null GPU"; }
const char *cudaGetErrorName(Error) { return "null GPU"; }

// An H100's.
Error cudaGetDeviceProperties(cudaDeviceProp *of, int) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "Null GPU");
    of->major = 9;
    of->multiProcessorCount = 132;
    of->totalGlobalMem = 80ull << 30;
    of->warpSize = 32;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxThreadsPerMultiProcessor = 2048;
    of->maxBlocksPerMultiProcessor = 32;
    of->sharedMemPerBlock = 48 << 10;
    of->sharedMemPerBlockOptin = 227 << 10;
    of->sharedMemPerMultiprocessor = 228 << 10;
    of->regsPerBlock = of->regsPerMultiprocessor = 64 << 10;
    of->maxGridSize[0] = of->memPitch = 2147483647;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->l2CacheSize = 50 << 20;
    of->textureAlignment = 512;
    of->asyncEngineCount = 3;
    of->concurrentKernels = of->unifiedAddressing = of->canMapHostMemory = 1;
    return cudaSuccess;
}
Error cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch ((int)attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
Error cudaDeviceGetPCIBusId(char *id, int size, int device) {
    return snprintf(id, size, "0000:%02x:00.0", device), cudaSuccess;
}
Error cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 1, cudaSuccess; }
SUCCEEDS(cudaDeviceEnablePeerAccess, int, unsigned)
Error cudaDeviceSynchronize() { return null_gpu_count(wait_device, 0), cudaSuccess; }

// ---- memory

Error cudaMemGetInfo(size_t *left, size_t *total) {
    return *left = 78ull << 30, *total = 80ull << 30, cudaSuccess;
}
Error cudaMalloc(void **place, size_t size) {
    null_gpu_count(allocation, size);
    return *place = gpu_memory().take(size), cudaSuccess;
}
Error cudaFree(void *place) { return gpu_memory().give(place), cudaSuccess; }
Error cudaMallocAsync(void **place, size_t size, cudaStream_t) { return cudaMalloc(place, size); }
Error cudaFreeAsync(void *place, cudaStream_t) { return cudaFree(place); }
Error cudaHostAlloc(void **place, size_t size, unsigned) {
    null_gpu_count(pinned_allocation, size);
    return *place = pinned_memory().take(size), cudaSuccess;
}
Error cudaMallocHost(void **place, size_t size) { return cudaHostAlloc(place, size, 0); }
Error cudaFreeHost(void *place) { return pinned_memory().give(place), cudaSuccess; }
Error cudaPointerGetAttributes(cudaPointerAttributes *of, const void *place) {
    memset(of, 0, sizeof *of);
    of->type = gpu_memory().holds(place)      ? cudaMemoryTypeDevice
               : pinned_memory().holds(place) ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
    of->devicePointer = of->hostPointer = (void *)place;
    return cudaSuccess;
}
Error cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) { return copy(to, from, size, true); }
Error cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t) {
    return copy(to, from, size, false);
}
Error cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t) {
    return copy(to, from, size, false);
}
Error cudaMemset(void *, int, size_t size) { return null_gpu_count(::memset_, size), cudaSuccess; }
Error cudaMemsetAsync(void *, int, size_t size, cudaStream_t) { return null_gpu_count(::memset_, size), cudaSuccess; }
SUCCEEDS(cudaMemcpyToSymbol, const void *, const void *, size_t, size_t, cudaMemcpyKind)
Error cudaGetSymbolAddress(void **place, const void *) { return *place = gpu_memory().begin, cudaSuccess; }
Error cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) { return *pool = (cudaMemPool_t)8, cudaSuccess; }
Error cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) { return *(long *)value = 0, cudaSuccess; }
SUCCEEDS(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void *)

// ---- streams and events

Error cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    static std::atomic<long> next{0x1000};
    null_gpu_count(::stream, 0);
    return *stream = (cudaStream_t)(next += 16), cudaSuccess;
}
Error cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return cudaStreamCreateWithPriority(stream, 0, 0); }
Error cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
SUCCEEDS(cudaStreamDestroy, cudaStream_t)
SUCCEEDS(cudaStreamQuery, cudaStream_t)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
Error cudaStreamSynchronize(cudaStream_t) { return null_gpu_count(wait_stream, 0), cudaSuccess; }
Error cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
Error cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                               const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}
Error cudaStreamGetPriority(cudaStream_t, int *priority) { return *priority = 0, cudaSuccess; }
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode *)

Error cudaEventCreateWithFlags(cudaEvent_t *made, unsigned) {
    null_gpu_count(::event, 0);
    return *made = (cudaEvent_t) new double(0), cudaSuccess;
}
Error cudaEventCreate(cudaEvent_t *made) { return cudaEventCreateWithFlags(made, 0); }
Error cudaEventDestroy(cudaEvent_t gone) { return delete (double *)gone, cudaSuccess; }
Error cudaEventRecord(cudaEvent_t at, cudaStream_t) { return *(double *)at = milliseconds(), cudaSuccess; }
Error cudaEventRecordWithFlags(cudaEvent_t at, cudaStream_t, unsigned) { return cudaEventRecord(at, nullptr); }
SUCCEEDS(cudaEventQuery, cudaEvent_t)
Error cudaEventSynchronize(cudaEvent_t) { return null_gpu_count(wait_event, 0), cudaSuccess; }
Error cudaEventElapsedTime(float *passed, cudaEvent_t from, cudaEvent_t to) {
    return *passed = *(double *)to - *(double *)from, cudaSuccess;
}

// ---- kernels

Error cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t) {
    return null_gpu_count(launch, 0), cudaSuccess;
}
Error cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *, void **) {
    return null_gpu_count(launch, 0), cudaSuccess;
}
Error __cudaGetKernel(cudaKernel_t *kernel, const void *function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
Error __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) {
    return null_gpu_count(launch, 0), cudaSuccess;
}
Error cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 32;
    of->binaryVersion = of->ptxVersion = 90;
    return cudaSuccess;
}
SUCCEEDS(cudaFuncSetAttribute, const void *, cudaFuncAttribute, int)
Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    return *blocks = 4, cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t, unsigned) {
    return *blocks = 4, cudaSuccess;
}
Error cudaGetDriverEntryPointByVersion(const char *, void **function, unsigned, unsigned long long,
                                       cudaDriverEntryPointQueryResult *result) {
    if (result) *result = cudaDriverEntryPointSuccess;
    return *function = (void *)nothing, cudaSuccess;
}
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
}
