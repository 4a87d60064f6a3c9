/* Device memory: a range of addresses that the host cannot read, and a view of it that it can.

   A CUDA program that reads a device pointer on the host ends with a segmentation fault, and so does
   one that runs on this. Sizes are rounded as a driver rounds them: large allocations to 2 MiB, small
   ones packed into pages of 2 MiB. */

#define _GNU_SOURCE
#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE ((size_t)2 << 20)
#define GRAIN ((size_t)512)
#define DEFAULT_TOTAL ((size_t)80 << 30)

typedef struct Block {
    size_t start, size; /* offsets from the begin of the range */
    size_t asked;       /* of the size, what may be touched */
    int taken, small;
    struct Block *next;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char *range, *view;
static size_t total, context_bytes, used, peak;
static int has_context;
static Block *blocks;

static size_t from_environment(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? (size_t)strtoull(text, NULL, 10) : otherwise;
}

static void reserve(void) {
    total = from_environment("FAKE_CUDA_MEMORY", DEFAULT_TOTAL) / PAGE * PAGE;
    context_bytes = from_environment("FAKE_CUDA_CONTEXT", 0);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *both = mmap(NULL, 2 * total + PAGE, PROT_NONE, flags, -1, 0);
    if (both == MAP_FAILED) {
        perror("fake CUDA: no address range for device memory");
        abort();
    }
    range = (char *)(((uintptr_t)both + PAGE - 1) / PAGE * PAGE);
    view = range + total;
    if (mprotect(view, total, PROT_READ | PROT_WRITE)) {
        perror("fake CUDA: no view of device memory");
        abort();
    }
    blocks = calloc(1, sizeof *blocks);
    blocks->size = total;
}

static void count(size_t more) {
    used += more;
    if (used > peak) peak = used;
}

void fake_need_context(void) {
    pthread_once(&once, reserve);
    pthread_mutex_lock(&lock);
    if (!has_context) {
        has_context = 1;
        count(context_bytes);
    }
    pthread_mutex_unlock(&lock);
}

static Block *split(Block *block, size_t size) {
    if (block->size > size) {
        Block *rest = calloc(1, sizeof *rest);
        rest->start = block->start + size;
        rest->size = block->size - size;
        rest->next = block->next;
        rest->small = block->small;
        block->next = rest;
        block->size = size;
    }
    return block;
}

/* First fit; small ones look into pages of small ones first. */
static Block *find(size_t size, int small) {
    for (Block *block = blocks; block; block = block->next)
        if (!block->taken && block->small == small && block->size >= size) return block;
    return NULL;
}

void *fake_take(size_t size) {
    fake_need_context();
    int small = size < PAGE / 2;
    size_t unit = small ? GRAIN : PAGE;
    size_t asked = size;
    size = size ? (size + unit - 1) / unit * unit : unit;
    pthread_mutex_lock(&lock);
    Block *block = find(size, small);
    if (small && !block && used + PAGE <= total && (block = find(PAGE, 0))) {
        split(block, PAGE)->small = 1;
        count(PAGE);
    }
    if (!small && block && used + size > total) block = NULL;
    if (block) {
        split(block, size)->taken = 1;
        block->asked = asked;
        if (!small) count(size);
    }
    pthread_mutex_unlock(&lock);
    return block ? range + block->start : NULL;
}

static void join(Block *block) {
    while (block->next && !block->next->taken && block->next->small == block->small) {
        Block *next = block->next;
        /* Pages of small allocations stay apart: each is given back alone. */
        if (block->small && next->start % PAGE == 0) return;
        block->size += next->size;
        block->next = next->next;
        free(next);
    }
}

int fake_give(void *pointer) {
    if (!fake_is_device(pointer)) return 0;
    size_t start = (size_t)((char *)pointer - range);
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next) {
        if (block->start != start || !block->taken) continue;
        block->taken = 0;
        found = 1;
        if (!block->small) {
            used -= block->size;
            madvise(view + block->start, block->size, MADV_DONTNEED);
        }
        break;
    }
    for (Block *block = found ? blocks : NULL; block; block = block->next) {
        if (block->taken) continue;
        join(block);
        if (block->small && block->size == PAGE) {
            block->small = 0;
            used -= PAGE;
            madvise(view + block->start, PAGE, MADV_DONTNEED);
        }
    }
    /* A page that has just become free may lie between free neighbours. */
    for (Block *block = found ? blocks : NULL; block; block = block->next)
        if (!block->taken) join(block);
    pthread_mutex_unlock(&lock);
    return found;
}

int fake_is_device(const void *pointer) {
    return range && (const char *)pointer >= range && (const char *)pointer < range + total;
}

void *fake_host_view(const void *pointer, size_t size) {
    if (!fake_is_device(pointer)) return NULL;
    size_t start = (size_t)((const char *)pointer - range);
    void *found = NULL;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block && block->start <= start; block = block->next)
        if (block->taken && start + size <= block->start + block->asked) found = view + start;
    pthread_mutex_unlock(&lock);
    return found;
}

size_t fake_used(void) { return used; }
size_t fake_peak(void) { return peak; }
size_t fake_total(void) {
    pthread_once(&once, reserve);
    return total;
}
void fake_reset_peak(void) { peak = used; }
