"""Test-time adaptation of BatchNorms, the rivals that learn nothing before: mixed statistics, and TENT.

A *stream* is the order in which images come. In the sorted one, all images of a corruption come
together, so a batch tells which corruption it is. In the mixed one, images of all corruptions are
shuffled. What uses the statistics of a batch depends on the stream; one image's statistics do not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from drep_jax.exporting.statistics import MixedStatistics, Statistics
from drep_jax.trees import get_in

SORTED, MIXED = "sorted", "mixed"


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """How a network adapts to what it sees.

    Attributes:
      statistics: what BatchNorms mix with their trained statistics; None for those alone.
      batch: images of a batch.
      stream: "sorted" or "mixed".
      tent: whether TENT adapts scale and shift of the BatchNorms.
    """

    statistics: Statistics | None = None
    batch: int = 500
    stream: str = SORTED
    tent: bool = False


def batches(counts: Mapping[str, int], adaptation: Adaptation, seed: int) -> list[list[tuple[str, np.ndarray]]]:
    """Returns the batches of a stream, each a list of (condition, indices of its images).

    Args:
      counts: {condition: number of its images}.
      adaptation: whose stream and batch size count.
      seed: of the mixed stream.
    """
    size = adaptation.batch
    if adaptation.stream == SORTED:
        return [
            [(name, np.arange(count)[i : i + size])] for name, count in counts.items() for i in range(0, count, size)
        ]
    names = list(counts)
    pairs = np.array([(number, image) for number, name in enumerate(names) for image in range(counts[name])])
    pairs = np.random.default_rng(seed).permutation(pairs)
    return [
        [(names[number], part[part[:, 0] == number, 1]) for number in np.unique(part[:, 0])]
        for part in (pairs[i : i + size] for i in range(0, len(pairs), size))
    ]


def predict(
    module: Any,
    variables: Any,
    images: Mapping[str, np.ndarray],
    prepare: Any,
    adaptation: Adaptation,
    *,
    seed: int = 0,
    rate: float = 1e-3,
) -> dict[str, np.ndarray]:
    """Returns the logits of every image of every condition, in the order of the images.

    Args:
      module, variables: the network.
      images: {condition: its images}, bytes.
      prepare: bytes ↦ inputs of the network.
      adaptation: how it adapts.
      seed: of the mixed stream.
      rate: learning rate of TENT.
    """
    network = module if adaptation.statistics is None else MixedStatistics(module, adaptation.statistics)
    run = Tent(network, variables, rate) if adaptation.tent else jax.jit(network.apply)
    logits: dict[str, Any] = {}
    last = None
    for parts in batches({name: len(x) for name, x in images.items()}, adaptation, seed):
        x = prepare(np.concatenate([images[name][index] for name, index in parts]))
        if adaptation.tent:
            condition = parts[0][0] if adaptation.stream == SORTED else MIXED
            if condition != last:  # each corruption begins with the trained network
                last = condition
                run.reset()
        outputs = np.asarray(run(x) if adaptation.tent else run(variables, x))
        first = 0
        for name, index in parts:
            rows = logits.setdefault(name, np.zeros((len(images[name]), outputs.shape[-1]), outputs.dtype))
            rows[index] = outputs[first : first + len(index)]
            first += len(index)
    return logits


class Tent:
    """TENT (Wang et al. 2021): scale and shift of BatchNorms descend the entropy of the answers, online.

    One step of Adam a batch; the answers of a batch are those before its step, as in the authors'
    code. Statistics are those of the network, the batch's alone in theirs.
    """

    def __init__(self, network: Any, variables: Any, rate: float) -> None:
        stats = variables["batch_stats"]
        self.variables = variables
        mask = jax.tree_util.tree_map_with_path(
            lambda path, _: get_in(stats, tuple(key.key for key in path[:-1])) is not None, variables["params"]
        )
        if not any(jax.tree_util.tree_leaves(mask)):
            raise ValueError("TENT adapts scale and shift of BatchNorms, and this network has none.")
        frozen = jax.tree_util.tree_map(lambda adapts: not adapts, mask)
        self.tx = optax.chain(optax.masked(optax.adam(rate), mask), optax.masked(optax.set_to_zero(), frozen))
        self.step = jax.jit(self._step(network))
        self.reset()

    def reset(self) -> None:
        """Goes back to the trained network."""
        self.params, self.state = self.variables["params"], self.tx.init(self.variables["params"])

    def _step(self, network: Any) -> Any:
        def step(params: Any, state: Any, x: Any) -> Any:
            def entropy(params: Any) -> Any:
                logits = network.apply({**self.variables, "params": params}, x)
                log_p = jax.nn.log_softmax(logits)
                return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1).mean(), logits

            gradient, logits = jax.grad(entropy, has_aux=True)(params)
            updates, state = self.tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, logits

        return step

    def __call__(self, x: Any) -> Any:
        """Returns logits of a batch, and takes a step."""
        self.params, self.state, logits = self.step(self.params, self.state, x)
        return logits


def baselines(alphas: Sequence[float] = (0.1, 0.25, 1.0), sizes: Sequence[int] = (20, 200)) -> dict[str, Adaptation]:
    """Returns the adaptations of the unchanged backbone: BatchNorm mixtures, one image's statistics, TENT."""
    rows = {"image 0.1": Adaptation(Statistics("image", 0.1))}
    for stream in (SORTED, MIXED):
        suffix = "" if stream == SORTED else ", mixed"
        for size in sizes:
            for alpha in alphas:
                rows[f"BN {alpha:g} × {size}{suffix}"] = Adaptation(Statistics("batch", alpha), size, stream)
        rows[f"TENT{suffix}"] = Adaptation(Statistics("batch", 1.0), max(sizes), stream, tent=True)
    return rows
