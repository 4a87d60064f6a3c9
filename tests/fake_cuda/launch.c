/* Registering and launching kernels. Nothing is computed: code and sizes of a launch are checked, and
   it is written down. */

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "kernels.h"
#include "memory.h"
#include "stream.h"

typedef struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} Configuration;

static __thread Configuration pushed[8];
static __thread int depth;

void **__cudaRegisterFatBinary(void *wrapper) { return (void **)fake_module(wrapper); }
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit,
                            void *thread, void *block, void *block_size, void *grid_size, int *warp) {
    (void)device, (void)limit, (void)thread, (void)block, (void)block_size, (void)grid_size, (void)warp;
    fake_register((Module *)handle, host, name);
}

void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int external, size_t size,
                       int constant, int global) {
    (void)handle, (void)host, (void)address, (void)name, (void)external, (void)size, (void)constant;
    (void)global;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    if (depth == 8) abort();
    pushed[depth++] = (Configuration){grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!depth) return fake_error(cudaErrorInvalidConfiguration);
    Configuration found = pushed[--depth];
    *grid = found.grid;
    *block = found.block;
    *shared = found.shared;
    *(void **)stream = found.stream;
    return cudaSuccess;
}

static int too_large(const Kernel *kernel, dim3 grid, dim3 block, size_t shared) {
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) return 1;
    if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return 1;
    return shared > kernel->dynamic_shared;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const Device *device = fake_device();
    Kernel *kernel = fake_kernel(function);
    if (!kernel) {
        fake_note("no kernel at %p", function);
        return fake_error(cudaErrorInvalidDeviceFunction);
    }
    if (!fake_has_code(kernel, device->major, device->minor)) {
        fake_note("no code for %d.%d: %s", device->major, device->minor, kernel->name);
        return fake_error(cudaErrorNoKernelImageForDevice);
    }
    if (too_large(kernel, grid, block, shared)) {
        fake_note("refused grid %u %u %u block %u %u %u shared %zu of %zu: %s", grid.x, grid.y, grid.z,
                      block.x, block.y, block.z, shared, kernel->dynamic_shared, kernel->name);
        return fake_error(cudaErrorInvalidConfiguration);
    }
    return fake_enqueue(stream, (Work){.kind = KERNEL, .name = kernel->name});
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared, cudaStream_t stream) {
    (void)arguments;
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *function, void **arguments) {
    (void)arguments;
    return launch(function, how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream);
}

/* A handle of a kernel is the address that it was registered under. */
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    (void)arguments;
    return launch((const void *)kernel, grid, block, shared, stream);
}

/* Libraries of kernels that are loaded at run time; each name gets a kernel of its own. */
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *options,
                                void **values, unsigned int count, enum cudaLibraryOption *more,
                                void **more_values, unsigned int more_count) {
    (void)code, (void)options, (void)values, (void)count, (void)more, (void)more_values, (void)more_count;
    *library = malloc(1);
    return cudaSuccess;
}

cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
    free(library);
    return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    (void)library;
    static Module anything;
    void *address = calloc(1, 16);
    anything.native = ~0ull;
    fake_register(&anything, address, name);
    *kernel = address;
    return cudaSuccess;
}

static cudaError_t allow(Kernel *kernel, enum cudaFuncAttribute attribute, int value) {
    if (!kernel) return fake_error(cudaErrorInvalidDeviceFunction);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > fake_device()->shared_per_block) {
        fake_note("refused shared memory of %d: %s", value, kernel->name);
        return fake_error(cudaErrorInvalidValue);
    }
    kernel->dynamic_shared = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
    return allow(fake_kernel(function), attribute, value);
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
    (void)device;
    return allow(fake_kernel((const void *)kernel), attribute, value);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    const Device *device = fake_device();
    Kernel *kernel = fake_kernel(function);
    memset(attributes, 0, sizeof *attributes);
    if (!kernel) return fake_error(cudaErrorInvalidDeviceFunction);
    if (!fake_has_code(kernel, device->major, device->minor))
        return fake_error(cudaErrorNoKernelImageForDevice);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 64;
    attributes->ptxVersion = attributes->binaryVersion = 10 * device->major + device->minor;
    attributes->maxDynamicSharedSizeBytes = (int)kernel->dynamic_shared;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function,
                                                                   int block_size, size_t shared,
                                                                   unsigned int flags) {
    (void)function, (void)flags;
    const Device *device = fake_device();
    int most = block_size > 0 ? device->threads_per_processor / block_size : 0;
    int by_shared = shared ? (int)(device->shared_per_processor / shared) : most;
    *blocks = by_shared < most ? by_shared : most;
    if (*blocks > 32) *blocks = 32;
    return cudaSuccess;
}
