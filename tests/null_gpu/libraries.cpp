// cuBLAS, cuDNN (its version 7 interface: TORCH_CUDNN_V8_API_DISABLED=1) and NCCL without a GPU: they succeed, count
// themselves and compute nothing. Arguments that are not looked at are left out: C's calling convention allows it.
#include "null_gpu.h"

#include <cstdlib>
#include <cstring>

#define SUCCEEDS(name)                                                                                         \
    int name() { return 0; }
#define COUNTS(name, what)                                                                                     \
    int name() { return null_gpu_count(what, 0), 0; }
#define MAKES(name)                                                                                            \
    int name(void **made) { return *made = calloc(1, 4096), 0; }
#define UNMAKES(name)                                                                                          \
    int name(void *made) { return free(made), 0; }
#define NEEDS_NO_WORKSPACE(name, ...)                                                                          \
    int name(__VA_ARGS__, size_t *size) { return *size = 0, 0; }

typedef void *Any;

extern "C" {
// ---- cuBLAS

MAKES(cublasCreate_v2)
UNMAKES(cublasDestroy_v2)
int cublasGetMathMode(Any, int *mode) { return *mode = 0, 0; }
int cublasGetPointerMode_v2(Any, int *mode) { return *mode = 0, 0; }
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetSmCountTarget)
COUNTS(cublasSgemm_v2, gemm)
COUNTS(cublasSgemm_v2_64, gemm)
COUNTS(cublasDgemm_v2, gemm)
COUNTS(cublasGemmEx, gemm)
COUNTS(cublasGemmEx_64, gemm)
COUNTS(cublasSgemmEx, gemm)
COUNTS(cublasGemmStridedBatchedEx, gemm)
COUNTS(cublasSgemmStridedBatched, gemm)
COUNTS(cublasDgemmStridedBatched, gemm)
COUNTS(cublasSgemv_v2, gemm)
COUNTS(cublasDgemv_v2, gemm)
COUNTS(cublasSdot_v2, gemm)
COUNTS(cublasDdot_v2, gemm)
COUNTS(cublasDotEx, gemm)
COUNTS(cublasLtMatmul, gemm)
size_t cublasLtGetVersion() { return 130400; }
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)
UNMAKES(cublasLtMatmulDescDestroy)
UNMAKES(cublasLtMatrixLayoutDestroy)
UNMAKES(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit)
SUCCEEDS(cublasLtMatmulAlgoCheck)
int cublasLtMatmulAlgoGetHeuristic(Any, Any, Any, Any, Any, Any, Any, int, char *results, int *count) {
    return memset(results, 0, 96), *count = 1, 0; // sizeof(cublasLtMatmulHeuristicResult_t)
}

// ---- cuDNN

MAKES(cudnnCreate)
UNMAKES(cudnnDestroy)
SUCCEEDS(cudnnSetStream)
int cudnnGetStream(Any, void **stream) { return *stream = nullptr, 0; }
const char *cudnnGetErrorString(int) { return "null GPU"; }
#define DESCRIPTOR(name) MAKES(cudnnCreate##name##Descriptor) UNMAKES(cudnnDestroy##name##Descriptor)
DESCRIPTOR(Tensor)
DESCRIPTOR(Filter)
DESCRIPTOR(Convolution)
DESCRIPTOR(Activation)
DESCRIPTOR(Dropout)
SUCCEEDS(cudnnSetTensorNdDescriptor)
SUCCEEDS(cudnnSetFilterNdDescriptor)
SUCCEEDS(cudnnSetConvolutionNdDescriptor)
SUCCEEDS(cudnnSetConvolutionGroupCount)
SUCCEEDS(cudnnSetConvolutionMathType)
SUCCEEDS(cudnnSetActivationDescriptor)

