"""The step function compiled, and the loop around it: prompts in, tokens out."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.backend import compiler_options, place, platform_of
from dsjax.cache import SPARE, V4Cache, rollback
from dsjax.cache.rows import round_capacity
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.models import ends, family
from dsjax.models.rank import rank_draft, rank_step
from dsjax.numerics import Numerics
from dsjax.parallel import EVERYWHERE, Parallel, one_device, padded, to_host
from dsjax.params import EXPERT, LINEAR, Tree, leaves
from dsjax.sampling import Sampling, sample
from quant import E2M1, E4M3, QArray
from quant.operator import choosing, current
from sharding import UNSPLIT, Rules, gather

CHUNK = 512
"""New tokens per slot in one prefill step."""


SHORT_TURN = 64
"""The other width of a conversation's prefill steps, which it is worth compiling few of."""


def bucket(tokens: int, chunk: int = CHUNK, *, few: bool = False) -> int:
    """Static T for a step of `tokens` new tokens: 1, or a power of two from 16 up to `chunk`; of `few`, two of them."""
    if tokens <= 1:
        return 1
    if few:
        tokens = SHORT_TURN if tokens <= SHORT_TURN else chunk
    return min(chunk, 1 << (max(tokens, 16) - 1).bit_length())


def check_ids(ids: Sequence[int], config: Config, where: str) -> None:
    """Refuses an empty prompt and ids outside the vocabulary.

    Raises:
      InputError: naming `where`.
    """
    if not ids:
        raise InputError(f"{where}: expected at least one token, found none")
    bad = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if bad is not None:
        raise InputError(f"{where}: expected ids from 0 to {config.vocab_size - 1}, found {bad}")


@dataclasses.dataclass
class Timing:
    """Seconds, as measured on the host with the device drained.

    Attributes:
      compile_s: compiling, before anything ran.
      ttft_s: from the prompt to the first token, without compiling.
      token_s: per further decode step.
    """

    compile_s: float = 0.0
    ttft_s: float = 0.0
    token_s: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Output:
    """One sequence's result: ids without the end token, and "stop" (end token) or "length"."""

    ids: list[int]
    finish_reason: str


@dataclasses.dataclass
class Memory:
    """What a conversation's cache holds, so that its next turn starts where the last one ended.

    Attributes:
      cache: of one slot; None before the first turn.
      ids: what it was fed.
      furthest: the most tokens that it ever held.
    """

    cache: Any = None
    ids: list[int] = dataclasses.field(default_factory=list)
    furthest: int = 0

    def resume(self, prompt: Sequence[int], capacity: int) -> int:
        """How many of the prompt's tokens are in the cache, which is rolled back to them; 0 without a cache of use."""
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, prompt, strict=False))
        known = min(sum(1 for _ in same), len(prompt) - 1)
        # V4's rings no longer hold what would be looked back at.
        lost = isinstance(self.cache, V4Cache) and self.furthest - known > SPARE
        if self.cache is None or self.cache.capacity != capacity or lost:
            self.cache, self.ids, self.furthest = None, [], 0
            return 0
        back = jnp.zeros(self.cache.length.shape, jnp.int32).at[0].set(len(self.ids) - known)  # other slots are empty
        self.cache = rollback(self.cache, back)
        del self.ids[known:]
        return known

    def take(self, cache: Any, ids: Sequence[int]) -> None:
        """The cache after a step that was fed these ids."""
        self.cache = cache
        self.ids.extend(ids)
        self.furthest = max(self.furthest, len(self.ids))


