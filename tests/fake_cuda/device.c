/* Devices by compute capability, and the record. Figures are NVIDIA's, of CUDA's programming guide. */

#include "device.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIB 1024

static const Device devices[] = {
    {"Fake A100", 8, 0, 108, 164 * KIB, 163 * KIB, 2048, 40 << 20, 5120, 1215000},
    {"Fake T4", 7, 5, 40, 64 * KIB, 64 * KIB, 1024, 4 << 20, 256, 5001000},
    {"Fake RTX 3090", 8, 6, 82, 100 * KIB, 99 * KIB, 1536, 6 << 20, 384, 9751000},
    {"Fake RTX 4090", 8, 9, 128, 100 * KIB, 99 * KIB, 1536, 72 << 20, 384, 10501000},
    {"Fake H200", 9, 0, 132, 228 * KIB, 227 * KIB, 2048, 50 << 20, 6144, 3201000},
    {"Fake RTX 5090", 12, 0, 170, 100 * KIB, 99 * KIB, 1536, 96 << 20, 512, 14001000},
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *lines;
static size_t held, room;
static int keeps;

const Device *fake_device(void) {
    static const Device *chosen;
    if (chosen) return chosen;
    const char *asked = getenv("FAKE_CUDA_CAPABILITY");
    chosen = devices;
    for (size_t i = 0; asked && i < sizeof devices / sizeof *devices; ++i) {
        char text[16];
        snprintf(text, sizeof text, "%d.%d", devices[i].major, devices[i].minor);
        if (!strcmp(text, asked)) return chosen = devices + i;
    }
    if (asked && *asked && strcmp(asked, "8.0")) {
        fprintf(stderr, "fake CUDA: no device of compute capability %s\n", asked);
        abort();
    }
    return chosen;
}

static void add(const char *format, va_list arguments) {
    char text[4096];
    int length = vsnprintf(text, sizeof text - 1, format, arguments);
    if (length < 0) return;
    if ((size_t)length > sizeof text - 2) length = sizeof text - 2;
    text[length++] = '\n';
    pthread_mutex_lock(&lock);
    if (keeps) {
        if (held + (size_t)length + 1 > room) {
            room = 2 * room + (size_t)length + 4096;
            lines = realloc(lines, room);
        }
        memcpy(lines + held, text, (size_t)length);
        held += (size_t)length;
        lines[held] = 0;
    }
    pthread_mutex_unlock(&lock);
}

void fake_note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
}

int fake_fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    add(format, arguments);
    va_end(arguments);
    return code;
}

void fake_record(int keep) {
    pthread_mutex_lock(&lock);
    keeps = keep;
    if (keep) {
        held = 0;
        if (lines) *lines = 0;
    }
    pthread_mutex_unlock(&lock);
}

const char *fake_lines(void) { return lines ? lines : ""; }
