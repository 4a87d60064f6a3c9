/* Streams that may be recording: what is asked of one is carried out at once, or becomes part of a graph. */
#ifndef FAKE_CUDA_STREAM_H
#define FAKE_CUDA_STREAM_H

#include <cuda_runtime_api.h>
#include <stddef.h>

typedef enum { KERNEL, COPY, FILL, CALL } Kind;

typedef struct Work {
    Kind kind;
    char *name;                                      /* KERNEL */
    void *target;                                    /* COPY, FILL: views of the host */
    const void *source;                              /* COPY */
    size_t width, height, target_pitch, source_pitch; /* COPY, FILL: rows */
    int value;                                       /* FILL */
    cudaHostFn_t call;                               /* CALL */
    void *data;
} Work;

/* Carries work out, or adds it to the graph that the stream records. */
cudaError_t fake_enqueue(cudaStream_t stream, Work work);

int fake_recording(cudaStream_t stream);

/* What may not be called while anything is recorded; spoils the recording and returns the error. */
cudaError_t fake_forbidden(const char *function);

/* Keeps an error for cudaGetLastError and returns it. */
cudaError_t fake_error(cudaError_t code);

#endif
