"""ONNX Runtime's released CUDA provider and our graphs: placement, launches, copies, recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_edge.bench.lab.gpu.steps import CHOICES
from llava_edge.profiles.errors import EngineError
from llava_edge.profiles.memory.speed import steps_read_codes
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.decoder.decoder import Decoder
from tests.fake_cuda.record import FakeCuda, Record
from tests.runtime.backends.test_logits_to_keep import number_instead_of_start

pytestmark = pytest.mark.fake_cuda

CONTEXT, CAPACITY, CHUNK, PROMPT = 2048, 512, 64, 40
LAYERS, NUM_BEST = 3, 64
SIZES = {
    **{"backbone": "mistral", "hidden_size": 512, "heads": 4, "kv_heads": 1},
    **{"intermediate_size": 1024, "layers": LAYERS, "vocab_size": 2048},
}
"""Heads of 128, four to a head of keys and values, as in the Mistral of the released 7B."""

PRECISIONS = ("fp16", "int8", "int4")
IDS, ROW = 8 * NUM_BEST, 2 * 512


@pytest.fixture(scope="session")
def make(
    make_checkpoint: Callable[..., Path], make_artifact: Callable[..., Path]
) -> Callable[..., Artifact]:
    def made(precision: str, **wishes: object) -> Artifact:
        checkpoint = make_checkpoint("tiny", **SIZES)
        how = {"profile": "a100", "precision": precision, "context_tokens": CONTEXT, **wishes}
        return open_artifact(make_artifact(checkpoint, **how))

    return made


def session_of(artifact: Artifact, cache: str = "float16", **cuda: bool) -> Session:
    path = artifact.path(artifact.manifest.decoders[cache].file)
    return Session(path, SessionOptions(device="cuda", strict=True, cuda=CudaOptions(**cuda)))


def decoder_of(artifact: Artifact, cache: str = "float16", **cuda: bool) -> Decoder:
    text = artifact.manifest.model.text
    session = session_of(artifact, cache, **cuda)
    int8 = cache == "int8"
    return Decoder(session, text, CAPACITY, CHUNK, np.float16, NUM_BEST, int8_cache=int8)


def prefill(decoder: Decoder, tokens: int = PROMPT) -> None:
    decoder.prefill(tokens, lambda start, stop, out: out.fill(0))


def step(cuda: FakeCuda, decoder: Decoder) -> Record:
    with cuda.record() as record:
        decoder.step_best(np.zeros(decoder._hidden, np.float16))
    return record


def settled(cuda: FakeCuda, decoder: Decoder) -> Record:
    """A step as all later ones are: the first ones allocate and record."""
    prefill(decoder)
    for _ in range(3):
        record = step(cuda, decoder)
    return record


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_node_of_the_decoder_is_on_the_cpu(
    make: Callable[..., Artifact], precision: str
) -> None:
    session = session_of(make(precision))

    assert session.off_device == ()
    parts = session._session.get_provider_graph_assignment_info()
    assert {part.ep_name for part in parts} == {"CUDAExecutionProvider"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tower_computes_on_the_gpu(make: Callable[..., Artifact], precision: str) -> None:
    artifact = make(precision)
    path = artifact.path(artifact.manifest.vision.file)

    session = Session(path, SessionOptions(device="cuda", strict=True))

    assert session.off_device == ()


@pytest.mark.parametrize(
    ("precision", "product"),
    [
        ("fp16", "cublasGemmEx"),
        ("int8", "MatMulFloat8bKernelM1"),
        ("int4", "MatMulFloat4BitsKernelM1"),
    ],
)
def test_what_a_step_launches(
    cuda: FakeCuda, make: Callable[..., Artifact], precision: str, product: str
) -> None:
    kernels = settled(cuda, decoder_of(make(precision))).counted()

    # Packed queries, keys and values; output; gate, up and down. The head is one more, at 8 bits.
    head = 0 if precision == "int4" else 1
    assert kernels.pop(product) == 5 * LAYERS + head
    if precision == "int4":
        assert kernels.pop("MatMulFloat8bKernelM1") == 1
    # The fused norms, one a layer not, since nothing is added before the first.
    assert kernels.pop("SkipLayerNormKernelSmall") == 2 * LAYERS
    assert kernels.pop("cuApplyLayerNorm") == 1
    # SiLU is one kernel, its product with up another.
    assert kernels.pop("_UnaryElementWise") == LAYERS + 1
    assert kernels.pop("_BinaryElementWiseSimple") == LAYERS
    # XQA; rotary embedding and appending to the cache are one kernel.
    assert kernels.pop("kernel_mha") == LAYERS
    assert kernels.pop("UnpackRoPEAppend") == LAYERS
    assert kernels.pop("GetSequenceLengths") == LAYERS
    assert set(kernels) <= {"FindPartitionTopK", "CooperativeReduce", "WriteOutput", "RadixTopK"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_step_copies(cuda: FakeCuda, make: Callable[..., Artifact], precision: str) -> None:
    record = settled(cuda, decoder_of(make(precision)))

    # A row and a length go there, the best logits and their ids come back.
    assert sorted(record.copies("host to device")) == [4, ROW]
    assert sorted(record.copies("device to host")) == [IDS // 2, IDS]
    assert record.copies("device to device") == [ROW, ROW]
    assert record.taken() == []


@pytest.mark.parametrize("rows", [2, 5, 33])
def test_only_the_rows_of_a_draft_come_back(
    cuda: FakeCuda, make: Callable[..., Artifact], rows: int
) -> None:
    decoder = decoder_of(make("fp16"))
    prefill(decoder)
    for _ in range(2):
        decoder.rewind(PROMPT)
        with cuda.record() as record:
            decoder.verify_draft(np.zeros((rows, decoder._hidden), np.float16))

    assert record.copies("device to host") == [4 * rows * SIZES["vocab_size"]]
    assert record.taken() == []


def test_steps_take_flash_attention_where_they_are_told_to(
    cuda: FakeCuda, make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice "flash steps" of ``gpu-check``: ONNX Runtime looks when a session is opened."""
    (choice,) = CHOICES["flash steps"].values()
    for name, value in choice.items():
        monkeypatch.setenv(name, value)

    kernels = settled(cuda, decoder_of(make("fp16"))).counted()

    assert kernels["kernel_mha"] == kernels["UnpackRoPEAppend"] == 0
    assert sum(count for name, count in kernels.items() if "flash" in name) >= LAYERS


