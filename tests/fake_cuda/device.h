/* Which device the fake shows, and the record of what it was asked. */
#ifndef FAKE_CUDA_DEVICE_H
#define FAKE_CUDA_DEVICE_H

#include <stddef.h>

typedef struct Device {
    const char *name;
    int major, minor, processors;
    size_t shared_per_processor, shared_per_block;
    int threads_per_processor, cache_bytes, bus_bits, memory_khz;
} Device;

/* By FAKE_CUDA_CAPABILITY, such as 9.0; 8.0 where nothing is said. */
const Device *fake_device(void);

/* Adds a line to the record while it is kept; in the manner of printf. */
void fake_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Says why a call failed on the record and hands the code on. */
int fake_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* For the process that looks: keep a record from now on (it begins empty), or stop; and the record. */
void fake_record(int keep);
const char *fake_lines(void);

#endif
