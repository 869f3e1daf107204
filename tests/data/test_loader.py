"""Orders of epochs, and a loader that goes on behind its last batch."""

from __future__ import annotations

import itertools

import torch

from bad_neurons.data.loader import EpochOrder, ResumableLoader


def loader(count=7, seed=3):
    return ResumableLoader(range(count), EpochOrder(range(count), seed))


def at(epoch, read, count=7):
    return {"epoch": epoch, "read": read, "batches": count, "processes": 1}


def test_an_order_of_each_epoch():
    order = EpochOrder(range(7), 3)
    orders = []
    for epoch in (0, 1, 1, 0):
        order.set_epoch(epoch)
        orders.append(list(order))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]
    assert (orders[2], orders[3]) == (orders[1], orders[0])


def test_going_on_reads_what_is_left():
    for epoch, read in itertools.product((0, 2), range(1, 7)):
        whole, cut, resumed = loader(), loader(), loader()
        for one in (whole, cut, resumed):
            one.sampler.set_epoch(epoch)
        expected = list(whole)
        assert list(itertools.islice(cut, read)) == expected[:read]
        assert cut.state_dict() == at(epoch, read)
        resumed.load_state_dict(cut.state_dict())
        assert resumed.state_dict() == cut.state_dict()  # also before it goes on
        assert list(resumed) == expected[read:]
        assert resumed.state_dict() == at(epoch, 7)


def test_another_epoch_is_read_from_its_beginning():
    one = loader()
    one.load_state_dict(at(0, 5))
    one.sampler.set_epoch(1)
    assert len(list(one)) == 7
    one.load_state_dict(at(1, 4))
    iterator = iter(one)  # Lightning makes it before it tells the epoch
    one.sampler.set_epoch(2)
    assert len(list(iterator)) == 7


def test_the_global_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), before)
