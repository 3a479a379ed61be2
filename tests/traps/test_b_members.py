"""Traps B1 to B10: ways in which ensembles are none, or harm the networks they are made of."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard import DeepEnsemble, Deterministic, MCDropout
from bayesguard.errors import BadInput, BadType, UnsupportedNetwork
from tests.networks import mlp, snapshot, unchanged


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise RuntimeError("broken layer")
        return x


def test_b1_weights_survive_an_exception() -> None:
    members = [nn.Sequential(nn.Linear(8, 3), Raises()) for _ in range(3)]
    before = [snapshot(member) for member in members]
    ensemble = DeepEnsemble(members, copy=False)
    for member in members:
        member.eval()
    with pytest.raises(RuntimeError, match="broken layer"):
        ensemble(torch.randn(5, 8))
    for state, member in zip(before, members, strict=True):
        member.train()
        assert unchanged(state, member)


def test_b2_members_differ_under_autocast() -> None:
    ensemble = DeepEnsemble([mlp() for _ in range(3)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = ensemble.draw_outputs(torch.randn(4, 8))
    assert outputs.float().std(dim=0).min() > 0


def test_b2_draws_differ_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = MCDropout(mlp(nn.Dropout(0.5)), num_samples=8).draw_outputs(torch.randn(4, 8))
    assert outputs.float().std(dim=0).max() > 0


class Token(nn.Module):
    """A raw parameter, which `reset_parameters` would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.token


def test_b3_identical_members_are_an_error() -> None:
    network = mlp()
    with pytest.raises(BadInput, match="members 0 and 1 have identical parameters"):
        DeepEnsemble([network, copy.deepcopy(network)])
    with pytest.raises(BadInput, match="members 0 and 2 have identical parameters"):
        DeepEnsemble([network, mlp(), network])


def test_b3_a_factory_gives_every_member_its_own_start() -> None:
    """Raw parameters included, although the factory ignores its seed; and the caller's state stays put."""
    torch.manual_seed(4)
    before = torch.get_rng_state()
    tokens = torch.stack([m.network.token for m in DeepEnsemble(lambda seed: Token(), num_members=4).members])  # type: ignore[misc]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.pdist(tokens).min() > 0
    again = torch.stack([m.network.token for m in DeepEnsemble(lambda seed: Token(), num_members=4).members])  # type: ignore[misc]
    assert torch.equal(tokens, again)


def test_b3_one_network_is_no_ensemble() -> None:
    with pytest.raises(BadType, match="members is one network"):
        DeepEnsemble(mlp())


def test_b3_a_list_has_the_length_that_was_asked_for() -> None:
    with pytest.raises(BadInput, match="num_members=5 was asked for, and members is a list of 2"):
        DeepEnsemble([mlp(), mlp()], num_members=5)
    assert len(DeepEnsemble([mlp(), mlp()], num_members=2).members) == 2


def test_b4_two_threads_leave_the_members_whole() -> None:
    import threading

    ensemble = DeepEnsemble([mlp(nn.Dropout(0.5)) for _ in range(3)])
    x = torch.randn(4, 8)
    want, state = ensemble(x).probs, snapshot(ensemble)
    wrong: list[bool] = []

    def predict() -> None:
        wrong.extend(not torch.equal(ensemble(x).probs, want) for _ in range(50))

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    assert unchanged(state, ensemble)


def test_b6_an_ensembles_outputs_are_its_members_in_eval_mode() -> None:
    members = [nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)) for _ in range(3)]
    x = torch.randn(5, 8)
    outputs = DeepEnsemble(members).draw_outputs(x)
    with torch.no_grad():
        want = torch.stack([member.eval()(x) for member in members])
    assert torch.equal(outputs, want)


def test_b7_tied_parameters_stay_tied() -> None:
    encode = nn.Linear(8, 8)
    decode = nn.Linear(8, 8)
    decode.weight = encode.weight
    own = Deterministic(nn.Sequential(encode, decode)).network
    assert own[0].weight is own[1].weight  # type: ignore[index]
    assert own[0].weight is not encode.weight  # type: ignore[index]


def test_b8_vmap_gives_every_draw_its_own_masks_and_repeats_itself() -> None:
    predictor = MCDropout(mlp(nn.Dropout(0.5)), strategy="vmap", num_samples=16)
    x = torch.randn(4, 8)
    first = predictor.draw_outputs(x)
    assert torch.pdist(first.flatten(1)).min() > 0
    assert torch.equal(first, predictor.draw_outputs(x))


def test_b10_members_of_different_kinds_are_no_obstacle() -> None:
    """Different classes, modes and frozen flags: nothing is stacked, so nothing is refused."""
    frozen = mlp()
    frozen.requires_grad_(False)
    members: list[Any] = [nn.Linear(8, 3), mlp(nn.Dropout(0.5)).train(), frozen]
    assert DeepEnsemble(members)(torch.randn(4, 8)).num_samples == 3


def test_b11_a_network_that_cannot_be_copied_is_named() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    with pytest.raises(UnsupportedNetwork, match=r"layer '1', a Stubborn.*copy=False"):
        Deterministic(nn.Sequential(nn.ReLU(), Stubborn(8, 3)))


def test_b12_members_move_and_save_with_the_ensemble() -> None:
    ensemble = DeepEnsemble([mlp() for _ in range(2)]).double()
    assert ensemble(torch.randn(3, 8).double()).probs.dtype == torch.float64
    assert len(ensemble.state_dict()) == 2 * 4
