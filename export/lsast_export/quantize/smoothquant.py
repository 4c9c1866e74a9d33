"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): scales move from activations, where outliers are, into weights.

A linear layer Y = X W is also (X / s) (s W) with a factor for each channel j of X,

    s_j = max |X_j|^α / max |W_j|^(1 - α),

and one quantization scale for X / s loses less than one for X, in which a few channels are far larger than the rest.
The division costs nothing if the producer of X absorbs it:

- a LayerNorm: its gamma and beta;
- a gated product X = (V U + b) * g, the end of a feed-forward's first half: the columns of U and b.

Layers that share X share s, with the maximum over all their W. The graph computes the same as before, but for rounding.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .weights import Model, Node, WeightFile, Weights, biased_product, replace_contents

MinMax = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Minimum and maximum of an activation: numbers, or [C] each for activations that are observed by channel."""

Factors = Mapping[str, npt.NDArray[np.float32]]
"""s [C] by the name of a layer's weight, which is the same in all graphs of a bundle."""

_LEAST = 1e-5
"""Minimum of a factor, as in the authors' code."""


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input whose producer can absorb a scale."""

    activation: str
    weights: tuple[str, ...]
    """[C, N] each."""
    producers: tuple[str, ...]
    """The weights that absorb 1/s: gamma and beta [C], or U [M, C] and b [C]."""


def find_groups(model: Model) -> list[Group]:
    """The groups of a folded graph, in its order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    users = Counter(name for node in model.graph.node for name in node.input)
    users.update(value.name for value in model.graph.output)
    readers: dict[str, list[Node]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            readers.setdefault(node.input[0], []).append(node)

    def absorbing(node: Node | None) -> tuple[str, ...]:
        """The weights that absorb a division of the output of `node`."""
        if node is not None and node.op_type == "LayerNormalization":
            last = all(attribute.i == -1 for attribute in node.attribute if attribute.name == "axis")
            return tuple(node.input[1:]) if last and constants.issuperset(node.input[1:]) else ()
        for name in node.input if node is not None and node.op_type == "Mul" else ():
            if found := biased_product(name, producers, constants, users):
                return found[0].input[1], found[2]
        return ()

    groups = []
    for name, nodes in readers.items():
        taken = absorbing(producers.get(name))
        weights = tuple(node.input[1] for node in nodes)
        # They are changed in place, so nothing else may read them.
        if taken and users[name] == len(nodes) and all(users[tensor] == 1 for tensor in (*taken, *weights)):
            groups.append(Group(name, weights, taken))
    return groups


def smoothing_factors(
    model: Model, weights: Weights, min_max: Mapping[str, MinMax], alpha: float
) -> dict[str, npt.NDArray[np.float32]]:
    """The factors s of all groups of a folded graph, from the range of each group's activation by channel (`min_max`);
    `alpha` is from 0 to 1."""
    factors: dict[str, npt.NDArray[np.float32]] = {}
    for group in find_groups(model):
        low, high = min_max[group.activation]
        activation = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
        weight = np.max([np.abs(weights[name]).max(axis=1) for name in group.weights], axis=0).astype(np.float64)
        known = (activation > 0) & (weight > 0)
        powers = np.where(known, activation, 1) ** alpha / np.where(known, weight, 1) ** (1 - alpha)
        factors |= dict.fromkeys(group.weights, np.maximum(powers, _LEAST).astype(np.float32))
    return factors


def smooth(model: Model, weights: Weights, factors: Factors, store: WeightFile) -> None:
    """Divide activations of a folded graph by `factors` and multiply weights with them, in place, where a group
    has one. The factors may be those of another graph with the same layers. The changed weights are stored in `store`.
    """
    # A weight may be changed twice: as a layer of one group, and as the producer of the next.
    changes: dict[str, list[npt.NDArray[np.float32]]] = {}
    for group in find_groups(model):
        if (factor := factors.get(group.weights[0])) is not None:
            for name in group.weights:
                changes.setdefault(name, []).append(factor[:, None])
            for name in group.producers:
                changes.setdefault(name, []).append(np.float32(1) / factor)
    changed = {name: store.tensor(math.prod(by, start=weights[name]), name) for name, by in changes.items()}
    tensors = [changed.get(tensor.name, tensor) for tensor in model.graph.initializer]
    replace_contents(model, model.graph.node, tensors)
