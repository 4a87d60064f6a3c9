"""Faults of sampling: what the options do to the logits, and how a token is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llava_edge.runtime.generation import engine
from llava_edge.runtime.generation.decoder import sampling
from llava_edge.runtime.generation.decoder.decoder import Decoder
from llava_edge.runtime.generation.decoder.sampling import Sampler
from llava_edge.runtime.generation.decoder.topk_logits import TopkLogits
from llava_edge.runtime.util.arrays import Array
from tests.faults.fault import loop_faults

_Patch = pytest.MonkeyPatch
_Cut = Callable[[Array, Array, Any], tuple[Array, Array]]


def _by_falling(ids: Array, scaled: Array) -> tuple[Array, Array]:
    order = np.argsort(-scaled, kind="stable")
    return ids[order], scaled[order]


def _weights(scaled: Array) -> Array:
    weights: Array = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def _top_k(ids: Array, scaled: Array, count: int, *, ties: bool = True) -> tuple[Array, Array]:
    kept = scaled > -np.inf
    ids, scaled = ids[kept], scaled[kept]
    if 0 < count < len(ids):
        least = np.partition(scaled, -count)[-count]
        chosen = scaled >= least if ties else scaled > least
        if not chosen.any():
            chosen[int(scaled.argmax())] = True
        ids, scaled = ids[chosen], scaled[chosen]
    return ids, scaled


def _top_p(ids: Array, weights: Array, top_p: float, more: int = 0) -> tuple[Array, Array]:
    if top_p >= 1:
        return ids, weights
    before = np.cumsum(weights) - weights
    last = max(1, int(np.searchsorted(before, top_p, side="left")) + more)
    return ids[:last], weights[:last] / weights[:last].sum()


def _cut(make: Callable[[Any, Array, Array], tuple[Array, Array]]) -> Callable[[_Patch], None]:
    """Another way from scaled logits to ids and probabilities."""

    def plant(patch: _Patch) -> None:
        def probabilities(self: Sampler, ids: Array, scaled: Array) -> tuple[Array, Array]:
            return make(self._options, ids, scaled)

        patch.setattr(Sampler, "_probabilities", probabilities)

    return plant


def _one_more(more: int) -> Callable[[_Patch], None]:
    def make(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
        ids, scaled = _by_falling(*_top_k(ids, scaled, options.top_k))
        return _top_p(ids, _weights(scaled), options.top_p, more)

    return _cut(make)


def _k_more(more: int) -> Callable[[_Patch], None]:
    def make(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
        count = max(1, options.top_k + more) if options.top_k else 0
        ids, scaled = _by_falling(*_top_k(ids, scaled, count))
        return _top_p(ids, _weights(scaled), options.top_p)

    return _cut(make)


def _without_ties(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
    kept = np.argsort(-scaled, kind="stable")[: options.top_k or len(scaled)]
    kept = kept[scaled[kept] > -np.inf]
    return _top_p(ids[kept], _weights(scaled[kept]), options.top_p)


def _top_p_first(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
    ids, scaled = _by_falling(*_top_k(ids, scaled, 0))
    kept, _ = _top_p(ids, _weights(scaled), options.top_p)
    ids, scaled = _top_k(ids[: len(kept)], scaled[: len(kept)], options.top_k)
    return ids, _weights(scaled)


def _by_id(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
    ids, scaled = _by_falling(*_top_k(ids, scaled, options.top_k))
    ids, weights = _top_p(ids, _weights(scaled), options.top_p)
    order = np.argsort(ids)
    return ids[order], weights[order]


def _not_made_whole(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
    ids, scaled = _by_falling(*_top_k(ids, scaled, options.top_k))
    weights = _weights(scaled)
    kept, _ = _top_p(ids, weights, options.top_p)
    return kept, weights[: len(kept)]


def _half_precision(options: Any, ids: Array, scaled: Array) -> tuple[Array, Array]:
    ids, scaled = _by_falling(*_top_k(ids, scaled, options.top_k))
    weights = _weights(scaled).astype(np.float16).astype(np.float64)
    return _top_p(ids, weights / weights.sum(), options.top_p)


def _temperature_last(patch: _Patch) -> None:
    """Top-p looks at probabilities without temperature."""

    def probabilities(self: Sampler, ids: Array, scaled: Array) -> tuple[Array, Array]:
        options = self._options
        ids, scaled = _by_falling(*_top_k(ids, scaled, options.top_k))
        kept, _ = _top_p(ids, _weights(scaled * options.temperature), options.top_p)
        return kept, _weights(scaled[: len(kept)])

    patch.setattr(Sampler, "_probabilities", probabilities)


def _temperature_multiplied(patch: _Patch) -> None:
    def scaled(self: Sampler, logits: Array) -> Array:
        found: Array = (logits - logits.max()) * self._options.temperature
        return found

    patch.setattr(Sampler, "_scaled", scaled)


def _penalty(change: Callable[[Any, Array, Array], Array]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        def penalised(self: Sampler, logits: Array) -> Array:
            return change(self._options.repetition_penalty, logits, self._seen)

        patch.setattr(Sampler, "_penalised", penalised)

    return plant


def _multiplied(penalty: float, logits: Array, seen: Array) -> Array:
    return np.where(seen, np.where(logits > 0, logits * penalty, logits / penalty), logits)


def _divided(penalty: float, logits: Array, seen: Array) -> Array:
    return np.where(seen, logits / penalty, logits)


def _subtracted(penalty: float, logits: Array, seen: Array) -> Array:
    return np.where(seen, logits - np.float32(np.log(penalty)), logits)


def _in_place(penalty: float, logits: Array, seen: Array) -> Array:
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def _forgets_prompt(patch: _Patch) -> None:
    real = Sampler.__init__

    def init(
        self: Sampler,
        options: Any,
        vocab_size: int,
        num_text_tokens: int,
        seen: Array | None = None,
        never: Any = (),
        **more: Any,
    ) -> None:
        real(self, options, vocab_size, num_text_tokens, None, never, **more)

    patch.setattr(Sampler, "__init__", init)


def _prompt_not_given(patch: _Patch) -> None:
    """The sampler counts what it is given, and the engine gives nothing."""
    real = engine.Sampler

    def make(
        options: Any, vocab: int, words: int, seen: Array | None = None, never: Any = ()
    ) -> Sampler:
        return real(options, vocab, words, None, never)

    patch.setattr(engine, "Sampler", make)


def _last_of_prompt_only(patch: _Patch) -> None:
    real = engine.Sampler

    def make(options: Any, vocab: int, words: int, seen: Array, never: Any = ()) -> Sampler:
        return real(options, vocab, words, seen[-4:], never)

    patch.setattr(engine, "Sampler", make)


def _after(change: Callable[[Sampler, int, Array], None]) -> Callable[[_Patch], None]:
    """Something that happens once a token is chosen."""

    def plant(patch: _Patch) -> None:
        real = Sampler.choose

        def choose(self: Sampler, logits: Any) -> int:
            seen = self._seen.copy()
            token = real(self, logits)
            change(self, token, seen)
            return token

        patch.setattr(Sampler, "choose", choose)

    return plant


def _forgets_generated(sampler: Sampler, token: int, seen: Array) -> None:
    sampler._seen[:] = seen


def _forgets_all_but_last(sampler: Sampler, token: int, seen: Array) -> None:
    sampler._seen[:] = False
    sampler._seen[token] = True


def _seeded(make: Callable[[Any], Any]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        real = Sampler.__init__

        def init(self: Sampler, options: Any, *rest: Any, **more: Any) -> None:
            real(self, options, *rest, **more)
            if more.get("uniform") is None:
                self._uniform = make(options)

        patch.setattr(Sampler, "__init__", init)

    return plant


def _same_number(options: Any) -> Any:
    number = np.random.default_rng(options.seed).random()
    return lambda: number


def _every_second(options: Any) -> Any:
    generator = np.random.default_rng(options.seed)
    return lambda: generator.random(2)[1]


def _coarse(options: Any) -> Any:
    generator = np.random.default_rng(options.seed)
    return lambda: float(generator.random(dtype=np.float32))


def _drawn(index: Callable[[Array, float], int]) -> Callable[[_Patch], None]:
    def plant(patch: _Patch) -> None:
        def drawn(self: Sampler, ids: Array, weights: Array) -> int:
            at = index(np.cumsum(weights), self._uniform())
            return int(ids[min(max(at, 0), ids.size - 1)])

        patch.setattr(Sampler, "_drawn", drawn)

    return plant


def _last_of_equal(patch: _Patch) -> None:
    class Numpy:
        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

        def argmax(self, logits: Array) -> int:
            return int(logits.size - 1 - np.argmax(logits[::-1]))

    patch.setattr(sampling, "np", Numpy())


def _padding_drawn(patch: _Patch) -> None:
    def probabilities(self: Sampler, logits: Array) -> tuple[Array, Array]:
        scaled = logits.astype(np.float64)
        scaled[self._never] = -np.inf
        return self._probabilities(np.arange(scaled.size), self._scaled(scaled))

    patch.setattr(Sampler, "probabilities", probabilities)


def _places_drawn(patch: _Patch) -> None:
    def probabilities(self: Sampler, logits: Array) -> tuple[Array, Array]:
        scaled = logits[: self._num_text_tokens].astype(np.float64)
        return self._probabilities(np.arange(scaled.size), self._scaled(scaled))

    patch.setattr(Sampler, "probabilities", probabilities)


def _greedy_masks_padding(patch: _Patch) -> None:
    real = Sampler.choose

    def choose(self: Sampler, logits: Any) -> int:
        if self._options.is_greedy and not isinstance(logits, TopkLogits):
            logits = logits[: self._num_text_tokens]
            self._seen = self._seen[: self._num_text_tokens]
        return real(self, logits)

    patch.setattr(Sampler, "choose", choose)


def _first_of_the_best(patch: _Patch) -> None:
    """Of equal logits the first that the graph gave is taken."""
    real = Sampler._choose_of_best

    def choose(self: Sampler, best: TopkLogits) -> int | None:
        return int(best.ids[0]) if self._options.is_greedy else real(self, best)

    patch.setattr(Sampler, "_choose_of_best", choose)


def _best_are_enough(patch: _Patch) -> None:
    """Ties that reach beyond the best are cut with them."""

    def choose(self: Sampler, best: TopkLogits) -> int:
        order = np.argsort(best.ids)
        ids, logits = best.ids[order], best.values[order].astype(np.float64)
        if self._options.is_greedy:
            return int(ids[np.argmax(logits)])
        return self._drawn(*self._probabilities(ids, self._scaled(logits)))

    patch.setattr(Sampler, "_choose_of_best", choose)


def _penalty_needs_few(patch: _Patch) -> None:
    """The best logits decide although a penalty lowers them."""
    patch.setattr(Sampler, "needs_few", property(lambda self: self._options.is_greedy))


def _overflow_accepted(patch: _Patch) -> None:
    class Math:
        def isfinite(self, value: float) -> bool:
            return True

    patch.setattr(sampling, "math", Math())


def _greedy_without_penalty(patch: _Patch) -> None:
    real = Sampler._penalised

    def penalised(self: Sampler, logits: Array) -> Array:
        return logits if self._options.is_greedy else real(self, logits)

    patch.setattr(Sampler, "_penalised", penalised)


def _options_lost(**lost: Any) -> Callable[[_Patch], None]:
    """The request's option does not reach the sampler."""

    def plant(patch: _Patch) -> None:
        real = engine.Sampler

        def make(options: Any, *rest: Any) -> Sampler:
            values = {**options.__dict__, **lost}
            return real(type(options)(**values), *rest)

        patch.setattr(engine, "Sampler", make)

    return plant


