/* Devices, memory, copies and errors of libcudart. */

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "memory.h"
#include "stream.h"

#define VERSION 13000

static __thread cudaError_t last = cudaSuccess;

cudaError_t fake_error(cudaError_t code) {
    if (code) last = code;
    return code;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t code = last;
    last = cudaSuccess;
    return code;
}

cudaError_t cudaPeekAtLastError(void) { return last; }

const char *cudaGetErrorName(cudaError_t code) {
    return code == cudaSuccess ? "cudaSuccess" : code == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
                                                                                  : "cudaError";
}

const char *cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        default: return "an error of the fake";
    }
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device) return fake_error(cudaErrorInvalidDevice);
    fake_need_context();
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int number) {
    if (number) return fake_error(cudaErrorInvalidDevice);
    const Device *device = fake_device();
    fake_need_context();
    memset(properties, 0, sizeof *properties);
    strncpy(properties->name, device->name, sizeof properties->name - 1);
    properties->totalGlobalMem = fake_total();
    properties->major = device->major;
    properties->minor = device->minor;
    properties->multiProcessorCount = device->processors;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = device->shared_per_block;
    properties->sharedMemPerMultiprocessor = device->shared_per_processor;
    properties->reservedSharedMemPerBlock = 1 << 10;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = device->threads_per_processor;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->totalConstMem = 64 << 10;
    properties->textureAlignment = 512;
    properties->l2CacheSize = device->cache_bytes;
    properties->persistingL2CacheMaxSize = device->cache_bytes * 3 / 4;
    properties->memoryBusWidth = device->bus_bits;
    properties->concurrentKernels = properties->unifiedAddressing = properties->managedMemory = 1;
    properties->memoryPoolsSupported = properties->cooperativeLaunch = properties->asyncEngineCount = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
    struct cudaDeviceProp all;
    cudaError_t error = cudaGetDeviceProperties(&all, number);
    if (error) return error;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = all.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = all.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = all.multiProcessorCount; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)all.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)all.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)all.sharedMemPerMultiprocessor; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)all.reservedSharedMemPerBlock; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = all.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = all.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = all.maxBlocksPerMultiProcessor; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = all.regsPerBlock; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = all.regsPerMultiprocessor; break;
        case cudaDevAttrMaxGridDimX: *value = all.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = all.maxGridSize[1]; break;
        case cudaDevAttrMaxGridDimZ: *value = all.maxGridSize[2]; break;
        case cudaDevAttrMaxBlockDimX: *value = all.maxThreadsDim[0]; break;
        case cudaDevAttrWarpSize: *value = all.warpSize; break;
        case cudaDevAttrL2CacheSize: *value = all.l2CacheSize; break;
        case cudaDevAttrMaxPersistingL2CacheSize: *value = all.persistingL2CacheMaxSize; break;
        case cudaDevAttrClockRate: *value = 1500000; break;
        case cudaDevAttrMemoryClockRate: *value = fake_device()->memory_khz; break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = all.memoryBusWidth; break;
        case cudaDevAttrMemoryPoolsSupported: *value = all.memoryPoolsSupported; break;
        case cudaDevAttrCooperativeLaunch: *value = all.cooperativeLaunch; break;
        case cudaDevAttrConcurrentManagedAccess: *value = 1; break;
        default: *value = 0; fake_note("attribute %d is answered with 0", (int)attribute);
    }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    fake_need_context();
    *total = fake_total();
    *free_bytes = *total - fake_used();
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    cudaError_t error = fake_forbidden("cudaMalloc");
    if (error) return error;
    *pointer = size ? fake_take(size) : NULL;
    fake_note("take %zu%s", size, size && !*pointer ? " refused" : "");
    return size && !*pointer ? fake_error(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    cudaError_t error = fake_forbidden("cudaFree");
    if (error || !pointer) return error;
    fake_note("give");
    return fake_give(pointer) ? cudaSuccess : fake_error(cudaErrorInvalidValue);
}

/* A pool is not told apart from plain allocations. */
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    (void)pool, (void)stream;
    return cudaMalloc(pointer, size);
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) {
    (void)stream;
    return cudaFree(pointer);
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
    (void)properties;
    *pool = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
    free(pool);
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    (void)pool, (void)attribute;
    memset(value, 0, sizeof(int));
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    (void)pool, (void)attribute, (void)value;
    return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t size) {
    (void)pool, (void)size;
    return cudaSuccess;
}

/* Pinned memory: remembered, since a recording takes no other memory of the host. */
typedef struct Pinned {
    char *start;
    size_t size;
    struct Pinned *next;
} Pinned;

