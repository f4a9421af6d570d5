"""A layer of transformers' cache whose memory grows by chunks of columns, in place."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

CHUNK = 64  # columns


class GrowingLayer(DynamicLayer):
    """`DynamicLayer`, which copies all keys and values for each token that is added.

    `keys` and `values`, (rows, heads, columns, width), are views of the columns in use of two larger tensors.
    """

    keys: Any
    values: Any

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._rooms: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds columns (rows, heads, new, width); returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        end = used + key_states.shape[-2]
        if not self._holds(end):
            rooms = [new.new_empty(*new.shape[:-2], end + CHUNK, new.shape[-1]) for new in (key_states, value_states)]
            if used:
                rooms[0][..., :used, :], rooms[1][..., :used, :] = self.keys, self.values
            self._rooms = rooms
        keys, values = self._rooms
        keys[..., used:end, :], values[..., used:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def _holds(self, columns: int) -> bool:
        """Whether what is cached stands at the beginning of the rooms (others may have set it), with room enough."""
        return (
            len(self._rooms) > 0
            and self._rooms[0].shape[-2] >= columns
            and all(
                room.data_ptr() == view.data_ptr() and room.stride() == view.stride() and len(room) == len(view)
                for room, view in zip(self._rooms, (self.keys, self.values), strict=True)
            )
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only keep the rows `indices`."""
        used = self.get_seq_length()
        if not used:
            return
        if self._holds(used):
            self._rooms = [room.index_select(0, indices) for room in self._rooms]
            self.keys, self.values = (room[..., :used, :] for room in self._rooms)
        else:
            super().batch_select_indices(indices)
