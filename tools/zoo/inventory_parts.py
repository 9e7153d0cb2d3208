"""The vocabulary of the inventories: a counter of (kind, size) with one method for each kind of axis."""

from __future__ import annotations

from collections import Counter


class Axes(Counter[tuple[str, int]]):
    """Counts axes; an axis is a set of dimensions that shrink together, with its own choice of indices.

    Kinds: ``channel``, a non-attention axis with a convolution weight among its members; ``hidden``, any other
    non-attention axis; ``head``, the (key/value) heads of an attention; ``head group``, the query heads per key/value
    head; ``head dim`` and ``value dim``, the size of a head on the query/key and on the value side.

    Not listed: axes that reach an input or an output of the program, positions and axes under a softmax, and axes
    of size 1. A rotate-half or interleaved rotary table leaves pairs, so its axis has half the size of the head, and
    it is one axis for all layers that read the same table.
    """

    def channel(self, *sizes: int, times: int = 1) -> Axes:
        """Axes that a convolution carries."""
        return self._add("channel", sizes, times)

    def hidden(self, *sizes: int, times: int = 1) -> Axes:
        """Axes of linear, embedding, norm and recurrent weights."""
        return self._add("hidden", sizes, times)

    def heads(self, kv: int, rep: int = 1, times: int = 1) -> Axes:
        """Key/value heads and the query heads per key/value head."""
        return self._add("head", (kv,), times)._add("head group", (rep,), times)

    def sizes(self, qk: int, value: int, times: int = 1) -> Axes:
        """Head sizes on the query/key and on the value side; 0 leaves one out."""
        return self._add("head dim", (qk,), times)._add("value dim", (value,), times)

    def attention(self, heads: int, qk: int, value: int, times: int = 1) -> Axes:
        """Multi-head attention without shared tables: heads, query/key size and value size of each instance."""
        return self.heads(heads, times=times).sizes(qk, value, times)

    def computed(self, *sizes: int, times: int = 1) -> Axes:
        """Frequencies of a sinusoidal embedding: one axis of half its width, sine and cosine of a frequency together.

        The table is computed from a range in the program. Removing a frequency is possible in principle (slice the
        constants); an analysis that freezes computed tables does not list these.
        """
        return self._add("hidden", sizes, times)

    def _add(self, kind: str, sizes: tuple[int, ...], times: int) -> Axes:
        """Count, leaving out what cannot shrink."""
        for size in sizes:
            if size > 1 and times:
                self[kind, size] += times
        return self
