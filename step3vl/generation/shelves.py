"""Where keys and values are kept while sequences come and go: shelves of slots, each shelf for another length.

A slot of a shelf holds as many tokens as every other one there, so that a shelf is attended in one product. The slots
in use are always the first ones. A stretch that outgrows its shelf moves to one that is twice as wide.

Shapes: L layers, K key heads, d width of a head; a store is [L,2,slots,K,width,d], keys first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False, slots=True, kw_only=True)
class Stretch:
    """Tokens in a row whose keys and values are kept together."""

    length: int = 0
    """Tokens that are kept."""
    shelf: Shelf | None = None
    slot: int = 0


class Shelf:
    """Stretches of up to `width` tokens."""

    def __init__(self, width: int, num_layers: int):
        self.width, self.num_layers = width, num_layers
        self.stretches: list[Stretch] = []
        """Of each slot in use."""
        self.store: Tensor | None = None
        """None until its shape is known, and whenever the shelf is empty."""
        self.keys: tuple[Tensor, ...] = ()  # of each layer [slots,K,width,d]
        self.values: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.stretches)

    @property
    def longest(self) -> int:
        return max((stretch.length for stretch in self.stretches), default=0)

    def put(self, stretches: Iterable[Stretch]) -> None:
        """Give each a slot, behind those in use; where the shape is not known yet, `allocate` makes the room later."""
        for stretch in stretches:
            stretch.shelf, stretch.slot = self, len(self.stretches)
            self.stretches.append(stretch)
        if self.store is not None:
            self.allocate(self.store)

    def take(self, stretches: Sequence[Stretch]) -> None:
        """Free their slots; stretches from the end fill the gaps."""
        gone = set(stretches)
        num_left = len(self) - len(gone)
        gaps = sorted(stretch.slot for stretch in stretches if stretch.slot < num_left)
        last = [stretch for stretch in self.stretches[num_left:] if stretch not in gone]
        if gaps and self.store is not None:
            moved = self.store[:, :, [stretch.slot for stretch in last], :, : self.longest]
            self.store[:, :, gaps, :, : self.longest] = moved
        for slot, stretch in zip(gaps, last, strict=True):
            stretch.slot, self.stretches[slot] = slot, stretch
        del self.stretches[num_left:]
        for stretch in stretches:
            stretch.shelf = None
        if not self.stretches:
            self.store, self.keys, self.values = None, (), ()

    def allocate(self, like: Tensor) -> None:
        """Room for all slots in use; `like` is any tensor [...,K,tokens,d] of the right device and format.

        Where nothing was written there are zeros: weights of 0 must find numbers there.
        """
        have = 0 if self.store is None else self.store.shape[2]
        if have >= len(self):
            return
        shape = (self.num_layers, 2, max(len(self), 2 * have), like.shape[-3], self.width, like.shape[-1])
        store = like.new_zeros(shape)
        if self.store is not None:
            store[:, :, :have] = self.store
        self.store = store
        self.keys, self.values = store[:, 0].unbind(0), store[:, 1].unbind(0)


def move(stretches: Sequence[Stretch], source: Shelf, target: Shelf) -> None:
    """Carry stretches, of any slots of `source`, over to a wider shelf."""
    if source.store is None:
        raise ValueError("a shelf without keys and values has nothing to carry over")
    slots, store = [stretch.slot for stretch in stretches], source.store
    start, width = len(target), source.width
    kept = [store[layer][:, slots] for layer in range(source.num_layers)]  # each [2,n,K,width,d]
    source.take(stretches)
    target.put(stretches)
    target.allocate(kept[0])
    if target.store is not None:
        for layer, pair in enumerate(kept):
            target.store[layer][:, start : len(target), :, :width] = pair