def _best_of_before(patch: _Patch) -> None:
    """The graph's best logits are those of the step before."""
    real = Decoder.step_best
    kept: dict[int, TopkLogits] = {}

    def step(self: Decoder, row: Array) -> TopkLogits:
        found = real(self, row)
        before = kept.get(id(self), found)
        kept[id(self)] = TopkLogits(found.values.copy(), found.ids.copy(), found.read_all)
        return before

    patch.setattr(Decoder, "step_best", step)


def _best_shifted(patch: _Patch) -> None:
    real = Decoder.step_best

    def step(self: Decoder, row: Array) -> TopkLogits:
        found = real(self, row)
        return TopkLogits(found.values, np.roll(found.ids, 1), found.read_all)

    patch.setattr(Decoder, "step_best", step)


FAULTS = loop_faults(
    "sampling",
    ("top-p one too few", "top-p leaves the token out that passes it", _one_more(-1)),
    ("top-p one too many", "top-p keeps one token more", _one_more(1)),
    ("top-k one too few", "one token less than top_k is kept", _k_more(-1)),
    ("top-k one too many", "one token more than top_k is kept", _k_more(1)),
    ("top-k cuts ties", "of equal logits only k stay", _cut(_without_ties)),
    ("top-p before top-k", "the set of top-p is made before top-k", _cut(_top_p_first)),
    ("temperature after top-p", "top-p looks at logits without temperature", _temperature_last),
    ("temperature multiplied", "logits times temperature", _temperature_multiplied),
    ("drawn in order of ids", "probabilities are cumulated by id", _cut(_by_id)),
    ("not made whole", "what top-p left is not brought back to one", _cut(_not_made_whole)),
    ("half precision", "probabilities in float16", _cut(_half_precision)),
    ("penalty multiplies", "positive logits are multiplied by the penalty", _penalty(_multiplied)),
    ("penalty divides all", "negative logits are divided as well", _penalty(_divided)),
    ("penalty subtracted", "the penalty's logarithm is subtracted", _penalty(_subtracted)),
    ("penalty in place", "the model's logits are changed", _penalty(_in_place)),
    ("penalty forgets the prompt", "only the answer counts", _forgets_prompt),
    ("prompt not handed to penalty", "the engine gives no ids", _prompt_not_given),
    ("penalty sees a window", "only the prompt's end counts", _last_of_prompt_only),
    ("penalty forgets the answer", "only the prompt counts", _after(_forgets_generated)),
    ("penalty sees one token", "only the last token counts", _after(_forgets_all_but_last)),
    ("no penalty when greedy", "greedy answers are not penalised", _greedy_without_penalty),
    (
        "seed ignored",
        "every answer draws its own",
        _seeded(lambda o: np.random.default_rng().random),
    ),
    ("always one seed", "no seed means seed 0", _seeded(lambda o: np.random.default_rng(0).random)),
    ("one number for all", "all tokens of an answer share a number", _seeded(_same_number)),
    ("every second number", "two numbers are drawn a token", _seeded(_every_second)),
    ("numbers of 24 bits", "the generator gives float32", _seeded(_coarse)),
    (
        "token before",
        "the draw takes the token before the one that passes",
        _drawn(lambda edges, number: int(np.searchsorted(edges, number)) - 1),
    ),
    (
        "reversed draw",
        "one minus the number is looked up",
        _drawn(lambda edges, number: int(np.searchsorted(edges, 1 - number, side="right"))),
    ),
    ("last of equal logits", "greedy takes the highest id of equal ones", _last_of_equal),
    ("padding drawn", "rows of padding are drawn", _padding_drawn),
    ("places drawn", "ids of images are drawn", _places_drawn),
    ("greedy masks padding", "greedy never takes a row of padding", _greedy_masks_padding),
    ("first of the best", "the graph's order decides between equal logits", _first_of_the_best),
    ("best are enough", "equal logits beyond the best are cut", _best_are_enough),
    ("penalty by the best", "a penalty is left out where a graph picks", _penalty_needs_few),
    ("overflow accepted", "logits that are no numbers give a token", _overflow_accepted),
    ("top_p lost", "top_p does not reach the sampler", _options_lost(top_p=1.0)),
    ("top_k lost", "top_k does not reach the sampler", _options_lost(top_k=0)),
    ("seed lost", "the seed does not reach the sampler", _options_lost(seed=None)),
    (
        "penalty lost",
        "the penalty does not reach the sampler",
        _options_lost(repetition_penalty=1.0),
    ),
) + loop_faults(
    "sampling",
    ("best of before", "a graph's best logits come one late", _best_of_before),
    ("best shifted", "a graph's best ids are those of their neighbours", _best_shifted),
    model="int8 cache cuda",
)
