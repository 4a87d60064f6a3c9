"""Opening the components of an artifact: all of them, or none stays open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from traceback import clear_frames

import numpy as np

from llava_edge.profiles.boards.device_name import cuda_name
from llava_edge.profiles.memory.buffers import prefill_chunk_tokens, tiles_per_batch
from llava_edge.runtime.artifact.memory_estimate import RequestMemory
from llava_edge.runtime.artifact.open import Artifact
from llava_edge.runtime.backends.cpu_isa import needs_wide_sums
from llava_edge.runtime.backends.cuda_runtime import CudaRuntime
from llava_edge.runtime.backends.logits_to_keep import check_recordable
from llava_edge.runtime.backends.onnxruntime import Session, SessionOptions
from llava_edge.runtime.generation.components import Components
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.inputs.embedding_table import EmbeddingTable
from llava_edge.runtime.generation.inputs.prompt_encoder import PromptEmbedder
from llava_edge.runtime.generation.warmup import warm_up
from llava_edge.runtime.loading.memory_fit import LoadFit, least_context
from llava_edge.runtime.loading.options import LoadOptions
from llava_edge.runtime.processing.processor import RequestBuilder
from llava_edge.runtime.processing.text.tokenizer import Tokenizer
from llava_edge.runtime.util.arrays import DeviceKind
from llava_edge.runtime.util.progress import Progress
from llava_edge.runtime.vision.cached_encoder import cached_encoder
from llava_edge.runtime.vision.cuda_encoder import OrtDeviceEncoder
from llava_edge.runtime.vision.encoder import VisionEncoder
from llava_edge.runtime.vision.select import open_tower


def open_components(
    artifact: Artifact,
    device: DeviceKind,
    fit: LoadFit,
    options: LoadOptions,
    progress: Progress,
    gpu: int = 0,
) -> Components:
    """Open files and graphs of an artifact that is checked; where that fails, nothing stays open.

    Args:
        artifact: opened.
        device: where the decoder runs.
        fit: context and type of the cache.
        options: checked.
        progress: told about loading.
        gpu: which one, on ``cuda``.

    Raises:
        LlavaEdgeError: as ``LlavaEdge.load``.
    """
    with ExitStack() as opened:
        return _open_parts(artifact, device, fit, options, progress, gpu, opened)


@contextmanager
def nothing_kept_by_errors() -> Iterator[None]:
    """Let an error keep no session, cache or picture alive by the frames that it came through.

    A caller that loads again with less, while the first error is still there, needs that memory.
    An error that the application is handling meanwhile keeps its own.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        pending: list[BaseException | None] = [error]
        seen = {id(handled)}
        while pending:
            each = pending.pop()
            if each is not None and id(each) not in seen:
                seen.add(id(each))
                clear_frames(each.__traceback__)
                pending += [each.__cause__, each.__context__]
        raise


def _open_parts(
    artifact: Artifact,
    device: DeviceKind,
    fit: LoadFit,
    options: LoadOptions,
    progress: Progress,
    gpu: int,
    opened: ExitStack,
) -> Components:
    manifest = artifact.manifest
    dims, tokens = manifest.model, manifest.tokens
    dtype: type[np.float32] | type[np.float16]
    dtype = np.float32 if manifest.target == "cpu" else np.float16
    tokenizer = Tokenizer.open(artifact.files[manifest.tokenizer], tokens, manifest.prompt)
    requests = RequestBuilder(manifest, tokenizer, options.limits)
    table = EmbeddingTable(artifact.files[manifest.embeddings], dims)
    opened.callback(table.close)
    chunk = prefill_chunk_tokens(manifest.prefill_chunk, fit.context_tokens)
    cuda = options.cuda
    settings = SessionOptions(
        device=device,
        gpu=gpu,
        threads=options.threads,
        wide_sums=device == "cpu" and needs_wide_sums(manifest.precision),
        strict=options.strict_device,
        cuda=cuda,
        prompt_tokens=chunk,
    )
    off_device: list[str] = []
    # The plan asks the same functions, so what it counted is what is taken here.
    batch = tiles_per_batch(manifest.target, requests.max_tiles)

    def open_session(name: str, how: SessionOptions, part: str) -> Session:
        session = Session.from_files(artifact.files, name, how)
        opened.callback(session.close)
        off_device.extend(f"{part}: {node}" for node in session.off_device)
        return session

    def open_ort() -> VisionEncoder | OrtDeviceEncoder:
        # Tiles come in other numbers each time, which nothing recorded can replay.
        plain = replace(settings, cuda=replace(cuda, graph=False))
        session = open_session(manifest.vision.file, plain, "vision")
        if device == "cuda" and cuda.features_on_device and not dims.takes_video:
            shape = (dims.vision.num_patches, dims.text.hidden_size)
            return OrtDeviceEncoder(session, CudaRuntime.open(index=gpu), batch, shape)
        return VisionEncoder(session, dims, batch, dtype)

    graph = manifest.decoders[fit.cache]
    if device == "cuda" and cuda.graph:
        check_recordable({tensor.name for tensor in graph.inputs})
    progress("loading", 0, 3)
    tower = open_tower(
        artifact, device, options.engine, open_ort, trust_engines=options.trust_engines, gpu=gpu
    )
    opened.callback(tower.close)
    progress("loading", 1, 3)
    session = open_session(graph.file, settings, "decoder")
    progress("loading", 2, 3)
    encoder = cached_encoder(tower.encoder, dims, dtype, options.vision_cache_bytes)
    embedder = PromptEmbedder(dims, tokens.image, table, encoder, dtype, batch, tokens.video)
    outputs = {tensor.name: tensor.shape for tensor in graph.outputs}
    picked = outputs.get("best_ids", (0,)) if cuda.best_on_device else (0,)
    decoder = Decoder(
        session,
        dims.text,
        fit.context_tokens,
        chunk,
        dtype,
        int(picked[-1]),
        int8_cache=fit.cache == "int8",
    )
    degraded = fit.degraded
    if device == "cuda" and cuda.warm_up:
        degraded += warm_up(tower.encoder, decoder, dims)
    progress("loading", 3, 3)
    return Components(
        requests=requests,
        tokenizer=tokenizer,
        tokens=tokens,
        table=table,
        tower=tower,
        embedder=embedder,
        decoder=decoder,
        dtype=dtype,
        memory=RequestMemory(manifest, device, batch),
        device=cuda_name(gpu) if device == "cuda" else device,
        threads=session.threads,
        cache=fit.cache,
        least_context=least_context(manifest),
        prefix_reuse=options.prefix_reuse,
        degraded=degraded,
        off_device=tuple(off_device),
        pci_bus_id=None if fit.gpu is None else fit.gpu.pci_bus_id,
        opened=opened.pop_all(),
    )
