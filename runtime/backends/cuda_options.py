"""CudaOptions: how ONNX Runtime is asked to run graphs on a GPU.

Nothing of it touches the CPU provider. Names are ONNX Runtime's own, of the CUDA provider's options
and of session keys that begin with ``ep.cuda.``; all stand in the released 1.31.1 build.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from llava_edge.runtime.util.validation import NamedOptions, require_count, require_flag, settle

NO_CAPTURE, CAPTURE = "-1", "1"
"""Values of the run option ``gpu_graph_id``: run as usual, or record once and replay from then."""


@dataclass(frozen=True)
class CudaOptions(NamedOptions):
    """Choices of which measurements on a GPU decide; the defaults are what needs no measurement.

    Attributes:
        graph: record a decode step as a CUDA graph and replay it.
        best_on_device: where the graph hands out its best logits, only they are copied to the
            host, and all logits only where the sampler needs them.
        features_on_device: features of a tower in ONNX Runtime stay on the device, as those of a
            TensorRT tower do; not for models of video, which pool frames.
        weight_only_gemm: ONNX Runtime's weight-only matrix products in place of dequantising; takes
            effect for 4 and 8 bits in blocks of 32.
        memory_limit_bytes: of the memory that each session takes for weights and activations; 0
            sets none. The KV cache and the context of the driver lie outside.
        exact_arena: memory grows by what is asked for; off, ONNX Runtime doubles it.
        warm_up: run the largest batch, chunk and steps when the artifact is loaded. It takes then
            what any request will, so that requests of any order stay within the plan; what does not
            fit is done in smaller parts (``LlavaEdge.degraded``). Kernels are there, and a decode
            step is recorded, before the first request.
    """

    graph: bool = False
    best_on_device: bool = True
    features_on_device: bool = False
    weight_only_gemm: bool = False
    memory_limit_bytes: int = 0
    exact_arena: bool = True
    warm_up: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "memory_limit_bytes":
                settle(self, memory_limit_bytes=require_count(field.name, value, 0))
            else:
                settle(self, **{field.name: require_flag(field.name, value)})

    def provider_options(self, *, captures: bool, gpu: int = 0) -> dict[str, str]:
        """Options of the CUDA provider for one session.

        Args:
            captures: whether runs of this session may be recorded.
            gpu: which one, as CUDA counts them.
        """
        options = {"device_id": str(gpu)} if gpu else {}
        if self.exact_arena:
            options["arena_extend_strategy"] = "kSameAsRequested"
        if self.memory_limit_bytes:
            options["gpu_mem_limit"] = str(self.memory_limit_bytes)
        if captures:
            options["enable_cuda_graph"] = "1"
        return options

    def session_entries(self, prompt_tokens: int) -> dict[str, str]:
        """Configuration entries for one session.

        Args:
            prompt_tokens: positions computed at once in prefill; kernels are tried out for them.
        """
        entries = {}
        if not self.memory_limit_bytes:
            # Weights are then taken in exact pieces, not through the arena, which alone is limited.
            entries["session.use_device_allocator_for_initializers"] = "1"
        if self.weight_only_gemm:
            entries["ep.cuda.fpa_intb_gemm"] = "1"
            entries["ep.cuda.fpa_intb_profile_m"] = f"1,{max(1, prompt_tokens)}"
        return entries
