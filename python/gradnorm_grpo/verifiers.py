"""The verifiers by name, under the path that scripts outside this package import."""

from .tasks.verifiers import VERIFIERS, Verifier

__all__ = ["VERIFIERS", "Verifier"]
