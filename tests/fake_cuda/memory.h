/* Device memory of the fake, shared by its files. */
#ifndef FAKE_CUDA_MEMORY_H
#define FAKE_CUDA_MEMORY_H

#include <stddef.h>

/* What a device pointer stands for on the host; NULL where [pointer, pointer + size) is not within
   one allocation. The pointer itself cannot be read: its pages are not accessible. */
void *fake_host_view(const void *pointer, size_t size);

/* Whether a pointer lies in the device's address range. */
int fake_is_device(const void *pointer);

/* An allocation of at least size bytes, NULL where the device has no room left. */
void *fake_take(size_t size);

/* Gives an allocation back; 0 where it is none. */
int fake_give(void *pointer);

/* Bytes in use now, at most since the last reset, and of the whole device; the context is counted. */
size_t fake_used(void);
size_t fake_peak(void);
size_t fake_total(void);
void fake_reset_peak(void);

/* The context is created by the first call that needs one, as the driver does it. */
void fake_need_context(void);

#endif
