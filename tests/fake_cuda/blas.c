/* cuBLAS, cuBLASLt and cuRAND: products are written down and not computed. */

#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "memory.h"
#include "stream.h"

typedef struct {
    cudaStream_t stream;
    int mode;
    void *workspace;
} Handle;

/* What cuBLAS takes for itself (its documentation, "cublasSetWorkspace"). */
static size_t workspace(void) {
    const Device *device = fake_device();
    int mebibytes = device->major == 9 ? 32 : device->major >= 12 ? 12 : device->major >= 10 ? 32 : 4;
    return (size_t)mebibytes << 20;
}

int cublasCreate_v2(Handle **handle) {
    *handle = calloc(1, sizeof **handle);
    (*handle)->workspace = fake_take(workspace());
    fake_note("take %zu for cuBLAS", workspace());
    return (*handle)->workspace ? 0 : 3;
}

int cublasDestroy_v2(Handle *handle) {
    fake_give(handle->workspace);
    free(handle);
    return 0;
}

int cublasSetStream_v2(Handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return 0;
}

int cublasSetMathMode(Handle *handle, int mode) {
    handle->mode = mode;
    return 0;
}

int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = handle->mode;
    return 0;
}

const char *cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) {
    return status == 3 ? "the resource allocation failed" : status ? "failed" : "success";
}

#define PRODUCT(product)                                                                                  \
    int product(Handle *handle) {                                                                         \
        return (int)fake_enqueue(handle->stream, (Work){.kind = KERNEL, .name = (char *)#product});   \
    }
PRODUCT(cublasDgeam)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgetrfBatched)
PRODUCT(cublasDgetriBatched)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasScopy_v2)
PRODUCT(cublasSgeam)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgetrfBatched)
PRODUCT(cublasSgetriBatched)
PRODUCT(cublasSscal_v2)

#define MAKES(name)                 \
    int name(void **made) {         \
        *made = calloc(1, 256);     \
        return 0;                   \
    }
#define ENDS(name)                  \
    int name(void *made) {          \
        free(made);                 \
        return 0;                   \
    }
#define ACCEPTS(name) \
    int name(void) { return 0; }
MAKES(cublasLtCreate)
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatrixTransformDescCreate)
ENDS(cublasLtDestroy)
ENDS(cublasLtMatmulDescDestroy)
ENDS(cublasLtMatmulPreferenceDestroy)
ENDS(cublasLtMatrixLayoutDestroy)
ENDS(cublasLtMatrixTransformDescDestroy)
ACCEPTS(cublasLtMatmulAlgoConfigSetAttribute)
ACCEPTS(cublasLtMatmulAlgoInit)
ACCEPTS(cublasLtMatmulDescSetAttribute)
ACCEPTS(cublasLtMatmulPreferenceSetAttribute)
ACCEPTS(cublasLtMatrixLayoutSetAttribute)

/* An algorithm is 64 bytes, a heuristic result 96: algorithm, workspace, state, waves, reserved. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, void *results, int *found) {
    (void)handle, (void)what, (void)a, (void)b, (void)c, (void)d, (void)preference;
    if (asked > 0) memset(results, 0, 96);
    *found = asked > 0;
    return 0;
}

int cublasLtMatmul(void *handle, void *what, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *algorithm, void *workspace, size_t size, cudaStream_t stream) {
    (void)handle, (void)what, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout, (void)beta, (void)c;
    (void)c_layout, (void)d, (void)d_layout, (void)algorithm, (void)workspace, (void)size;
    return (int)fake_enqueue(stream, (Work){.kind = KERNEL, .name = (char *)"cublasLtMatmul"});
}

int cublasLtMatrixTransform(void *handle, void *what, const void *alpha, const void *a, void *a_layout,
                            const void *beta, const void *b, void *b_layout, void *c, void *c_layout,
                            cudaStream_t stream) {
    (void)handle, (void)what, (void)alpha, (void)a, (void)a_layout, (void)beta, (void)b, (void)b_layout, (void)c;
    (void)c_layout;
    return (int)fake_enqueue(stream, (Work){.kind = KERNEL, .name = (char *)"cublasLtMatrixTransform"});
}