static Pinned *pinned;
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned int flags) {
    (void)flags;
    cudaError_t error = fake_forbidden("cudaHostAlloc");
    if (error) return error;
    Pinned *one = malloc(sizeof *one);
    *pointer = one->start = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    one->size = size;
    pthread_mutex_lock(&pinned_lock);
    one->next = pinned;
    pinned = one;
    pthread_mutex_unlock(&pinned_lock);
    return *pointer || !size ? cudaSuccess : fake_error(cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void *pointer) {
    cudaError_t error = fake_forbidden("cudaFreeHost");
    if (error) return error;
    pthread_mutex_lock(&pinned_lock);
    Pinned **place = &pinned;
    while (*place && (*place)->start != pointer) place = &(*place)->next;
    Pinned *found = *place;
    if (found) *place = found->next;
    pthread_mutex_unlock(&pinned_lock);
    free(found);
    free(pointer);
    return cudaSuccess;
}

static int is_pinned(const void *pointer) {
    int found = 0;
    pthread_mutex_lock(&pinned_lock);
    for (Pinned *one = pinned; one && !found; one = one->next)
        found = (const char *)pointer >= one->start && (const char *)pointer < one->start + one->size;
    pthread_mutex_unlock(&pinned_lock);
    return found;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    int device = fake_is_device(pointer), host = !device && is_pinned(pointer);
    attributes->type = device ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = device || host ? 0 : -1;
    attributes->devicePointer = device || host ? (void *)pointer : NULL;
    attributes->hostPointer = host ? (void *)pointer : NULL;
    return cudaSuccess;
}

static const char *const kinds[] = {"host to host", "host to device", "device to host", "device to device"};

static size_t copy_limit(void) {
    const char *text = getenv("FAKE_CUDA_COPY_LIMIT");
    return text && *text ? (size_t)strtoull(text, NULL, 10) : (size_t)-1;
}

/* Fills work with what a copy does; addresses have to lie where the kind says. */
static cudaError_t plan_copy(Work *work, void *target, size_t target_pitch, const void *source,
                             size_t source_pitch, size_t width, size_t height, enum cudaMemcpyKind kind) {
    size_t target_size = height ? (height - 1) * target_pitch + width : 0;
    size_t source_size = height ? (height - 1) * source_pitch + width : 0;
    int from_device = fake_is_device(source), to_device = fake_is_device(target);
    if (kind == cudaMemcpyDefault) kind = (enum cudaMemcpyKind)(2 * from_device + to_device);
    int right = from_device == ((int)kind >> 1 & 1) && to_device == ((int)kind & 1);
    const void *from = from_device ? fake_host_view(source, source_size) : source;
    void *to = to_device ? fake_host_view(target, target_size) : target;
    if (width && height && (!right || !from || !to)) {
        fake_note("refused copy %s of %zu: %p to %p", kinds[kind], width * height, source, target);
        return fake_error(cudaErrorInvalidValue);
    }
    int pageable = (!from_device && !is_pinned(source)) || (!to_device && !is_pinned(target));
    fake_note("copy %s %zu%s", kinds[kind], width * height, pageable ? " pageable" : "");
    *work = (Work){.kind = COPY, .target = to, .source = from, .width = width, .height = height,
                   .target_pitch = target_pitch, .source_pitch = source_pitch, .value = pageable};
    if (width * height > copy_limit()) work->height = 0;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    Work work;
    cudaError_t error = plan_copy(&work, target, size, source, size, size, 1, kind);
    if (!error) error = fake_enqueue(NULL, work);
    return error;
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    Work work;
    cudaError_t error = plan_copy(&work, target, target_pitch, source, source_pitch, width, height, kind);
    if (error) return error;
    if (work.value && fake_recording(stream)) return fake_forbidden("a copy of pageable memory");
    return fake_enqueue(stream, work);
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream);
}

cudaError_t cudaMemcpyFromSymbol(void *target, const void *symbol, size_t size, size_t offset,
                                 enum cudaMemcpyKind kind) {
    (void)symbol, (void)offset, (void)kind;
    memset(target, 0, size);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
    void *view = fake_host_view(pointer, size);
    if (!view && size) {
        fake_note("refused fill of %zu at %p", size, pointer);
        return fake_error(cudaErrorInvalidValue);
    }
    fake_note("fill %zu", size);
    return fake_enqueue(stream, (Work){.kind = FILL, .target = view, .value = value, .width = size,
                                           .height = size <= copy_limit(), .target_pitch = size});
}

cudaError_t cudaMemset(void *pointer, int value, size_t size) {
    return cudaMemsetAsync(pointer, value, size, NULL);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    (void)version, (void)flags;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = driver ? dlsym(driver, symbol) : NULL;
    if (status)
        *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (!*function) fake_note("the driver has no %s", symbol);
    return cudaSuccess;
}