def test_a_step_with_an_int8_cache_reads_the_codes(
    cuda: FakeCuda, make: Callable[..., Artifact]
) -> None:
    kernels = settled(cuda, decoder_of(make("fp16", cache="int8"), "int8")).counted()

    assert kernels["kernel_mha"] == kernels["ScaleHeadsByChannelScaleKernel"] == LAYERS
    assert not any(name.startswith("Dequantize") for name in kernels)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 128), (4, 2, 128), (5, 1, 128), (7, 1, 128), (8, 1, 128), (4, 1, 64), (4, 1, 96)],
)
def test_the_speed_model_knows_which_heads_read_codes(
    cuda: FakeCuda,
    make_checkpoint: Callable[..., Path],
    make_artifact: Callable[..., Path],
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    sizes = {**SIZES, "heads": heads, "kv_heads": kv_heads, "hidden_size": heads * head_dim}
    checkpoint = make_checkpoint("tiny", **{**sizes, "layers": 1})
    how = {"profile": "a100", "precision": "fp16", "context_tokens": CONTEXT, "cache": "int8"}
    artifact = open_artifact(make_artifact(checkpoint, **how))

    kernels = settled(cuda, decoder_of(artifact, "int8")).counted()

    reads = steps_read_codes(artifact.manifest.model.text)
    assert kernels["kernel_mha"] == (1 if reads else 0)
    assert kernels["DequantizeKVPairKernel"] == (0 if reads else 1)


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_step_is_recorded_and_replayed(
    cuda: FakeCuda, make: Callable[..., Artifact], precision: str, cache: str
) -> None:
    wishes = {} if cache == "float16" else {"cache": cache}
    artifact = make(precision, **wishes)
    plain = settled(cuda, decoder_of(artifact, cache)).counted()
    decoder = decoder_of(artifact, cache, graph=True)

    with cuda.record() as first:
        prefill(decoder)
    assert not any(line.startswith(("graph of", "recording")) for line in first.lines)
    later = settled(cuda, decoder)

    assert sum(line.startswith("graph of") for line in later.lines) == 1
    assert later.counted() == plain
    assert later.taken() == []
    # Another prompt in between is run as it is, and the recording still holds.
    decoder.rewind(0)
    prefill(decoder, 2 * CHUNK + 5)
    assert sum(line.startswith("graph of") for line in step(cuda, decoder).lines) == 1


def test_a_decoder_that_works_out_sizes_is_not_recorded(
    make: Callable[..., Artifact], tmp_path: Path
) -> None:
    old = number_instead_of_start(make("fp16").folder, tmp_path / "old")

    with pytest.raises(EngineError, match="cannot use the graph capture feature"):
        Session(
            old / "decoder" / "model.onnx",
            SessionOptions(device="cuda", cuda=CudaOptions(graph=True)),
        )


def test_a_prompt_takes_flash_attention_and_one_row_of_logits(
    cuda: FakeCuda, make: Callable[..., Artifact]
) -> None:
    decoder = decoder_of(make("int4"))
    prefill(decoder)
    decoder.rewind(0)

    with cuda.record() as record:
        prefill(decoder)

    kernels = record.counted()
    assert kernels["flash_fwd_kernel"] == LAYERS
    # Prompts are multiplied by dequantised weights; of the head's products only a row is left.
    assert kernels["Dequantize4BitsKernel"] == kernels["cublasGemmEx"] == 5 * LAYERS
    assert kernels["MatMulFloat8bKernelM1"] == 1
    assert max(record.copies("device to host")) == 4 * SIZES["vocab_size"]
