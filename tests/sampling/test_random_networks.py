"""Every way to draw, on networks put together at random: the plain loop's draws, or a refusal; also after changes."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, RandomnessWarning
from bayesguard.sampling import Forward, Sampler
from tests.random_networks import RandomNetwork

SEEDS = range(60)
WAYS = ("replay", "compact", "vmap", "fold", "fold_tail", "auto")


def drawn(network: nn.Module, x: Tensor, strategy: str, number: int, seed: int = 3, **settings: bool) -> Tensor:
    sampler = Sampler(strategy=strategy, **settings)  # type: ignore[arg-type]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomnessWarning)
        return torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=number, seed=seed)))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_way_draws_what_the_loop_does_or_is_refused(seed: int) -> None:
    network = RandomNetwork(seed)
    settings = {"per_example": network.choose.random() < 0.3, "balanced": network.choose.random() < 0.8}
    x, number = network.data(network.choose.choice((1, 2, 6, 9))), network.choose.choice((3, 8, 17))
    before, given = copy.deepcopy(network.state_dict()), x.clone()
    want = drawn(network, x, "loop", number, **settings)
    # The same with other masks, or else nothing would be compared.
    assert distance(drawn(network, x, "loop", number, seed=4, **settings), want) > 1e-4
    for way in WAYS:
        try:
            got = drawn(network, x, way, number, **settings)
        except BadInput:  # refused, as a way that is asked for and cannot be used
            assert way != "auto"
        else:
            assert distance(got, want) < 1e-10, (way, network)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_predictor_follows_every_change(seed: int) -> None:
    network = RandomNetwork(seed)
    choose = network.choose
    predictor = bg.MCDropout(network, copy=False)
    x = network.data(7)
    for change in ("nothing", "rows", "weights", "data", "rate", "hook"):
        if change == "rows":
            x = network.data(5)
        elif change == "weights":
            with torch.no_grad():
                network.head.weight.mul_(1.5)
        elif change == "data":
            for parameter in network.parameters():
                parameter.data = parameter.data * 0.9
        elif change == "rate":
            choose.choice([module for module in network.modules() if isinstance(module, nn.Dropout)]).p = 0.35
        elif change == "hook":
            network.last.register_forward_hook(lambda module, given, output: output.flip(0))
        generator = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomnessWarning)
            got = predictor.draw_outputs(x, num_samples=11, seed=3)
        assert torch.equal(generator, torch.get_rng_state())
        assert distance(got, drawn(network, x, "loop", 11)) < 1e-10, (change, network)
