/* Which device the stand-in shows, and the record of what it was asked. */
#ifndef STAND_IN_DEVICE_H
#define STAND_IN_DEVICE_H

#include <stddef.h>

typedef struct Device {
    const char *name;
    int major, minor, processors;
    size_t shared_per_processor, shared_per_block;
    int threads_per_processor, cache_bytes, bus_bits, memory_khz;
} Device;

/* By STAND_IN_CAPABILITY, such as 9.0; 8.0 where nothing is said. */
const Device *stand_in_device(void);

/* Adds a line to the record while it is kept; in the manner of printf. */
void stand_in_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Says why a call failed on the record and hands the code on. */
int stand_in_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* For the process that looks: keep a record from now on (it begins empty), or stop; and the record. */
void stand_in_record(int keep);
const char *stand_in_lines(void);

#endif
