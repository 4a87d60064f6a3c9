/* Kernels that a library registered: their names and the devices they were compiled for. */
#ifndef FAKE_CUDA_KERNELS_H
#define FAKE_CUDA_KERNELS_H

#include <stddef.h>

typedef struct Module {
    unsigned long long native, virtual_; /* bits by major and minor, see kernels.c */
} Module;

typedef struct Kernel {
    const void *function;
    char *name;
    Module *module;
    size_t dynamic_shared; /* the most that was asked for so far */
    struct Kernel *next;
} Kernel;

Module *fake_module(const void *wrapper);
void fake_register(Module *module, const void *function, const char *name);
Kernel *fake_kernel(const void *function);

/* Whether the driver would find code for the device. */
int fake_has_code(const Kernel *kernel, int major, int minor);

#endif
