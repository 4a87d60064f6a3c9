/* Kernels are registered by static initialisers that nvcc writes. A fat binary holds an image a device:
   cubins run on devices of their own major number and at least their minor one, PTX on all later ones.
   Layout of the headers: as cuobjdump shows them. */

#include "kernels.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 65536
#define WRAPPER 0x466243b1u
#define FAT_BINARY 0xba55ed50u
#define IS_PTX 1
#define IS_CUBIN 2

static Kernel *table[BUCKETS];

static uint32_t u32(const char *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t u64(const char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static unsigned long long bit(int capability) {
    /* 75 to 139 fit into a word. */
    return capability >= 75 && capability < 139 ? 1ull << (capability - 75) : 0;
}

Module *fake_module(const void *wrapper) {
    Module *module = calloc(1, sizeof *module);
    const char *data;
    if (u32(wrapper) != WRAPPER) return module;
    memcpy(&data, (const char *)wrapper + 8, sizeof data);
    if (u32(data) != FAT_BINARY) return module;
    uint16_t header;
    memcpy(&header, data + 6, sizeof header);
    const char *entry = data + header, *end = entry + u64(data + 8);
    while (entry + 32 <= end) {
        int kind = entry[0], capability = (int)u32(entry + 28);
        if (kind == IS_CUBIN) module->native |= bit(capability);
        if (kind == IS_PTX) module->virtual_ |= bit(capability);
        uint64_t step = u32(entry + 4) + u64(entry + 8);
        if (!step) break;
        entry += step;
    }
    return module;
}

static size_t bucket(const void *function) { return ((uintptr_t)function >> 4) % BUCKETS; }

void fake_register(Module *module, const void *function, const char *name) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    size_t place = bucket(function);
    kernel->function = function;
    kernel->name = strdup(name);
    kernel->module = module;
    kernel->dynamic_shared = 48 << 10;
    kernel->next = table[place];
    table[place] = kernel;
}

Kernel *fake_kernel(const void *function) {
    for (Kernel *kernel = table[bucket(function)]; kernel; kernel = kernel->next)
        if (kernel->function == function) return kernel;
    return NULL;
}

int fake_has_code(const Kernel *kernel, int major, int minor) {
    if (!kernel->module) return 1;
    for (int lower = 0; lower <= minor; ++lower)
        if (kernel->module->native & bit(10 * major + lower)) return 1;
    for (int capability = 75; capability <= 10 * major + minor; ++capability)
        if (kernel->module->virtual_ & bit(capability)) return 1;
    return 0;
}
