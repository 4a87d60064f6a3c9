/* libcuda and libnvidia-ml: the driver's own libraries, as far as they are asked. */

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "device.h"
#include "memory.h"

int cuTensorMapEncodeTiled(void *map) {
    memset(map, 0, 128);
    return 0;
}

typedef struct {
    unsigned long long total, free, used;
} Memory;

typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
} Process;

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 1;
    return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)1;
    return index ? 2 : 0;
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    return snprintf(text, size, "fake") < 0;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    (void)handle;
    return snprintf(text, size, "%s", fake_device()->name) < 0;
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle;
    *major = fake_device()->major;
    *minor = fake_device()->minor;
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    (void)handle;
    memory->total = fake_total();
    memory->used = fake_used();
    memory->free = memory->total - memory->used;
    return 0;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *list) {
    (void)handle;
    if (fake_used() && *count) {
        memset(list, 0, sizeof *list);
        list->pid = (unsigned)getpid();
        list->used = fake_used();
        *count = 1;
    } else {
        *count = 0;
    }
    return 0;
}
