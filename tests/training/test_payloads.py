"""Payloads and memories by hand: what is sent, what is kept, and what the server has."""

import pytest
import torch

from fedlq_ray.training.payloads import MEMORIES, PAYLOADS


def coarse(x):
    """A quantizer: whole numbers."""
    return x.round()


@pytest.mark.parametrize("feedback", MEMORIES)
def test_the_server_has_all_that_was_to_arrive_but_for_the_last_error(feedback):
    """Error feedback owes the last loss in the sum over rounds; EF21's and CAFe's server is within one error of x."""
    memory, kept, tracked = MEMORIES[feedback], None, None
    wanted, received = torch.zeros(3), torch.zeros(3)
    for x in (torch.tensor([0.4, 1.3, -0.6]), torch.tensor([0.4, 0.3, -0.6]), torch.tensor([0.4, 2.3, 0.2])):
        sent = memory.before(x, kept)
        arrived = coarse(sent)
        kept = memory.after(sent, arrived, kept)
        value, tracked = memory.at_server(arrived, tracked)
        wanted, received = wanted + x, received + value
        if memory.common:  # of one client, the mean is its own
            assert kept is None and tracked is None
            kept = tracked = value
    if feedback is False:
        assert kept is None and tracked is None and torch.equal(value, coarse(x))
    elif feedback is True:
        torch.testing.assert_close(received + kept, wanted)
        assert tracked is None
    else:
        assert torch.equal(kept, tracked) and torch.equal(value, tracked)  # client and server hold the same
        assert float((value - x).abs().max()) <= 0.5


def test_a_payload_gives_back_the_update():
    weights, update = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5])
    for kind, value in (("update", update), ("model", torch.tensor([1.25, -1.5]))):
        payload = PAYLOADS[kind]
        assert torch.equal(payload.of(weights, update), value)
        assert torch.equal(payload.change(value.double(), weights), update.double())
    assert torch.equal(PAYLOADS["update"].probed(weights, update), update)
    assert torch.equal(PAYLOADS["model"].probed(weights, update), weights)