def sampled_step(
    config: Config,
    numerics: Numerics,
    sampling: Sampling,
    vocabulary: int,
    rules: Rules,
    params: Tree,
    cache: Any,
    tokens: jax.Array,
    n_new: jax.Array,
    random_key: jax.Array,
    sequences: jax.Array,
) -> tuple[jax.Array, Any]:
    """One step and a draw from its last logits: (int32 [B], cache). All but params and cache every device has whole."""
    tokens, n_new, sequences = (rules.part("slots", a) for a in (tokens, n_new, sequences))
    logits, _, cache = family(config).step(config, numerics, params, cache, tokens, n_new, "last", rules)
    assert logits is not None
    with jax.named_scope("sample"):
        differ, _ = ends.vocabulary_axes(rules)
        drawn = sample(
            logits,
            sampling,
            vocabulary,
            jax.random.wrap_key_data(random_key),
            gather(sequences, differ),
            gather(cache.length, differ),
            rules,
        )
        return gather(drawn, tuple(a for a in rules.axes("slots") if a not in differ)), cache


def _check_native(config: Config, numerics: Numerics, params: Tree) -> None:
    """Refuses native on weights that a checkpoint has in FP8 but that are held as something else."""
    if not numerics.native or config.quantization is None:
        return
    for row, leaf in leaves(params, config):
        if row.path[-1] == "o_a":  # V4's grouped projection, whose input is not quantised
            continue
        if row.storage in (LINEAR, EXPERT) and not (isinstance(leaf, QArray) and leaf.format in (E4M3, E2M1)):
            held = leaf.format.name if isinstance(leaf, QArray) else str(leaf.dtype)
            raise InputError(f"--numerics native: expected FP8 weights, found {'.'.join(row.path)} held as {held}")


