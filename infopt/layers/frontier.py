"""Which combinations of blocks, KV heads and MLP channels make the most of a budget of parameters, as arithmetic. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infopt.errors import RecipeError
from infopt.layers import depth, width
from infopt.layers.width import Width
from infopt.protocols import Shapes


@dataclass(frozen=True)
class Cut:
    """How much of a model goes, or stays: `gone` blocks, and in every other block `kv_heads` and `mlp` channels.

    The latter two are 0 where widths stay, whatever they are.
    """

    gone: int
    kv_heads: int = 0
    mlp: int = 0


@dataclass(frozen=True)
class Space:
    """All cuts of a model: the counts that each dimension may have, best first, and the blocks in the order in which they go.

    `whole` is the model's width, None where only blocks may go.
    """

    shapes: Shapes
    whole: Width | None
    order: Sequence[int]
    gone: Sequence[int]
    kv_heads: Sequence[int]
    mlp: Sequence[int]

    @property
    def least(self) -> Cut:
        """The smallest model there is."""
        return Cut(self.gone[-1], self.kv_heads[-1], self.mlp[-1])

    def cut(self, cut: Cut) -> Shapes:
        """The shapes that it leaves."""
        narrow = self.shapes
        if self.whole is not None:
            narrow = width.reshape(narrow, replace(self.whole, kv_heads=cut.kv_heads, mlp=cut.mlp))
        return depth.without(narrow, self.order[: cut.gone])

    def parameters(self, cut: Cut) -> int:
        return self.cut(cut).parameters

    def frontier(self, limit: int) -> list[Cut]:
        """The cuts of at most `limit` parameters of which none can have a block, a KV head or a notch of channels more.

        In order of blocks gone, then of heads.
        """
        widest: dict[tuple[int, int], int] = {}
        for j, heads in enumerate(self.kv_heads):
            high, low = (self._by_depth(heads, mlp) for mlp in (self.mlp[0], self.mlp[-1]))
            widest |= {(i, j): self._widest(high[i], low[i], limit) for i in range(len(self.gone))}
        found = []
        for (i, j), channels in sorted(widest.items()):
            # Counts are in falling order: one more of a dimension is the entry before, where there is one.
            more = (widest.get((i - 1, j), -1), widest.get((i, j - 1), -1))
            if channels >= 0 and max(more) < channels:
                found.append(Cut(self.gone[i], self.kv_heads[j], channels))
        return found

    def _by_depth(self, kv_heads: int, mlp: int) -> list[int]:
        """Parameters for each number of blocks gone. Those of one width are alike, so that two numbers tell all."""
        if self.whole is None or len(self.gone) == 1:
            return [self.parameters(Cut(gone, kv_heads, mlp)) for gone in self.gone]
        none, one = (self.parameters(Cut(gone, kv_heads, mlp)) for gone in (0, 1))
        return [none - gone * (none - one) for gone in self.gone]

    def _widest(self, high: int, low: int, limit: int) -> int:
        """The most channels that fit; −1 where not even the fewest do. `high`, `low`: parameters with most and fewest.

        They grow by as many with every channel.
        """
        most, fewest = self.mlp[0], self.mlp[-1]
        if low > limit:
            return -1
        return next(count for count in self.mlp if high - (most - count) * (high - low) // max(1, most - fewest) <= limit)


def space(shapes: Shapes, path: str, *, layers: bool, heads: bool, channels: bool, multiple: int) -> Space:
    """What may go of a model of `shapes`, the last blocks first. Raises RecipeError for blocks that cannot be made narrower."""
    whole = width.of(shapes, path) if heads or channels else None
    kv_heads, mlp = [0], [0]
    if whole is not None:
        kv_heads, mlp = [whole.kv_heads], [whole.mlp]
        if heads:
            kv_heads = [count for count in range(whole.kv_heads, 0, -1) if _opens(shapes, whole, count, path)]
        if channels:
            step = multiple if whole.mlp % multiple == 0 else 1
            mlp = list(range(whole.mlp, 0, -step))
    order = range(shapes.layers - 1, -1, -1)
    return Space(shapes, whole, order, range(shapes.layers if layers else 1), kv_heads, mlp)


def _opens(shapes: Shapes, whole: Width, kv_heads: int, path: str) -> bool:
    """Whether transformers opens a model of so many heads."""
    try:
        width.check_config(shapes, whole, replace(whole, kv_heads=kv_heads), 1, path)
    except RecipeError:
        return False
    return True


def thinned(cuts: Sequence[Cut], most: int) -> list[Cut]:
    """At most so many of them, evenly from the first to the last."""
    if len(cuts) <= most:
        return list(cuts)
    return [cuts[round(place * (len(cuts) - 1) / (most - 1))] for place in range(most)]
