"""Several devices: how a model is spread over them and what each one then holds.

The engine is vLLM, at int8 and int4 with a GPTQ checkpoint of the model: tensor parallelism cuts
every layer, pipeline parallelism the stack of layers. Sizes are of ONE device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llava_edge.profiles.memory.buffers import kv_cache_bytes
from llava_edge.profiles.memory.constants import Constants, memory_constants
from llava_edge.profiles.memory.formats import PER_CHANNEL, group_size
from llava_edge.profiles.memory.terms import MemoryTerms, Workload
from llava_edge.profiles.models.model_dims import ModelDims, TextDims
from llava_edge.profiles.models.parameters import (
    decoder_matrices,
    decoder_vectors,
    head_parameters,
    projector_parameters,
    vision_parameters,
)

_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Parallelism:
    """Devices in each direction; their product is the number of devices used."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_devices(self) -> int:
        """Devices used."""
        return self.tensor * self.pipeline

    @property
    def engine(self) -> str:
        """Name of the engine in a plan; ``parse`` reads it."""
        return f"vllm tensor_parallel={self.tensor} pipeline_parallel={self.pipeline}"

    @classmethod
    def parse(cls, engine: str) -> Parallelism | None:
        """Parallelism in a plan's engine name; None where the engine runs on one device."""
        words = engine.split()
        if len(words) != 3 or words[0] != "vllm":
            return None
        values = dict(word.partition("=")[::2] for word in words[1:])
        return cls(int(values["tensor_parallel"]), int(values["pipeline_parallel"]))


def parallelisms(text: TextDims, precision: str, num_devices: int) -> Iterator[Parallelism]:
    """Ways to spread a model, fewest devices first, tensor before pipeline parallelism.

    A tensor-parallel degree divides the query heads, fits the key and value heads, and cuts the
    MLP between groups; powers of two only, as servers are wired.
    """
    group = 1
    if precision != "fp16":
        group = max(1, group_size(text, precision, "cuda"))
    used = 2
    while used <= num_devices:
        tensor = used
        while tensor >= 1:
            pipeline = used // tensor
            heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
            even = heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
            cut = text.intermediate_size % (tensor * group) == 0
            if even and cut and pipeline <= text.num_hidden_layers:
                yield Parallelism(tensor, pipeline)
            tensor //= 2
        used *= 2


def device_terms(
    dims: ModelDims,
    precision: str,
    workload: Workload,
    parallel: Parallelism,
    constants: Mapping[str, Constants] | None = None,
) -> MemoryTerms:
    """Terms of the device that holds most; the tower is counted in full on each."""
    groups = memory_constants() if constants is None else constants
    c = groups["distributed"]
    text, vision = dims.text, dims.vision
    share = parallel.tensor
    # The longest stage of an uneven pipeline.
    stage = -(-text.num_hidden_layers // parallel.pipeline)
    layers = text.num_hidden_layers
    body = _body_bytes(text, precision) * stage // layers
    # A key or value head is never cut: more devices than heads hold copies.
    kv_share = min(share, text.num_key_value_heads)
    cache = kv_cache_bytes(text, workload.context_tokens, workload.cache or "float16")
    hidden = text.hidden_size
    widest = 2 * hidden + 4 * text.intermediate_size // share
    terms = MemoryTerms(
        decoder_weights=-(-body // share),
        lm_head=-(-2 * head_parameters(text) // share),
        embeddings=-(-2 * head_parameters(text) // share),
        vision_tower=2 * vision_parameters(vision, vision.num_blocks_used),
        projector=2 * projector_parameters(dims),
        kv_cache=-(-cache * stage // layers // kv_share),
        image_features=2 * workload.num_tiles * vision.num_patches * hidden,
        prefill_activations=int(workload.chunk_tokens * widest * 2 * c["activation_factor"]),
        logits=4 * text.vocab_size,
        engine_workspace=c.bytes("engine_workspace"),
        driver_context=groups["cuda"].bytes("driver_context"),
    )
    return terms.with_slack(c.bytes("slack"), c["slack_share"])


def _body_bytes(text: TextDims, precision: str) -> int:
    """The decoder as vLLM holds it: fp16, or GPTQ with packed zero points and fp16 scales."""
    matrices = decoder_matrices(text)
    vectors = 2 * decoder_vectors(text)
    if precision == "fp16":
        return vectors + sum(2 * m.parameters for m in matrices)
    bits, group = _BITS[precision], group_size(text, precision, "cuda")
    total = vectors
    for m in matrices:
        groups = 1 if group == PER_CHANNEL else -(-m.columns // group)
        scales = m.rows * m.count * groups
        total += (
            m.parameters * bits // 8 + 2 * scales + scales * bits // 8 + 4 * m.columns * m.count
        )
    return total