class Engine:
    """A model ready to run: parameters, numerics, and its compiled steps by shape.

    Args:
      config, params: from `checkpoint.load`.
      numerics: how to compute.
      vocabulary: number of ids that may be sampled; the model's by default.
      parallel: the mesh that the parameters lie on; one device by default.
    """

    def __init__(
        self,
        config: Config,
        params: Tree,
        numerics: Numerics,
        vocabulary: int | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        _check_native(config, numerics, params)
        self.config = config
        self.params = params
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        self.platform = platform_of(device)
        self.numerics = numerics.for_platform(self.platform)
        self.vocabulary = min(vocabulary or config.vocab_size, config.vocab_size)
        if parallel is None and device.platform != "cpu":  # a mesh of one, for where its cache lies
            parallel = one_device(config, device)
        if parallel is not None:  # only what lies otherwise is moved
            self.params = jax.tree.map(place, params, parallel.weight_placement(params))
        self.parallel = parallel
        self.rules = parallel.rules if parallel else UNSPLIT
        self._compiled: dict[Any, Any] = {}
        self.compiler_options = compiler_options(self.platform)

    def slots(self, sequences: int) -> int:
        """Slots of a batch for that many sequences: the mesh may want more, which stay empty."""
        return padded(sequences, self.parallel.slots) if self.parallel else sequences

    def cache(self, batch: int, max_length: int, *, draft: bool = False) -> Any:
        """An empty cache for `batch` slots of `max_length` tokens; of the draft module if asked for."""
        make = partial(family(self.config).new_cache, self.config, self.numerics, batch, max_length, draft=draft)
        return self.parallel.new_cache(make) if self.parallel else make()

    def _program(self, body: Callable[..., Any], cache: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """(params, cache, *inputs) -> (*outputs, cache), jitted, the cache donated; operators as they are chosen where
        it is traced, else as the platform takes them.

        Args:
          inputs, outputs: PartitionSpecs on a mesh.
        """

        def chosen(*arrays: Any) -> Any:
            with choosing({}, self.platform):
                return body(*arrays)

        options: dict[str, Any] = {"donate_argnums": 1, "compiler_options": self.compiler_options}
        if self.parallel is None:
            return jax.jit(chosen, **options)
        return self.parallel.program(chosen, self.params, cache, inputs, outputs, **options)

    def compiled(self, cache: Any, tokens: int, sampling: Sampling) -> Any:
        """The sampled step for T = `tokens`, compiled ahead for any seed; its cache argument is donated."""
        batch = cache.length.shape[0]
        sampling = dataclasses.replace(sampling, seed=0)
        key = (batch, cache.capacity, tokens, sampling, current())
        if key not in self._compiled:
            body = partial(sampled_step, self.config, self.numerics, sampling, self.vocabulary, self.rules)
            function = self._program(body, cache, [EVERYWHERE] * 4, [EVERYWHERE])
            row = jax.ShapeDtypeStruct((batch,), jnp.int32)
            new = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
            random_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
            lowered = function.lower(self.params, cache, new, row, random_key, row)
            self._compiled[key] = lowered.compile()
        return self._compiled[key]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        *,
        max_length: int | None = None,
        stop: Sequence[int] = (),
        first_sequence: int = 0,
        chunk: int = CHUNK,
        memory: Memory | None = None,
        on_token: Callable[[int, int], None] = lambda sequence, token: None,
    ) -> tuple[list[Output], Timing]:
        """Continues a batch of prompts of any lengths, each as if it were alone.

        Args:
          prompts: ids, none empty.
          max_new_tokens: at most this many per prompt.
          sampling: how tokens are drawn.
          max_length: positions per sequence; the longest prompt + max_new_tokens by default.
          stop: ids that end a sequence.
          first_sequence: number of the first prompt, for the draws' randomness and `on_token`.
          chunk: new tokens per prefill step.
          memory: of one prompt: what of it the cache has is not fed again. It is brought up to date with every step, so
            it is of use after an interruption, too.
          on_token: called with (sequence number, id) as tokens come.

        Raises:
          InputError: for an empty prompt, an id outside the vocabulary, or a prompt longer than the cache.
        """
        longest = max(len(p) for p in prompts)
        for i, prompt in enumerate(prompts):
            check_ids(prompt, self.config, f"prompt {first_sequence + i}")
        max_length = longest + max_new_tokens if max_length is None else max_length
        limit = min(max_length, self.config.max_position_embeddings)
        if longest > limit:
            raise InputError(f"prompt of {longest} tokens: expected at most {limit} (--max-length)")
        batch = self.slots(len(prompts))
        known = memory.resume(prompts[0], round_capacity(limit)) if memory is not None else 0
        cache = memory.cache if memory is not None and known else self.cache(batch, limit)
        timing = Timing()
        start = time.perf_counter()
        width_of = partial(bucket, chunk=chunk, few=memory is not None)
        widths = {width_of(longest - at) for at in range(known, longest, chunk)}
        for width in sorted(widths | ({1} if max_new_tokens > 1 else set())):
            self.compiled(cache, width, sampling)
        timing.compile_s = time.perf_counter() - start

        random_key = np.asarray(jax.random.key_data(jax.random.key(sampling.seed)))  # every process has the same
        sequences = np.arange(first_sequence, first_sequence + batch, dtype=np.int32)
        start = time.perf_counter()
        next_ids = np.zeros(batch, np.int32)

        def feed(tokens: np.ndarray, n_new: np.ndarray) -> jax.Array:
            """One step: the ids drawn after it; nothing waits for them."""
            nonlocal cache
            step = self.compiled(cache, tokens.shape[1], sampling)
            if memory is not None:
                memory.cache = None  # while the step has it
            after, cache = step(self.params, cache, tokens, n_new, random_key, sequences)
            if memory is not None:
                memory.take(cache, tokens[0, : n_new[0]].tolist())
            return after

        drawn: list[tuple[np.ndarray, jax.Array]] = []
        for at in range(known, longest, chunk):
            width = width_of(longest - at)
            n_new = np.zeros(batch, np.int32)
            n_new[: len(prompts)] = [np.clip(len(p) - at, 0, width) for p in prompts]
            tokens = np.zeros((batch, width), np.int32)
            for i, prompt in enumerate(prompts):
                tokens[i, : n_new[i]] = prompt[at : at + width]
            drawn.append((n_new, feed(tokens, n_new)))
        for n_new, ids_after in drawn:
            next_ids = np.where(n_new > 0, ids_after, next_ids)
        timing.ttft_s = time.perf_counter() - start

        ids: list[list[int]] = [[] for _ in prompts]
        reasons: list[str | None] = [None] * len(prompts)
        room = [min(max_new_tokens, limit - len(p)) for p in prompts]
        while True:
            for i in range(len(prompts)):
                if reasons[i] is None:
                    if room[i] > 0 and int(next_ids[i]) in stop:
                        reasons[i] = "stop"
                    elif room[i] > 0:
                        ids[i].append(int(next_ids[i]))
                        on_token(first_sequence + i, ids[i][-1])
                    if reasons[i] is None and len(ids[i]) >= room[i]:
                        reasons[i] = "length"
            if all(reasons):
                break
            start = time.perf_counter()
            active = np.zeros(batch, np.int32)
            active[: len(prompts)] = [r is None for r in reasons]
            next_ids = np.asarray(feed(next_ids[:, None], active))
            timing.token_s.append(time.perf_counter() - start)
        return [Output(i, r or "length") for i, r in zip(ids, reasons, strict=True)], timing

    def score(self, tokens: np.ndarray, *, mtp: bool = False, chunk: int = CHUNK) -> tuple[np.ndarray, Any]:
        """Logits at every position, in chunks.

        Args:
          tokens: int [B, T].
          mtp: the MTP module's, too.

        Returns:
          float32 [B, T, V]; and the draft's float32 [B, T - 1, V] (row i, from hidden i and token i + 1, predicts
          token i + 2), or None.

        Raises:
          InputError: for ids outside the vocabulary, or more tokens than the model has positions.
        """
        batch, length = tokens.shape
        for i, row in enumerate(tokens.tolist()):
            check_ids(row, self.config, f"row {i}")
        if length > self.config.max_position_embeddings:
            raise InputError(f"rows of {length} tokens: expected at most {self.config.max_position_embeddings}")
        slots = self.slots(batch)
        tokens = np.pad(tokens.astype(np.int32), [(0, slots - batch), (0, 0)])
        cache = self.cache(slots, length)
        draft_cache = self.cache(slots, length, draft=True) if mtp else None
        step, draft = self._scoring(cache, draft_cache)
        logits, drafts = [], []
        for at in range(0, length, chunk):
            new = tokens[:, at : at + chunk]
            out, hidden, cache = step(self.params, cache, new, np.full(slots, new.shape[1], np.int32))
            logits.append(to_host(out)[:batch])
            following = tokens[:, at + 1 : at + 1 + new.shape[1]]
            if mtp and following.shape[1]:
                # The last token has none to follow it: what is drafted there is left out.
                n_new = np.full(slots, following.shape[1], np.int32)
                following = np.pad(following, [(0, 0), (0, new.shape[1] - following.shape[1])])
                out, _, draft_cache = draft(self.params, draft_cache, hidden, following, n_new)
                drafts.append(to_host(out)[:batch, : n_new[0]])
        joined = np.concatenate(drafts, axis=1) if drafts else None
        return np.concatenate(logits, axis=1), joined

    def _scoring(self, cache: Any, draft_cache: Any) -> tuple[Any, Any]:
        """The step and the draft that give all logits; the draft None without its cache."""
        key = "scoring", draft_cache is not None
        if key not in self._compiled:
            logits = self.parallel.layout.logits_spec(positions=True) if self.parallel else EVERYWHERE
            hidden = self.parallel.layout.hidden_spec() if self.parallel else EVERYWHERE
            given = self.config, self.numerics, self.rules, "all"
            outputs, tokens = [logits, hidden], [EVERYWHERE] * 2
            step = self._program(partial(rank_step, *given), cache, tokens, outputs)
            draft = self._program(partial(rank_draft, *given), draft_cache, [hidden, *tokens], outputs)
            self._compiled[key] = step, draft
        found: tuple[Any, Any] = self._compiled[key]
        return found
