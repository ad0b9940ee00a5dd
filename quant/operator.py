"""Named operators: pieces of a model that a backend may want to compute in its own way.

Each is one function with one signature. Its variants compute the same, within a stated bound; which of them a program
takes is chosen while it is traced, explicitly (`choosing`), or by platform. In an exported program every call of an
operator is a function of its own (`outlining`), which a compiler can recognise; a `Sink` sees what passes through them
(`tapping`). Of operators inside operators the outer one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.extend.source_info_util import current_name_stack

P = ParamSpec("P")
R = TypeVar("R")

_OURS = ("dsjax", "quant", "sharding")
"""Where variants come from whose results tests have compared."""

PREFIX = "dsjax."
"""What the names of outlined functions start with."""


class VariantError(ValueError):
    """A variant cannot compute what it is given. Raised by variants, while a program is traced."""


Tap = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], object]
"""Takes what a call of an operator was given, and what it gave."""


@runtime_checkable
class Sink(Protocol):
    """Where taps go. Called on the host, in the program's order."""

    def layer(self, number: int) -> None:
        """What follows is of this layer; of none if negative."""

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """An operator was called."""


@runtime_checkable
class TracedSink(Protocol):
    """A sink that also takes what operators compute, while a program is traced."""

    def layer(self, number: int) -> None:
        """As a `Sink`'s."""

    def traced(self, operator: str, function: Callable[..., list[jax.Array]], inputs: Sequence[Any]) -> Tap:
        """A call of an operator is traced: a function of arrays like these inputs, which holds nothing else of it.

        Returns:
          What sees that very call whenever it runs.
        """


@runtime_checkable
class PlacedSink(Sink, Protocol):
    """A sink that tells blocks and devices apart. Its inputs stay where they are: of calls it sees what they gave."""

    def at(self, block: str, device: int) -> Sink:
        """Who is told what happens in a block (`jax.named_scope`, "" in none), on a device of a manual mesh, else 0."""


@dataclasses.dataclass(frozen=True)
class _Trace:
    """How operators are traced. Part of the key of JAX's caches.

    Attributes:
      choices: (operator, variant) pairs.
      platform: whose default variants are taken.
      outline: whether calls are functions of their own.
      sink: where taps go.
    """

    choices: tuple[tuple[str, str], ...] = ()
    platform: str | None = None
    outline: bool = False
    sink: Sink | TracedSink | None = None


_trace = jax.make_user_context(_Trace())


@contextlib.contextmanager
def _with(**changes: Any) -> Iterator[None]:
    with _trace(dataclasses.replace(_trace.value, **changes)):
        yield


@contextlib.contextmanager
def choosing(choices: Mapping[str, str], platform: str | None = None) -> Iterator[None]:
    """Operators take these variants, where programs are traced under it; others their platform's, or the first.

    Args:
      choices: variant by operator; on top of those of an enclosing `choosing`.
      platform: of the programs; as it is by default.

    Raises:
      ValueError: for an operator or a variant that is not known.
    """
    for name, variant in choices.items():
        find(name).check(variant)
    merged = tuple(sorted((dict(_trace.value.choices) | dict(choices)).items()))
    with _with(choices=merged, platform=platform or _trace.value.platform):
        yield


def current() -> Hashable:
    """How operators are traced here: part of the key of every program that is kept."""
    return _trace.value


@contextlib.contextmanager
def outlining() -> Iterator[None]:
    """Calls of operators are functions named `dsjax.<operator>`."""
    with _with(outline=True):
        yield


@contextlib.contextmanager
def tapping(sink: Sink | TracedSink) -> Iterator[None]:
    """The sink sees every call of an operator, and every layer; not under `jax.grad`.

    On a mesh it sees whole arrays of programs that XLA partitions; of a manual body each device's part, which only a
    `PlacedSink` can tell from those of others.
    """
    with _with(sink=sink):
        yield


