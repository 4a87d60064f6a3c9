/* Streams, events, and graphs recorded from streams (CUDA's programming guide, "Stream Capture").

   Everything is done when it is asked for, so streams are always idle. A recording is told apart: what
   waits, allocates, or copies without a stream is refused while one is made, as in CUDA's global mode. */

#include "stream.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device.h"
#include "memory.h"

struct CUgraph_st {
    Work *work;
    size_t count, room;
};

struct CUgraphExec_st {
    struct CUgraph_st graph;
};

struct CUstream_st {
    struct CUgraph_st *graph; /* of the recording that it takes part in */
    int origin, spoilt;
    struct CUstream_st *next;
};

struct CUevent_st {
    struct timespec time;
    struct CUgraph_st *graph;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct CUstream_st *streams;
static int recordings;

static int is_stream(cudaStream_t stream) {
    return stream && stream != cudaStreamLegacy && stream != cudaStreamPerThread;
}

int fake_recording(cudaStream_t stream) { return is_stream(stream) && stream->graph; }

static void spoil(void) {
    for (struct CUstream_st *stream = streams; stream; stream = stream->next)
        if (stream->graph) stream->spoilt = 1;
}

cudaError_t fake_forbidden(const char *function) {
    if (!recordings) return cudaSuccess;
    spoil();
    fake_note("refused while recording: %s", function);
    return fake_error(cudaErrorStreamCaptureUnsupported);
}

static void carry_out(const Work *work) {
    if (work->kind == KERNEL) fake_note("kernel %s", work->name);
    if (work->kind == CALL) work->call(work->data);
    for (size_t row = 0; work->kind == COPY && row < work->height; ++row)
        memmove((char *)work->target + row * work->target_pitch,
                (const char *)work->source + row * work->source_pitch, work->width);
    for (size_t row = 0; work->kind == FILL && row < work->height; ++row)
        memset((char *)work->target + row * work->target_pitch, work->value, work->width);
}

cudaError_t fake_enqueue(cudaStream_t stream, Work work) {
    if (!is_stream(stream)) {
        cudaError_t error = fake_forbidden("work on the legacy stream");
        if (error) return error;
    }
    if (!fake_recording(stream)) {
        carry_out(&work);
        return cudaSuccess;
    }
    struct CUgraph_st *graph = stream->graph;
    pthread_mutex_lock(&lock);
    if (graph->count == graph->room) {
        graph->room = 2 * graph->room + 64;
        graph->work = realloc(graph->work, graph->room * sizeof(Work));
    }
    if (work.name) work.name = strdup(work.name);
    graph->work[graph->count++] = work;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags) {
    (void)flags;
    cudaError_t error = fake_forbidden("cudaStreamCreateWithFlags");
    if (error) return error;
    fake_need_context();
    pthread_mutex_lock(&lock);
    *stream = calloc(1, sizeof **stream);
    (*stream)->next = streams;
    streams = *stream;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    struct CUstream_st **place = &streams;
    while (*place && *place != stream) place = &(*place)->next;
    int found = *place != NULL;
    if (found) {
        *place = stream->next;
        free(stream);
    }
    pthread_mutex_unlock(&lock);
    return found ? cudaSuccess : fake_error(cudaErrorInvalidResourceHandle);
}

static cudaError_t wait_for(cudaStream_t stream, const char *function) {
    if (!fake_recording(stream)) return cudaSuccess;
    spoil();
    fake_note("refused while recording: %s", function);
    return fake_error(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    fake_note("wait stream");
    return wait_for(stream, "cudaStreamSynchronize");
}

cudaError_t cudaDeviceSynchronize(void) {
    fake_note("wait device");
    return fake_forbidden("cudaDeviceSynchronize");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
    (void)flags;
    /* Waiting for what is recorded takes part in the recording. */
    if (event->graph && is_stream(stream) && !stream->graph) stream->graph = event->graph;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    if (fake_recording(stream))
        *status = stream->spoilt ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)mode; /* the strictest is what is checked */
    if (!is_stream(stream) || stream->graph) return fake_error(cudaErrorIllegalState);
    stream->graph = calloc(1, sizeof *stream->graph);
    stream->origin = 1;
    stream->spoilt = 0;
    recordings++;
    fake_note("recording begins");
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = NULL;
    if (!fake_recording(stream) || !stream->origin) return fake_error(cudaErrorIllegalState);
    struct CUgraph_st *made = stream->graph;
    int spoilt = stream->spoilt;
    for (struct CUstream_st *one = streams; one; one = one->next)
        if (one->graph == made) one->graph = NULL, one->origin = one->spoilt = 0;
    recordings--;
    fake_note("recording ends, %zu parts%s", made->count, spoilt ? ", spoilt" : "");
    if (spoilt) return fake_error(cudaErrorStreamCaptureInvalidated);
    *graph = made;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    struct CUgraphExec_st *made = calloc(1, sizeof *made);
    made->graph.count = made->graph.room = graph->count;
    made->graph.work = malloc(graph->count * sizeof(Work) + 1);
    memcpy(made->graph.work, graph->work, graph->count * sizeof(Work));
    for (size_t i = 0; i < graph->count; ++i)
        if (made->graph.work[i].name) made->graph.work[i].name = strdup(made->graph.work[i].name);
    *exec = made;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (fake_recording(stream)) return fake_forbidden("cudaGraphLaunch");
    fake_note("graph of %zu parts", exec->graph.count);
    for (size_t i = 0; i < exec->graph.count; ++i) carry_out(exec->graph.work + i);
    return cudaSuccess;
}

static void empty(struct CUgraph_st *graph) {
    for (size_t i = 0; i < graph->count; ++i) free(graph->work[i].name);
    free(graph->work);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    empty(graph);
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    empty(&exec->graph);
    free(exec);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags) {
    (void)flags;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    event->graph = is_stream(stream) ? stream->graph : NULL;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    fake_note("wait event");
    if (!event->graph) return cudaSuccess;
    spoil();
    return fake_error(cudaErrorCapturedEvent);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    double seconds = difftime(end->time.tv_sec, start->time.tv_sec);
    *milliseconds = (float)(1e3 * seconds + 1e-6 * (double)(end->time.tv_nsec - start->time.tv_nsec));
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) {
    return fake_enqueue(stream, (Work){.kind = CALL, .call = call, .data = data});
}
