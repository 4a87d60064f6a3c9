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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
from PIL.Image import Image

from llava_edge.profiles.buffers import (
    MAX_DRAFT_TOKENS,
    CacheType,
)
from llava_edge.profiles.engines import EngineName
from llava_edge.profiles.errors import PromptError
from llava_edge.runtime.allocation import allocate, refusals
from llava_edge.runtime.answer import Answer
from llava_edge.runtime.arguments import require_callable, require_count, require_flag
from llava_edge.runtime.artifact import Artifact, open_artifact
from llava_edge.runtime.chat import Chat, WithinTurn
from llava_edge.runtime.clip import VideoSource
from llava_edge.runtime.cuda_options import CudaOptions
from llava_edge.runtime.decoder import Decoder
from llava_edge.runtime.frame_choice import FrameChoice
from llava_edge.runtime.images import ImageSource
from llava_edge.runtime.interface_check import check_interfaces
from llava_edge.runtime.limits import Limits
from llava_edge.runtime.load_fit import LoadFit, fit_at_load
from llava_edge.runtime.load_options import LoadOptions
from llava_edge.runtime.loaded_parts import nothing_kept_by_errors, open_parts
from llava_edge.runtime.lowering import Lowering
from llava_edge.runtime.placement import AskedCache, Device, choose_device
from llava_edge.runtime.process import configure_process
from llava_edge.runtime.progress import ReportProgress, no_progress
from llava_edge.runtime.replay import Replay
from llava_edge.runtime.request import PromptOptions, Request, VideoInput
from llava_edge.runtime.sampling import SamplingOptions
from llava_edge.runtime.session import Array, DeviceKind
from llava_edge.runtime.stream import AnswerStream, Pieces, StreamHandle
from llava_edge.runtime.time_budget import TimeBudget
from llava_edge.runtime.tower import AskedEngine
from llava_edge.runtime.turnstile import Turnstile
from llava_edge.runtime.verified_here import check_verified_here


