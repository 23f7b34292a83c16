"""In which order a backbone's equations run while its sites are solved, and what is ready at each site.

A site is solved before the first call of its layer, from the inputs of all of its calls. So these
are computed first, with the sites that they depend on solved before, whatever the order in which
the module calls its layers. An input that depends on an output of the layer itself (weights reused
in depth, a loop) cannot be. It is *looked ahead*: computed from the layers as they are at that
moment, and computed again later.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from drep_jax.typing import Path

Place = tuple[Path, int | None]
"""Path of a layer, and the index of its copy under `nn.scan`."""


class Start(NamedTuple):
    """Where a site is solved.

    Attributes:
      place: of its first layer.
      position: in the order, of the first call of that layer.
      calls: equations of all of its calls, in the order of the program.
      ahead: those of them whose inputs depend on the layer's own output.
    """

    place: Place
    position: int
    calls: tuple[int, ...]
    ahead: tuple[int, ...]


class Order:
    """The order of the equations that depend on the images.

    Attributes:
      indices: of the equations, in order.
      starts: the sites, in order.
    """

    def __init__(
        self,
        jaxpr: Any,
        varying: Collection[Any],
        places: Mapping[int, Place],
        first_of: Mapping[Path, Path],
        wanted: Callable[[int], Sequence[Any]],
    ) -> None:
        """Finds the order.

        Args:
          jaxpr: the program.
          varying: variables that depend on the images.
          places: {index of an equation: the layer that it calls}.
          first_of: {path of a layer: that of the first layer of its site}.
          wanted: (index of a call) ↦ variables that solving needs of it.
        """
        self._eqns, self._varying, self._wanted = jaxpr.eqns, varying, wanted
        self._producer = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
        self._site_at = {index: (first_of[path], copy) for index, (path, copy) in places.items() if path in first_of}
        self._calls: dict[Place, list[int]] = {}  # of the first layer of a site
        self._uses: dict[Place, list[int]] = {}  # of all of its layers
        for index, site in self._site_at.items():
            self._uses.setdefault(site, []).append(index)
            if places[index] == site:
                self._calls.setdefault(site, []).append(index)
        self.indices: list[int] = []
        self.starts: list[Start] = []
        self._done: set[int] = set()
        self._begun: dict[Place, bool] = {}  # sites, and whether their inputs are ready
        self._needed = {*self.before([*jaxpr.outvars, *(v for index in places for v in jaxpr.eqns[index].outvars)], ())}
        for index in range(len(jaxpr.eqns)):
            self._run(index)

    def _run(self, index: int) -> None:
        if index in self._done or index not in self._needed:
            return
        site = self._site_at.get(index)
        if site is not None and site not in self._begun:
            self._prepare(site)
        self._done.add(index)
        self.indices.append(index)

    def _prepare(self, site: Place) -> None:
        """Computes what the calls of a site want, as far as it does not depend on sites that are being prepared."""
        self._begun[site] = False
        closed = {index for other, ready in self._begun.items() if not ready for index in self._uses[other]}
        ahead = []
        for call in self._calls[site]:
            earlier = self.before(self._wanted(call), self._done)
            if closed.intersection(earlier):
                ahead.append(call)
                continue
            for index in earlier:
                self._run(index)
        self._begun[site] = True
        self.starts.append(Start(site, len(self.indices), tuple(self._calls[site]), tuple(ahead)))

    def before(self, atoms: Iterable[Any], done: Collection[int]) -> list[int]:
        """Returns, in order, the varying equations that atoms need, apart from those that are done."""
        pending, indices = [v for v in atoms if self._varies(v)], set[int]()
        while pending:
            index = self._producer.get(pending.pop())
            if index is None or index in done or index in indices:
                continue
            indices.add(index)
            pending += [v for v in self._eqns[index].invars if self._varies(v)]
        return sorted(indices)

    def _varies(self, atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and atom in self._varying
