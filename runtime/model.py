"""LlavaEdge: open an artifact, ask about images.

    from llava_edge.runtime import LlavaEdge

    model = LlavaEdge.load("artifact")
    print(model.generate("What is the total?", images=["receipt.jpg"]).text)

One object may be used by many threads; requests queue, first come first served. It belongs to the
process that loaded it: in a child of ``fork()`` every use is refused, so load there, or start
processes with multiprocessing's method ``spawn``. No network, no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from PIL.Image import Image

from llava_edge.profiles.boards.cuda_devices import start_cuda
from llava_edge.profiles.boards.device_name import parse_device
from llava_edge.profiles.boards.engines import EngineName
from llava_edge.profiles.errors import EngineError, PromptError, RequestError
from llava_edge.profiles.memory.buffers import CacheType
from llava_edge.runtime.artifact.graph_signature import check_interfaces
from llava_edge.runtime.artifact.open import Artifact, open_artifact
from llava_edge.runtime.backends.cuda_options import CudaOptions
from llava_edge.runtime.backends.process import configure_process
from llava_edge.runtime.chat import Chat, WithinTurn
from llava_edge.runtime.generation.components import Components
from llava_edge.runtime.generation.deadline import TimeBudget
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.engine import Engine
from llava_edge.runtime.generation.generation_config import OPTION_NAMES, GenerationConfig
from llava_edge.runtime.generation.output import Answer
from llava_edge.runtime.generation.request_queue import CLOSED, RequestQueue
from llava_edge.runtime.generation.stream import AnswerStream, Pieces, StreamHandle
from llava_edge.runtime.generation.teacher_forcing import ForcedRun
from llava_edge.runtime.loading.memory_fit import fit_at_load
from llava_edge.runtime.loading.open_components import nothing_kept_by_errors, open_components
from llava_edge.runtime.loading.options import LoadOptions
from llava_edge.runtime.loading.placement import AskedCache, Device, choose_device
from llava_edge.runtime.processing.degradation import Degradation
from llava_edge.runtime.processing.images.loading import ImageSource
from llava_edge.runtime.processing.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.processing.video.frame_sampling import FrameChoice
from llava_edge.runtime.processing.video.video_reader import VideoSource
from llava_edge.runtime.util.allocation import allocate, translate_oom
from llava_edge.runtime.util.arrays import Array
from llava_edge.runtime.util.limits import Limits
from llava_edge.runtime.util.progress import Progress, no_progress
from llava_edge.runtime.util.validation import (
    refuse_unknown,
    require_callable,
    require_counts,
    require_flag,
)
from llava_edge.runtime.verification.media_reader import MediaReader
from llava_edge.runtime.verification.self_test_policy import self_test_if_needed
from llava_edge.runtime.vision.select import AskedEngine

_STREAM_OPTIONS = (
    *("video", "num_frames", "frame_choice", "raw", "image_marks", "grid"),
    *("max_image_tokens", "deadline_seconds", "generation_config", "progress"),
)


class LlavaEdge:
    """A loaded artifact. Make one with ``load``; close it or use it as a context manager.

    Attributes:
        artifact: what was opened.
        device: where the decoder runs: ``cpu``, ``cuda``, ``cuda:1`` and so on.
        threads: of the CPU provider.
        engine: what runs the vision tower.
        cache: type of keys and values.
        degraded: what was reduced to fit the memory that was free at load; empty if nothing.
        off_device: see ``Answer``.
    """

    def __init__(self, artifact: Artifact, components: Components) -> None:
        self.artifact = artifact
        self.device = components.device
        self.threads = components.threads
        self.engine: EngineName = components.tower.engine
        self.cache: CacheType = components.cache
        self.degraded = components.degraded
        self.off_device = components.off_device
        self._loaded_context = components.decoder.capacity
        self._dims = artifact.manifest.model
        self._tokens = artifact.manifest.tokens
        self._queue = RequestQueue()
        self._tokenizer = components.tokenizer
        self._requests = components.requests
        self._table = components.table
        self._tower = components.tower
        self._decoder = components.decoder
        self._engine = Engine(components)
        self._opened = components.opened

    @classmethod
    def load(
        cls,
        artifact: str | os.PathLike[str],
        device: Device = "auto",
        *,
        threads: int = 0,
        context_tokens: int | None = None,
        cache: AskedCache = "auto",
        require_verified: bool = False,
        allow_slow: bool = False,
        engine: AskedEngine = "auto",
        trust_engines: bool = False,
        prefix_reuse: bool = True,
        vision_cache_bytes: int = 0,
        strict_device: bool = False,
        cuda: CudaOptions | None = None,
        limits: Limits | None = None,
        progress: Progress = no_progress,
        **unknown: NoReturn,
    ) -> LlavaEdge:
        """Open an artifact.

        An artifact that was verified with other int8 instructions than this processor's runs its
        golden prompts the first time, which takes seconds.

        Args:
            artifact: folder that ``llava-edge convert`` wrote.
            device: ``auto`` takes what the artifact was made for. A cpu artifact does not run on
                cuda; a cuda artifact runs on the CPU only with ``allow_slow``. ``cuda:1`` is
                another GPU than the first, as CUDA counts those that it shows to this process.
            threads: of the CPU provider; 0 for as many as this process may use, by affinity,
                cpusets and CPU quotas.
            context_tokens: positions of the cache, at most the artifact's; fewer take less memory.
                Left out, it is the artifact's, or as many as fit the memory that is free now and
                at least one image of the largest grid with some text; ``degraded`` then says so.
            cache: type of its keys and values. ``int8``, where the artifact has a graph for it,
                takes a quarter of the memory and decodes long contexts faster; a prompt takes
                longer, and answers may differ by what the certificate says. ``auto`` is the type
                that the artifact computes in, or int8 where only that fits the memory that is free
                now.
            require_verified: refuse an artifact without its certificate.
            allow_slow: see ``device``.
            engine: what runs the vision tower. ``auto`` takes the first that works of TensorRT,
                TensorRT-RTX and ONNX Runtime; one that is named must work.
            trust_engines: open engines that came with the artifact, which runs NVIDIA's library
                over bytes that its maker chose. Engines built on this machine need no trust.
            prefix_reuse: where a prompt begins as the one before it (same words, same pictures,
                told by content), compute only the rest. Off, where requests of different users meet
                in one model: by the time it takes, one learns what another asked.
            vision_cache_bytes: host memory for features of tiles, so that tiles seen before (by
                content) are not encoded again, whatever was asked in between; 0 keeps none.
                Beside what the plan counts. Not with a TensorRT tower, whose features stay on
                the device.
            strict_device: refuse to load where ONNX Runtime would leave a node that computes to
                the CPU although the artifact runs on cuda. Off, ``Answer.off_device`` names them.
            cuda: how a GPU is used; says nothing on the CPU.
            limits: bounds on what is accepted as input.
            progress: told about loading.
            unknown: none; a misspelt option is named.

        Raises:
            ArtifactError: the artifact is damaged, unsafe or not verified.
            EngineError: the device is not there, or does not suit the artifact, or would compute
                only a part of it (``strict_device``), or the golden prompts fail on it, or the
                engine that was named does not work.
            DependencyError: the engine that was named is not installed.
            OutOfMemoryError: cache and weights do not fit what is free now.
            RequestError: an argument is out of range or of another type.
        """
        require_verified = require_flag("require_verified", require_verified)
        options: dict[str, Any] = {
            "threads": threads,
            "context_tokens": context_tokens,
            "cache": cache,
            "allow_slow": allow_slow,
            "engine": engine,
            "trust_engines": trust_engines,
            "prefix_reuse": prefix_reuse,
            "vision_cache_bytes": vision_cache_bytes,
            "strict_device": strict_device,
            "cuda": CudaOptions() if cuda is None else cuda,
            "limits": Limits() if limits is None else limits,
        }
        refuse_unknown("load()", unknown, {*options, "device", "require_verified", "progress"})
        # Before anything is opened: what is asked wrongly costs no time.
        LoadOptions(**options)
        parse_device(device)
        require_callable("progress", progress)
        if not isinstance(artifact, (str, os.PathLike)):
            raise RequestError(f"artifact is {artifact!r:.60}; it must be the path of a folder")
        with ExitStack() as opened, nothing_kept_by_errors():
            whole = open_artifact(artifact, require_verified=require_verified)
            opened.callback(whole.close)
            model = opened.enter_context(cls.over(whole, device, progress=progress, **options))
            self_test_if_needed(model)
            opened.pop_all()
        model._opened.callback(whole.close)
        return model

    @classmethod
    def over(
        cls,
        artifact: Artifact,
        device: Device = "auto",
        *,
        progress: Progress = no_progress,
        **options: Any,
    ) -> LlavaEdge:
        """Load an artifact that is open already, whatever it was verified on: for verifying.

        Args:
            artifact: opened.
            device: as in ``load``.
            progress: told about loading.
            options: fields of ``LoadOptions``, as in ``load``.

        Raises:
            LlavaEdgeError: as ``load``.
        """
        how = LoadOptions(**options)
        require_callable("progress", progress)
        check_interfaces(artifact)
        chosen = choose_device(device, artifact.manifest.target, how.allow_slow)
        configure_process(chosen)
        gpu = parse_device(device).gpu if chosen == "cuda" else 0
        if chosen == "cuda":
            # It is going to be used here anyway, and then tells itself how it counts the GPUs.
            start_cuda()
        fit = fit_at_load(
            artifact, chosen, how.context_tokens, how.vision_cache_bytes, how.cache, gpu
        )
        with nothing_kept_by_errors(), ExitStack() as opened:
            with artifact.files.unchanged():
                components = open_components(artifact, chosen, fit, how, progress, gpu)
                opened.callback(components.opened.close)
            model = cls(artifact, components)
            opened.pop_all()
        return model

    def generate(
        self,
        prompt: str,
        images: Iterable[ImageSource] | None = (),
        generation_config: GenerationConfig | None = None,
        *,
        video: VideoSource | None = None,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
        max_image_tokens: int | None = None,
        deadline_seconds: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        progress: Progress = no_progress,
        **unknown: NoReturn,
    ) -> Answer:
        """Answer a question. Arguments and errors are those of ``stream``.

        Returns:
            The whole answer.
        """
        with self.stream(
            prompt,
            images,
            generation_config,
            video=video,
            num_frames=num_frames,
            frame_choice=frame_choice,
            raw=raw,
            image_marks=image_marks,
            grid=grid,
            max_image_tokens=max_image_tokens,
            deadline_seconds=deadline_seconds,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            progress=progress,
            **unknown,
        ) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(
        self,
        prompt: str,
        images: Iterable[ImageSource] | None = (),
        generation_config: GenerationConfig | None = None,
        *,
        video: VideoSource | None = None,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
        max_image_tokens: int | None = None,
        deadline_seconds: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        progress: Progress = no_progress,
        **unknown: NoReturn,
    ) -> AnswerStream:
        """Answer a question piece by piece. Everything about the input is checked at once.

        Args:
            prompt: the question. ``<image>`` marks where each image goes; without marks they go
                where the model's template puts them, first.
            images: paths, bytes, PIL images or uint8 arrays; None for none.
            generation_config: how tokens are chosen and how many; None for the defaults.
            video: path or bytes of a video file, or frames (a list of images, or a uint8 array
                (frames, height, width, 3)); ``<video>`` marks where it goes.
            num_frames: frames of it to look at; as many as the artifact was planned for, or as
                there are, if left out.
            frame_choice: which frames: ``reference`` as transformers chooses, ``original`` as
                LLaVA's own code does.
            raw: the prompt is finished; no template is applied and every image needs its mark.
            image_marks: whether ``<image>`` in the prompt is a mark or plain text.
            grid: lower the AnyRes grid, for instance ``base`` or ``1x2``.
            max_image_tokens: lower the grid until all images together take no more.
            deadline_seconds: time for the answer, from this call on, waiting for other requests
                included. Where it will not do, judged by how long earlier requests took, the grid
                is lowered first; when it is over, the answer ends (``finish_reason``
                ``deadline``).
            max_new_tokens: see ``GenerationConfig``, as the six below. One that is given wins over
                ``generation_config``.
            temperature: 0 is greedy.
            top_k: tokens to choose from.
            top_p: probability to choose from.
            repetition_penalty: of tokens that occurred.
            seed: of sampling.
            prompt_lookup_num_tokens: drafts from the prompt.
            progress: told about tiles and prompt chunks.
            unknown: none; a misspelt option is named.

        Returns:
            An iterator of text; its ``answer`` is there once it ended.

        Raises:
            ArtifactError: while iterating, a file of the artifact changed on disk since it was
                loaded, or while the answer was made. Load it again.
            ImageError: an image is refused.
            VideoError: the video is refused.
            DependencyError: a video is to be decoded and PyAV is not installed.
            PromptError: the prompt is empty, too long, or its marks do not match the images.
            RequestError: an option is unknown or out of range, or images need more than
                ``max_image_tokens`` on the lowest grid.
            EngineError: the model is closed.
            OutOfMemoryError: memory does not suffice, with the lowest grid and the context cut to
                this request; while iterating as well.
            DeadlineError: while iterating, the time was over before the first token.
        """
        self._queue.require_open()
        budget = TimeBudget(deadline_seconds)
        refuse_unknown("stream()", unknown, (*_STREAM_OPTIONS, *OPTION_NAMES))
        config = GenerationConfig.merged(
            generation_config,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        require_callable("progress", progress)
        requests, capped = self._requests, ""
        options = PromptOptions(raw=raw, image_marks=image_marks, grid=grid)
        clip = VideoInput.given(video, num_frames, frame_choice)
        # An iterator is read once, and each step that lowers the grid needs the images again.
        listed = requests.check_images(images)
        if max_image_tokens is not None:
            requests.check(prompt, listed, options, clip)
            listed, grid, capped = requests.capped(listed, grid, max_image_tokens)
            options = replace(options, grid=grid)
        degradation = Degradation(
            lambda: requests.build(prompt, listed, options, video=clip),
            lambda: requests.steps(prompt, listed, options, clip),
            capped,
        )
        self._check_length(degradation.request)
        return self._start(degradation, config, budget, progress=progress)

    def chat(
        self,
        system: str | None = None,
        *,
        image_marks: bool = True,
        grid: str | None = None,
        **unknown: NoReturn,
    ) -> Chat:
        """Begin a conversation, of which each turn computes only what is new.

        Args:
            system: text of the system turn; None leaves what the template puts in its place.
            image_marks: as in ``stream``, for all messages.
            grid: as in ``stream``, for all images.
            unknown: none; a misspelt option is named.

        Raises:
            PromptError: the artifact has no chat template, or it has no system turn.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        self._queue.require_open()
        refuse_unknown("chat()", unknown, ("system", "image_marks", "grid"))
        return Chat(
            self._requests,
            self._start,
            self._queue.require_open,
            lambda: self.context_tokens,
            system=system,
            image_marks=image_marks,
            grid=grid,
        )

    def count_tokens(
        self,
        prompt: str,
        images: Iterable[ImageSource] | None = (),
        *,
        video: VideoSource | None = None,
        num_frames: int | None = None,
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
        **unknown: NoReturn,
    ) -> int:
        """Exactly how many tokens a prompt takes, images and video included, before running it."""
        self._queue.require_open()
        known = ("video", "num_frames", "raw", "image_marks", "grid")
        refuse_unknown("count_tokens()", unknown, known)
        self.artifact.files.require_unchanged()
        options = PromptOptions(raw=raw, image_marks=image_marks, grid=grid)
        clip = VideoInput.given(video, num_frames)
        built = self._requests.build(prompt, images, options, video=clip, with_pixels=False)
        return built.num_tokens

    def draw_tiles(
        self, images: Sequence[ImageSource], grid: str | None = None, **unknown: NoReturn
    ) -> Image:
        """The images as they are cut, with tokens of each part: a picture for people.

        Args:
            images: at least one, as in ``stream``.
            grid: as in ``stream``.
            unknown: none; a misspelt option is named.

        Returns:
            RGB, the images one below the other.

        Raises:
            ImageError: an image is refused.
            PromptError: there is none.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        self._queue.require_open()
        refuse_unknown("draw_tiles()", unknown, ("grid",))
        return self._requests.draw_tiles(images, grid)

    def teacher_forced_logits(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        token_ids: Sequence[int] = (),
        *,
        video: VideoInput | None = None,
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
    ) -> Array:
        """Logits behind the prompt and behind each given token, by the decode path.

        Args:
            prompt: as in ``stream``.
            images: as in ``stream``.
            token_ids: tokens that are taken as the answer, whatever the logits say.
            video: to ask about.
            raw: as in ``stream``.
            image_marks: as in ``stream``.
            grid: as in ``stream``.

        Returns:
            float32 (1 + len(token_ids), vocab).

        Raises:
            RequestError: ``token_ids`` are no whole numbers.
            LlavaEdgeError: as ``replay``.
        """
        token_ids = require_counts("token_ids", token_ids)
        shape = (1 + len(token_ids), self._dims.text.vocab_size)
        rows = allocate(shape, np.float32, "logits of every token")
        options = PromptOptions(raw=raw, image_marks=image_marks, grid=grid)
        self.replay(prompt, images, token_ids, rows.__setitem__, options, video)
        return rows

    def replay(
        self,
        prompt: str,
        images: Sequence[ImageSource],
        token_ids: Sequence[int],
        on_logits: Callable[[int, Array], None],
        options: PromptOptions | None = None,
        video: VideoInput | None = None,
    ) -> ForcedRun:
        """Answer with given tokens, the way every answer is made, and show what comes up.

        Args:
            prompt: as in ``stream``.
            images: as in ``stream``.
            token_ids: taken as the answer, whatever the logits say.
            on_logits: ``on_logits(i, row)`` gets the logits behind the prompt (0) and behind the
                i-th given token, float32 (vocab,), valid until it returns.
            options: how prompt and images are read.
            video: to ask about.

        Raises:
            ImageError: an image is refused.
            PromptError: as ``stream``, or the tokens do not fit the context.
            RequestError: ``token_ids`` are no whole numbers.
        """
        self._queue.require_open()
        token_ids = require_counts("token_ids", token_ids)
        request = self._requests.build(prompt, images, options or PromptOptions(), video=video)
        self._check_length(request)
        with self._queue.turn(), self._unchanged():
            return self._engine.replay(request, token_ids, on_logits)

    def _open_files(self) -> MediaReader:
        """What opens the files that travel in the artifact, as it opens a user's."""
        return MediaReader(self.artifact.manifest, self._tokenizer)

    def _embed_rows(self, request: Request, positions: Array) -> Array:
        """What the decoder reads at some positions of a prompt, without running it.

        Args:
            request: with pixels.
            positions: int64 (n,).

        Returns:
            (n, hidden) in the target's type.
        """
        self._queue.require_open()
        with self._queue.turn(), self._unchanged():
            return self._engine.embed_rows(request, positions)

    @property
    def context_tokens(self) -> int:
        """Positions of the cache; fewer than at load once a request had to cut it."""
        decoder: Decoder | None = self.__dict__.get("_decoder")
        return self._loaded_context if decoder is None else decoder.capacity

    @property
    def decode_run_seconds(self) -> float:
        """Time that all decode steps so far spent inside ONNX Runtime; the rest is our loop.

        Raises:
            EngineError: the model is closed.
        """
        decoder: Decoder | None = self.__dict__.get("_decoder")
        if decoder is None:
            raise EngineError(CLOSED)
        return decoder.step_seconds

    def close(self) -> None:
        """Stop the request in progress, let go of sessions, cache and files; idempotent.

        Requests that wait are refused. The one in progress ends at its next token.

        Raises:
            EngineError: called from inside a request, as in its ``progress``; that one was told to
                stop, and no other gets in.
        """
        with self._queue.closing():
            self._opened.close()
            self.__dict__.pop("_tower", None)
            # Nobody gets in any more, so nobody misses them.
            self.__dict__.pop("_engine", None)
            self.__dict__.pop("_decoder", None)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and name in self.__dict__:
            raise AttributeError(
                f"{name} is what was found when the model was loaded and cannot be set; load again"
            )
        super().__setattr__(name, value)

    def __enter__(self) -> LlavaEdge:
        self._queue.require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unchanged(self) -> AbstractContextManager[None]:
        """See to it that no file of the artifact changes while a request is answered."""
        return self.artifact.files.unchanged(self._engine.forget)

    def _check_length(self, request: Request) -> None:
        if request.num_tokens < self.context_tokens:
            return
        raise PromptError(
            f"the prompt takes {request.num_tokens} tokens ({request.image_tokens} of them for "
            f"{len(request.layouts)} images, {request.video_tokens} for a video); the context "
            f"holds {self.context_tokens} and the answer needs at least one. Shorten the text, "
            "give fewer images or frames, lower the grid, or load or convert with a larger context."
        )

    def _start(
        self,
        degradation: Degradation,
        config: GenerationConfig,
        time: TimeBudget,
        within_turn: WithinTurn | None = None,
        progress: Progress = no_progress,
    ) -> AnswerStream:
        prepared = time.elapsed

        def run(handle: StreamHandle) -> Pieces:
            with self._queue.turn(handle.close, handle.thread, time.remaining):
                if handle.is_cancelled():
                    return None
                pieces = self._checked(
                    self._engine.stream(
                        degradation,
                        prepared,
                        config,
                        handle.is_cancelled,
                        time,
                        progress,
                    )
                )
                with translate_oom("in the middle of a request"):
                    return (yield from pieces if within_turn is None else within_turn(pieces))

        return AnswerStream(run)

    def _checked(self, pieces: Pieces) -> Pieces:
        with self._unchanged():
            return (yield from pieces)
