"""Scratch memory: one piece for each slot and dtype, grown when it must."""

from __future__ import annotations

import torch

from loramgr.algebra.scratch import Scratch


def test_a_slot_is_used_again_and_apart_from_others() -> None:
    scratch = Scratch()
    first = scratch.take("a", torch.empty(3, 4), torch.float32).fill_(1)
    scratch.take("b", torch.empty(3, 4), torch.float32).fill_(2)
    scratch.take("a", torch.empty(3, 4), torch.float64).fill_(3)
    again = scratch.take("a", torch.empty(5, 2), torch.float32)
    assert (again.shape, again.is_contiguous(), again.data_ptr()) == ((5, 2), True, first.data_ptr())
    assert again.unique().tolist() == [1]
    assert scratch.take("a", torch.empty(100), torch.float32).shape == (100,)