struct Algorithm { // cudnnConvolutionFwdAlgoPerf_t and its like
    int algorithm, status;
    float time;
    size_t memory;
    int determinism, math, reserved[3];
};
static int first_algorithm(int *count, Algorithm *found) {
    *found = Algorithm{1, 0, 1.0f, 0, 1, 0, {}};
    return *count = 1, 0;
}
#define CONVOLUTION(name)                                                                                      \
    int cudnnGetConvolution##name##Algorithm_v7(Any, Any, Any, Any, Any, int, int *count, Algorithm *found) {   \
        return first_algorithm(count, found);                                                                  \
    }                                                                                                          \
    int cudnnFindConvolution##name##AlgorithmEx(Any, Any, Any, Any, Any, Any, Any, Any, int, int *count,        \
                                                Algorithm *found, Any, size_t) {                               \
        return null_gpu_count(convolution, 0), first_algorithm(count, found);                                  \
    }                                                                                                          \
    NEEDS_NO_WORKSPACE(cudnnGetConvolution##name##WorkspaceSize, Any, Any, Any, Any, Any, int)                  \
    COUNTS(cudnnConvolution##name, convolution)
CONVOLUTION(Forward)
CONVOLUTION(BackwardData)
CONVOLUTION(BackwardFilter)
COUNTS(cudnnConvolutionBiasActivationForward, convolution)
NEEDS_NO_WORKSPACE(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, Any, int, int, Any, Any, Any, Any, Any)
NEEDS_NO_WORKSPACE(cudnnGetBatchNormalizationTrainingExReserveSpaceSize, Any, int, int, Any, Any)
NEEDS_NO_WORKSPACE(cudnnGetBatchNormalizationBackwardExWorkspaceSize, Any, int, int, Any, Any, Any, Any, Any, Any, Any)
COUNTS(cudnnBatchNormalizationForwardTrainingEx, batch_norm)
COUNTS(cudnnBatchNormalizationForwardInference, batch_norm)
COUNTS(cudnnBatchNormalizationBackwardEx, batch_norm)

// ---- NCCL: each rank alone, as if all others had the same data

static int ranks() { return atoi(getenv("WORLD_SIZE") ? getenv("WORLD_SIZE") : "1"); }
static size_t bytes_of(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; // ncclDataType_t
    return sizes[type];
}
struct Id {
    char bytes[128];
};
int ncclGetVersion(int *version) { return *version = 23007, 0; }
int ncclGetUniqueId(Id *id) { return memset(id, 1, sizeof *id), 0; }
const char *ncclGetErrorString(int) { return "null GPU"; }
const char *ncclGetLastError(Any) { return "null GPU"; }
MAKES(ncclCommInitRank)
MAKES(ncclCommInitRankConfig)
MAKES(ncclCommInitRankScalable)
MAKES(ncclCommInitAll)
int ncclCommSplit(Any, int, int, void **made, Any) { return *made = calloc(1, 4096), 0; }
int ncclCommGetAsyncError(Any, int *error) { return *error = 0, 0; }
int ncclCommCount(Any, int *count) { return *count = ranks(), 0; }
int ncclCommUserRank(Any, int *rank) { return *rank = atoi(getenv("RANK") ? getenv("RANK") : "0"), 0; }
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclCommRegister)
SUCCEEDS(ncclCommDeregister)
SUCCEEDS(ncclCommMemStats)
SUCCEEDS(ncclGroupStart)
SUCCEEDS(ncclGroupEnd)
SUCCEEDS(ncclGroupSimulateEnd)
int ncclMemAlloc(void **, size_t) { return 3; } // not supported
SUCCEEDS(ncclMemFree)
int ncclAllReduce(const void *from, void *to, size_t count, int type) {
    if (from != to) memmove(to, from, count * bytes_of(type));
    return null_gpu_count(collective, count * bytes_of(type)), 0;
}
int ncclBroadcast(const void *from, void *to, size_t count, int type) { return ncclAllReduce(from, to, count, type); }
int ncclAllGather(const void *from, void *to, size_t count, int type) {
    size_t size = count * bytes_of(type);
    for (int rank = 0; rank < ranks(); rank++) memmove((char *)to + rank * size, from, size);
    return null_gpu_count(collective, size), 0;
}
COUNTS(ncclBcast, collective)
COUNTS(ncclReduceScatter, collective)
COUNTS(ncclReduce, collective)
COUNTS(ncclSend, collective)
COUNTS(ncclRecv, collective)
}
