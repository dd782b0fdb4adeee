"""Weights from a Gram matrix of the tasks' gradients, mostly by torchjd's weightings, imported when one is asked for.

An aggregation such as PCGrad or MGDA combines the rows of a Jacobian with weights that depend on its Gramian alone, so
the K x K matrix of inner products is all it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: our name -> the class in torchjd.aggregation, and options without which it cannot be built.
GRAMIAN_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pcgrad": ("PCGradWeighting", {}),
    "mgda": ("MGDAWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
    "dualproj": ("DualProjWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.5}),
    "fairgrad": ("FairGradWeighting", {"alpha": 1.0}),
}
#: Solved here: torchjd's Nash-MTL starts from equal weights, and where those hurt a task its solver gives them back.
OWN_METHODS = ("nash_mtl",)
#: Added to a Gram with a largest diagonal of one, so that tasks whose gradients cancel have a solution.
RIDGE = 1e-6


def psd_projection(gram: Tensor) -> Tensor:
    """The nearest positive semidefinite matrix in Frobenius norm: negative eigenvalues become zero. [K, K] float64."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    projected = (vectors * values.clamp(min=0.0)) @ vectors.T
    return (projected + projected.T) / 2


def bargain(gram: Tensor, iterations: int = 60) -> Tensor:
    """[K] float64 with ``a_k (gram a)_k = 1``: Nash-MTL's solution (Navon et al. 2022).

    It minimises ``a^T gram a / 2 - sum log a_k``, which is convex and self-concordant for a positive semidefinite gram:
    Newton steps damped by ``1 / (1 + decrement)`` stay positive and converge from anywhere.
    """
    gram = gram + RIDGE * torch.eye(gram.shape[0], dtype=gram.dtype)
    a = gram.diagonal().rsqrt()
    for _ in range(iterations):
        gradient = gram @ a - 1 / a
        direction = torch.linalg.solve(gram + torch.diag(a**-2), gradient)
        decrement = float((gradient @ direction).clamp(min=0.0).sqrt())
        a = a - direction / (1 + decrement if decrement > 0.25 else 1.0)
        if decrement < 1e-12:
            break
    return a


def weigh(method: str, gram: Tensor, seed: int, options: Mapping[str, Any]) -> Tensor:
    """[K] float64 weights of the tasks' gradients; the scale is the method's own.

    Args:
        method: a key of ``GRAMIAN_METHODS``, or of ``OWN_METHODS``.
        gram: [K, K] float64.
        seed: of methods that go through the tasks in random order; the global random state is put back.
        options: of torchjd's class.

    Raises:
        ImportError: torchjd or a package that the method needs is not installed.
        ValueError: options that the method does not take.
    """
    # A diagonal without scale would put absolute tolerances at the mercy of the gradients' unit.
    largest = float(gram.diagonal().max())
    scaled = gram / largest if largest > 0 else gram
    if method == "nash_mtl":
        if options:
            raise ValueError(f"strategy 'nash_mtl' takes no options, got {sorted(options)}")
        return bargain(psd_projection(scaled))
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            f"strategy {method!r} is computed by torchjd, which is not installed: pip install torchjd (0.18 was tested)"
        ) from error
    name, defaults = GRAMIAN_METHODS[method]
    settings = {**defaults, **options}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        try:
            return torch.as_tensor(getattr(aggregation, name)(**settings)(scaled)).double()
        except TypeError as error:
            raise ValueError(f"strategy {method!r} was given options that torchjd does not take: {error}") from error