class LlavaEdge:
    """A loaded artifact. Make one with ``load``; close it or use it as a context manager.

    Attributes:
        artifact: what was opened.
        device: where the decoder runs.
        engine: what runs the vision tower.
        cache: type of keys and values.
        degraded: what was given up to fit the memory that was free at load; empty if nothing.
        off_device: see ``Answer``.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: DeviceKind,
        fit: LoadFit,
        options: LoadOptions,
        progress: ReportProgress,
    ) -> None:
        parts = open_parts(artifact, device, fit, options, progress)
        self.artifact = artifact
        self.device = device
        self.engine: EngineName = parts.tower.engine
        self.cache: CacheType = fit.cache
        self.degraded = parts.degraded
        self.off_device = parts.off_device
        self._loaded_context = fit.context_tokens
        self._dims = artifact.manifest.model
        self._tokens = artifact.manifest.tokens
        self._turnstile = Turnstile()
        self._tokenizer = parts.tokenizer
        self._requests = parts.requests
        self._table = parts.table
        self._tower = parts.tower
        self._decoder = parts.decoder
        self._answerer = parts.answerer
        self._forget = parts.forget
        self._opened = parts.opened

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
        progress: ReportProgress = no_progress,
    ) -> LlavaEdge:
        """Open an artifact.

        An artifact that was verified with other int8 instructions than this processor's runs its
        golden prompts the first time, which takes seconds.

        Args:
            artifact: folder that ``llava-edge convert`` wrote.
            device: ``auto`` takes what the artifact was made for. A cpu artifact does not run on
                cuda; a cuda artifact runs on the CPU only with ``allow_slow``.
            threads: of the CPU provider; 0 lets it take every physical core.
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
                told by content), compute only the rest. Off, where requests of strangers meet in
                one model: by the time it takes, one learns what another asked.
            vision_cache_bytes: host memory for features of tiles, so that tiles seen before (by
                content) are not encoded again, whatever was asked in between; 0 keeps none.
                Beside what the plan counts. Not with a TensorRT tower, whose features stay on
                the device.
            strict_device: refuse to load where ONNX Runtime would leave a node that computes to
                the CPU although the artifact runs on cuda. Off, ``Answer.off_device`` names them.
            cuda: how a GPU is used; says nothing on the CPU.
            limits: bounds on what is accepted as input.
            progress: told about loading.

        Raises:
            ArtifactError: the artifact is damaged, unsafe or not verified.
            EngineError: the device is not there, or does not suit the artifact, or would compute
                only a part of it (``strict_device``), or the golden prompts fail on it, or the
                engine that was named does not work.
            DependencyError: the engine that was named is not installed.
            OutOfMemoryError: cache and weights do not fit what is free now.
            RequestError: an argument is out of range or of another type.
        """
        require_flag("require_verified", require_verified)
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
            "cuda": cuda or CudaOptions(),
            "limits": limits or Limits(),
        }
        # Before anything is opened: what is asked wrongly costs no time.
        LoadOptions(**options)
        with ExitStack() as opened, nothing_kept_by_errors():
            whole = open_artifact(artifact, require_verified=require_verified)
            opened.callback(whole.close)
            model = opened.enter_context(cls.over(whole, device, progress=progress, **options))
            check_verified_here(model)
            opened.pop_all()
        model._opened.callback(whole.close)
        return model

    @classmethod
    def over(
        cls,
        artifact: Artifact,
        device: Device = "auto",
        *,
        progress: ReportProgress = no_progress,
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
        chosen = choose_device(device, artifact.manifest.flavour, how.allow_slow)
        configure_process(chosen)
        fit = fit_at_load(artifact, chosen, how.context_tokens, how.vision_cache_bytes, how.cache)
        with ExitStack() as opened, nothing_kept_by_errors():
            with artifact.files.unchanged():
                model = opened.enter_context(cls(artifact, chosen, fit, how, progress))
            opened.pop_all()
        return model

    def generate(self, prompt: str, images: Sequence[ImageSource] = (), **options: Any) -> Answer:
        """Answer a question; takes the options of ``stream``.

        Returns:
            The whole answer.
        """
        with self.stream(prompt, images, **options) as stream:
            for _ in stream:
                pass
            return stream.answer

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        video: VideoSource | None = None,
        num_frames: int | None = None,
        frame_choice: FrameChoice = "reference",
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
        max_image_tokens: int | None = None,
        max_new_tokens: int = 256,
        deadline_seconds: float | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        prompt_lookup_num_tokens: int = 0,
        progress: ReportProgress = no_progress,
    ) -> AnswerStream:
        """Answer a question piece by piece. Everything about the input is checked at once.

        Args:
            prompt: the question. ``<image>`` marks where each image goes; without marks they go
                where the model's template puts them, first.
            images: paths, bytes, PIL images or uint8 arrays.
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
            max_new_tokens: at most so many tokens.
            deadline_seconds: time for the answer, from this call on, waiting for other requests
                included. Where it will not do, judged by how long earlier requests took, the grid
                is lowered first; when it is over, the answer ends (``finish_reason``
                ``deadline``).
            temperature: 0 is greedy; see ``SamplingOptions`` for the rest.
            top_k: see ``SamplingOptions``.
            top_p: see ``SamplingOptions``.
            repetition_penalty: see ``SamplingOptions``.
            seed: see ``SamplingOptions``.
            prompt_lookup_num_tokens: the most tokens to look up in prompt and answer and to check
                in one run; 0 is plain decoding. Answers that copy come faster. Tokens are chosen
                from the model's own logits either way, whose last bits differ between a run of one
                position and of several: where two tokens are as good as equal, another may come.
            progress: told about tiles and prompt chunks.

        Returns:
            An iterator of text; its ``answer`` is there once it ended.

        Raises:
            ArtifactError: while iterating, a file of the artifact changed on disk since it was
                loaded, or while the answer was made. Load it again.
            ImageError: an image is refused.
            VideoError: the video is refused.
            DependencyError: a video is to be decoded and PyAV is not installed.
            PromptError: the prompt is empty, too long, or its marks do not match the images.
            RequestError: a sampling option or the grid is out of range, or images take more than
                ``max_image_tokens`` on the lowest grid.
            OutOfMemoryError: memory does not suffice, with the lowest grid and the context cut to
                this request; while iterating as well.
            DeadlineError: while iterating, the time was over before the first token.
        """
        self._turnstile.require_own_process()
        budget = TimeBudget(deadline_seconds)
        requests, capped = self._requests, ""
        if max_image_tokens is not None:
            images, grid, capped = requests.capped(images, grid, max_image_tokens)
        options = PromptOptions(raw=raw, image_marks=image_marks, grid=grid)
        clip = None if video is None else VideoInput(video, num_frames, frame_choice)
        lowering = Lowering(
            lambda: requests.build(prompt, images, options, video=clip),
            lambda: requests.steps(prompt, images, options, clip),
            capped,
        )
        self._check_length(lowering.request)
        return self._start(
            lowering,
            budget=budget,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            progress=progress,
        )

    def chat(
        self, system: str | None = None, *, image_marks: bool = True, grid: str | None = None
    ) -> Chat:
        """Begin a conversation, of which each turn computes only what is new.

        Args:
            system: text of the system turn; None leaves what the template puts in its place.
            image_marks: as in ``stream``, for all messages.
            grid: as in ``stream``, for all images.

        Raises:
            PromptError: the artifact has no chat template, or it has no system turn.
            RequestError: the grid is unknown or larger than the artifact's.
        """
        return Chat(
            self._requests,
            self._start,
            lambda: self.context_tokens,
            system=system,
            image_marks=image_marks,
            grid=grid,
        )

    def count_tokens(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        video: VideoSource | None = None,
        num_frames: int | None = None,
        raw: bool = False,
        image_marks: bool = True,
        grid: str | None = None,
    ) -> int:
        """Exactly how many tokens a prompt takes, images and video included, before running it."""
        self._turnstile.require_own_process()
        self.artifact.files.require_unchanged()
        options = PromptOptions(raw=raw, image_marks=image_marks, grid=grid)
        clip = None if video is None else VideoInput(video, num_frames)
        built = self._requests.build(prompt, images, options, video=clip, with_pixels=False)
        return built.num_tokens

    def draw_tiles(self, images: Sequence[ImageSource], grid: str | None = None) -> Image:
        """The images as they are cut, with tokens of each part: a picture for people.

        Args:
            images: at least one, as in ``stream``.
            grid: as in ``stream``.

        Returns:
            RGB, the images one below the other.

        Raises:
            ImageError: an image is refused.
            PromptError: there is none.
            RequestError: the grid is unknown or larger than the artifact's.
        """
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
        """
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
    ) -> Replay:
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
        """
        request = self._requests.build(prompt, images, options or PromptOptions(), video=video)
        self._check_length(request)
        with self._turnstile.turn(), self._unchanged():
            return self._answerer.replay(request, token_ids, on_logits)

    @property
    def context_tokens(self) -> int:
        """Positions of the cache; fewer than at load once a request had to cut it."""
        decoder: Decoder | None = self.__dict__.get("_decoder")
        return self._loaded_context if decoder is None else decoder.capacity

    @property
    def decode_run_seconds(self) -> float:
        """Time that all decode steps so far spent inside ONNX Runtime; the rest is our loop."""
        return self._decoder.step_seconds

    def close(self) -> None:
        """Stop the request in progress, let go of sessions, cache and files; idempotent.

        Requests that wait are refused. The one in progress ends at its next token.

        Raises:
            EngineError: called from inside a request, as in its ``progress``; that one was told to
                stop, and no other gets in.
        """
        with self._turnstile.closing():
            self._opened.close()
            self.__dict__.pop("_tower", None)
            # Nobody gets in any more, so nobody misses them.
            self.__dict__.pop("_answerer", None)
            self.__dict__.pop("_decoder", None)
            self.__dict__.pop("_forget", None)

    def __enter__(self) -> LlavaEdge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unchanged(self) -> AbstractContextManager[None]:
        """See to it that no file of the artifact changes while a request is answered."""
        return self.artifact.files.unchanged(self._forget)

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
        lowering: Lowering,
        within_turn: WithinTurn | None = None,
        *,
        budget: TimeBudget | None = None,
        max_new_tokens: int = 256,
        prompt_lookup_num_tokens: int = 0,
        progress: ReportProgress = no_progress,
        **sampling: Any,
    ) -> AnswerStream:
        self._turnstile.require_own_process()
        require_callable("progress", progress)
        choosing = SamplingOptions(**sampling)
        require_count("max_new_tokens", max_new_tokens, 1)
        require_count("prompt_lookup_num_tokens", prompt_lookup_num_tokens, 0, MAX_DRAFT_TOKENS)
        time = budget or TimeBudget()
        prepared = time.elapsed

        def run(handle: StreamHandle) -> Pieces:
            with self._turnstile.turn(handle.close, handle.thread, time.remaining):
                if handle.is_cancelled():
                    return None
                pieces = self._checked(
                    self._answerer.pieces(
                        lowering,
                        prepared,
                        choosing,
                        max_new_tokens,
                        prompt_lookup_num_tokens,
                        progress,
                        handle.is_cancelled,
                        time,
                    )
                )
                with refusals("in the middle of a request"):
                    return (yield from pieces if within_turn is None else within_turn(pieces))

        return AnswerStream(run)

    def _checked(self, pieces: Pieces) -> Pieces:
        with self._unchanged():
            return (yield from pieces)