def enter_layer(number: Any) -> None:
    """Tells the sink that what follows is of this layer, int or int32 []; negative for none. Nothing without one."""
    if sink := _trace.value.sink:
        _tell(sink, lambda there, n: there.layer(int(n)), jnp.asarray(number, jnp.int32))


def _tell(sink: Sink | TracedSink, say: Callable[..., None], *arrays: Any) -> None:
    """Calls `say(sink, *arrays)` on the host, in the program's order, which is each device's own."""
    block, mesh = str(current_name_stack()), jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.axis_names if axis in mesh.manual_axes)
    device = lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)

    def told(device: Any, *arrays: Any) -> None:
        say(sink.at(block, int(device)) if isinstance(sink, PlacedSink) else sink, *arrays)

    io_callback(told, None, device, *arrays, ordered=True)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute an operator.

    Attributes:
      name: unique within the operator.
      body: takes and returns what the operator does.
      bound: the most that its results may differ from the first variant's, |a - b| / |b| as norms of whole results.
      says: what it does, and what for, in a line.
    """

    name: str
    body: Callable[..., Any]
    bound: float
    says: str


class Operator(Generic[P, R]):
    """A function with a name and variants; called like the function. The first variant is the formula.

    Attributes:
      name: in the field's terms.
      variants: by name.
      platforms: the variant that a platform takes where that is not the first; `take` adds to it.
    """

    def __init__(self, name: str, body: Callable[P, R], first: str) -> None:
        functools.update_wrapper(self, body)
        self.name = name
        self.platforms: Mapping[str, str] = MappingProxyType({})
        self.variants = {first: Variant(first, body, 0.0, (body.__doc__ or name).strip().splitlines()[0])}

    def variant(
        self, name: str, *, bound: float, says: str = "", platforms: Sequence[str] = ()
    ) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """Registers the decorated function as a variant, also from outside this code base.

        Args:
          name: not taken yet.
          bound: see `Variant`.
          says: see `Variant`; the first line of the function's docstring by default.
          platforms: those that take it unless another is chosen; to be said before a program for one is traced.

        Raises:
          ValueError: if there is a variant of that name, or another one that one of the platforms takes.
        """
        if name in self.variants:
            raise ValueError(f"operator {self.name}: variant {name} exists already")
        self._check_free(name, platforms)

        def register(body: Callable[..., R]) -> Callable[..., R]:
            line = says or (body.__doc__ or name).strip().splitlines()[0]
            self.variants[name] = Variant(name, body, bound, line)
            self.take(name, *platforms)
            return body

        return register

    def take(self, variant: str, *platforms: str) -> None:
        """Makes a variant these platforms' default; to be said before a program for one is traced.

        Raises:
          ValueError: if there is no such variant, or another one that one of the platforms takes.
        """
        self.check(variant)
        self._check_free(variant, platforms)
        self.platforms = MappingProxyType({**self.platforms, **dict.fromkeys(platforms, variant)})

    def _check_free(self, variant: str, platforms: Sequence[str]) -> None:
        for platform in platforms:
            if self.platforms.get(platform, variant) != variant:
                raise ValueError(f"operator {self.name}: {platform} takes variant {self.platforms[platform]} already")

    def check(self, variant: str) -> None:
        """Raises ValueError if there is no such variant."""
        if variant not in self.variants:
            raise ValueError(f"operator {self.name}: expected {' or '.join(self.variants)}, found {variant}")

    def default(self, platform: str | None) -> str:
        """The variant that programs for this platform take, unless another is chosen."""
        return self.platforms.get(platform or "", next(iter(self.variants)))

    @property
    def chosen(self) -> str:
        """The variant that is taken here."""
        return self.chosen_for(_trace.value.platform)

    def chosen_for(self, platform: str | None) -> str:
        """The variant that programs for this platform take, if they are traced here."""
        return dict(_trace.value.choices).get(self.name) or self.default(platform)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        trace = _trace.value
        variant = self.variants[self.chosen]
        body: Callable[..., R] = variant.body
        if variant.body.__module__.partition(".")[0] not in _OURS:
            body = functools.partial(self._checked, variant)
        if not trace.outline and trace.sink is None:
            return body(*args, **kwargs)
        with _with(outline=False, sink=None):
            function, inputs, tree = _close(body, args, kwargs)
            if trace.outline:

                def outlined(*arrays: jax.Array) -> Any:
                    return function(*arrays)

                outlined.__name__ = outlined.__qualname__ = PREFIX + self.name
                outputs = jax.jit(outlined, keep_unused=True)(*inputs)
            else:
                outputs = function(*inputs)
        if sink := trace.sink:
            given = [] if isinstance(sink, PlacedSink) else inputs  # whole stacks of weights are among them
            count = len(given)
            tap = sink.traced(self.name, function, inputs) if isinstance(sink, TracedSink) else None

            def called(there: Any, *arrays: Any) -> None:
                host = [np.asarray(a) for a in arrays]
                see = tap or functools.partial(there.call, self.name)
                see(host[:count], host[count:])

            _tell(sink, called, *given, *outputs)
        result: R = jax.tree.unflatten(tree, outputs)
        return result

    def _checked(self, variant: Variant, *args: Any, **kwargs: Any) -> R:
        """What a variant from outside of this code base gives, if it is what the first one would give.

        Raises:
          VariantError: if it cannot be called like it, or gives other shapes or types.
        """
        name = f"{self.name}={variant.name}"
        try:
            inspect.signature(variant.body).bind(*args, **kwargs)
        except TypeError as e:
            raise VariantError(f"{name}: expected a function of what {self.name} takes, found one with {e}") from None
        result: R = variant.body(*args, **kwargs)
        first = next(iter(self.variants.values()))
        expected, found = jax.eval_shape(lambda: first.body(*args, **kwargs)), jax.eval_shape(lambda: result)
        if expected != found:
            raise VariantError(f"{name}: expected {_shapes(expected)}, found {_shapes(found)}")
        return result


def _shapes(tree: Any) -> str:
    return ", ".join(f"{x.dtype.name} {list(x.shape)}" for x in jax.tree.leaves(tree)) or "nothing"


def _close(body: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[..., list[jax.Array]], list[Any], Any]:
    """A call as a function of arrays alone: (function, its inputs, the tree of its outputs).

    Arrays that the arguments' functions have from outside become inputs, too.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    found: list[Any] = []

    def flat(*arrays: jax.Array) -> list[Any]:
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        inner_args, inner_kwargs = jax.tree.unflatten(tree, filled)
        outputs, out_tree = jax.tree.flatten(body(*inner_args, **inner_kwargs))
        found.append(out_tree)
        return outputs

    arrays = [leaves[i] for i in places]
    closed = jax.make_jaxpr(flat)(*arrays)
    hoisted = [c for c in closed.consts if isinstance(c, jax.core.Tracer)]

    def run(*inputs: jax.Array) -> list[jax.Array]:
        given = iter(inputs[: len(hoisted)])
        constants = [next(given) if isinstance(c, jax.core.Tracer) else c for c in closed.consts]
        outputs: list[jax.Array] = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))(*inputs[len(hoisted) :])
        return outputs

    return run, hoisted + arrays, found[-1]


OPERATORS: dict[str, Operator[Any, Any]] = {}
"""Every operator by name, in the order in which their modules are imported."""


def operator(name: str, *, first: str = "lax") -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Makes the decorated function an operator, and its body the first variant.

    Args:
      name: not taken yet.
      first: name of that variant.
    """

    def make(body: Callable[P, R]) -> Operator[P, R]:
        if name in OPERATORS:
            raise ValueError(f"operator {name} exists already")
        made = OPERATORS[name] = Operator(name, body, first)
        return made

    return make


def find(name: str) -> Operator[Any, Any]:
    """The operator of that name.

    Raises:
      ValueError: if there is none.
    """
    if name not in OPERATORS:
        raise ValueError(f"operator: expected {', '.join(sorted(OPERATORS))}, found {name}")
    return OPERATORS[name]
