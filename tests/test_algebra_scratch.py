"""Scratch memory: one piece for each slot and dtype, grown when it must."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from loramgr.algebra.scratch import Scratch, scratch_for


def test_a_slot_is_used_again_and_apart_from_others() -> None:
    scratch = Scratch()
    first = scratch.take("a", torch.empty(3, 4), torch.float32).fill_(1)
    scratch.take("b", torch.empty(3, 4), torch.float32).fill_(2)
    scratch.take("a", torch.empty(3, 4), torch.float64).fill_(3)
    again = scratch.take("a", torch.empty(5, 2), torch.float32)
    assert (again.shape, again.is_contiguous(), again.data_ptr()) == ((5, 2), True, first.data_ptr())
    assert again.unique().tolist() == [1]
    assert scratch.take("a", torch.empty(100), torch.float32).shape == (100,)


def test_a_thread_has_one_for_the_cpu_and_none_to_share() -> None:
    weight = torch.empty(1)
    others: list[Scratch] = []
    thread = Thread(target=lambda: others.append(scratch_for(weight)))
    thread.start()
    thread.join()
    assert scratch_for(weight) is scratch_for(weight)
    assert others != [scratch_for(weight)]
    assert scratch_for(weight.to("meta")) is not scratch_for(weight.to("meta"))


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad])
def test_memory_that_was_made_in_inference_mode_can_be_written_to_outside_of_it(inside: type) -> None:
    scratch, like = Scratch(), torch.empty(3, 4)
    with inside():
        scratch.take("a", like, torch.float32).fill_(1)
    for shape in (like.shape, (2, 2)):
        scratch.take("a", torch.empty(shape), torch.float32).fill_(2)
    with torch.inference_mode():
        assert scratch.take("a", like, torch.float32).fill_(3).sum() == 36
