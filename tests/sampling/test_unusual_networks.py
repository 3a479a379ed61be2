"""Networks that do what few do: their draws are those of a twin that does the same in the usual way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, RandomnessWarning

WIDTH, ROWS = 8, 5
WAYS = ("loop", "replay", "compact", "vmap", "fold", "fold_tail", "auto")


class Network(nn.Module):
    """A layer, something with dropout, and a head."""

    def __init__(self, between: Callable[..., Tensor], before: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.drop, self.late = nn.Dropout(0.5, inplace=True), nn.Dropout(0.25)
        self.before, self.between = before, between
        self.double().eval()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        logits: Tensor = self.head(self.late(self.between(self.first(self.before(x)), self.drop, **options)))
        return logits


def drawn(network: nn.Module, x: Tensor, way: Any = "loop", **options: Any) -> Tensor:
    return bg.MCDropout(network, strategy=way).draw_outputs(x, num_samples=11, **options)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dropped(hidden: Tensor, drop: nn.Module) -> Tensor:
    return F.dropout(hidden.relu(), 0.5, drop.training)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_a_network_changes_stay_the_users(way: str) -> None:
    """Every draw then starts from the inputs as they were given."""
    x = inputs(ROWS)
    given = x.clone()
    got = drawn(Network(dropped, before=lambda x: x.sub_(0.5).div_(2.0)), x, way)
    assert torch.equal(x, given)
    want = drawn(Network(dropped, before=lambda x: x.sub(0.5).div(2.0)), x)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def _ignored(hidden: Tensor, drop: nn.Module) -> Tensor:
    drop(hidden)
    return hidden


def _added(hidden: Tensor, drop: nn.Module) -> Tensor:
    return drop(hidden) + hidden


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("in_place", "times"), [(_ignored, 1), (_added, 2)])
def test_what_a_dropout_in_place_has_written_over_is_seen(
    in_place: Callable[..., Tensor], times: int, way: str
) -> None:
    """As in training, where the dropped units are dropped for whoever looks at them later."""
    x = inputs(ROWS)
    want = drawn(Network(lambda hidden, drop: times * F.dropout(hidden, 0.5, drop.training)), x)
    try:
        got = drawn(Network(in_place), x, way)
    except BadInput:
        assert way in ("vmap", "fold_tail")
    else:
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_a_dropout_in_place_does_not_compound() -> None:
    """Draw after draw the same share of units is dropped, and no parameter is written over."""
    scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
    network = Network(lambda hidden, drop: drop(hidden) * drop(scale.expand_as(hidden)))
    network.scale = scale
    draws = bg.MCDropout(network, copy=False).draw_outputs(inputs(ROWS), num_samples=64)
    assert torch.equal(scale, torch.ones(WIDTH, dtype=torch.float64))
    assert draws[:32].var(0).mean() / draws[32:].var(0).mean() == pytest.approx(1, abs=0.5)


def _steps_first(hidden: Tensor, drop: nn.Module) -> Tensor:
    return network_dropout(hidden.transpose(0, 1), drop).mean(0)


def network_dropout(hidden: Tensor, drop: nn.Module) -> Tensor:
    return drop(hidden.clone())


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_whose_rate_is_set_to_zero_leaves_the_masks_of_others_where_they_were(way: str) -> None:
    """Its mask had the examples along the second axis, that of the next one along the first."""
    x = inputs(1, 4).expand(ROWS, 4, WIDTH).contiguous()
    predictor = bg.MCDropout(Network(_steps_first), strategy=way)  # type: ignore[arg-type]
    try:
        predictor.draw_outputs(x, num_samples=11)
    except BadInput:
        assert way == "fold_tail"
        return
    predictor.network.drop.p = 0.0  # type: ignore[union-attr]
    got = predictor.draw_outputs(x, num_samples=11)
    fresh = Network(_steps_first)
    fresh.drop.p = 0.0
    assert got.std(1).max() < 1e-12  # equal examples, one mask
    assert torch.allclose(got, drawn(fresh, x), rtol=0, atol=1e-12)


def _by_option(hidden: Tensor, drop: nn.Module, mode: str = "rows") -> Tensor:
    if mode == "steps":
        return _steps_first(hidden, drop)
    if mode == "mixed":
        hidden = network_dropout(hidden, drop)
        return (hidden - hidden.mean(0)).mean(1)
    return network_dropout(hidden, drop).mean(1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["steps", "mixed"])
def test_an_option_may_choose_another_way_through_the_network(mode: str, way: str) -> None:
    x = inputs(ROWS, 4)
    want = drawn(Network(_by_option), x, mode=mode)
    predictor = bg.MCDropout(Network(_by_option), strategy=way)  # type: ignore[arg-type]
    try:
        predictor.draw_outputs(x, num_samples=11)
        got = predictor.draw_outputs(x, num_samples=11, mode=mode)
    except BadInput:
        assert way in ("fold", "fold_tail", "vmap")
    else:
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


class Padded(nn.Module):
    """Attention whose keys may be padding, by a module (with or without weights) or by the function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.head = kind, nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)
        self.double().eval()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.kind == "function":
            keys = ~padding[:, None, :].expand(-1, x.shape[1], -1)
            attended = F.scaled_dot_product_attention(x, x, x, attn_mask=keys, dropout_p=0.3 * self.training)
        else:
            attended, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        logits: Tensor = self.head(F.dropout(attended, 0.3, self.training).mean(1))
        return logits


@pytest.mark.parametrize("way", ["loop", "replay", "auto"])
@pytest.mark.parametrize("kind", ["function", "module"])
def test_queries_that_attend_to_nothing_get_what_torch_gives_them(kind: str, way: Any) -> None:
    """Zeros, where a softmax over nothing would be NaN: the others are those of a batch without such rows."""
    network, x = Padded(kind), inputs(ROWS, 4)
    padding = torch.zeros(ROWS, 4, dtype=torch.bool)
    padding[2], padding[3, 1:] = True, True
    assert network(x, padding).isfinite().all()
    got = bg.MCDropout(network, strategy=way).draw_outputs(x, padding, num_samples=11)
    assert got.isfinite().all()
    others = [0, 1, 3, 4]
    want = bg.MCDropout(network, strategy="loop").draw_outputs(x[others], padding[others], num_samples=11)
    assert torch.allclose(got[:, others], want, rtol=0, atol=1e-12)
    if kind == "function":  # zeros, dropped or not: the head's bias is left
        assert torch.equal(got[:, 2], network.head.bias.expand(11, 3))


@pytest.mark.parametrize("way", ["loop", "auto"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "noise",
    [
        lambda hidden: torch.distributions.Gamma(torch.ones_like(hidden), 1.0).sample(),
        lambda hidden: torch.distributions.Dirichlet(torch.ones_like(hidden)).sample(),
        lambda hidden: torch.binomial(torch.full_like(hidden, 5.0), torch.full_like(hidden, 0.5)),
        lambda hidden: F.rrelu(hidden, training=True),
        lambda hidden: torch.native_dropout(hidden, 0.5, True)[0],
    ],
)
def test_random_numbers_that_have_no_name_here_follow_the_seed(
    noise: Callable[[Tensor], Tensor], late: bool, way: Any
) -> None:
    def between(hidden: Tensor, drop: nn.Module) -> Tensor:
        return noise(network_dropout(hidden, drop)) if late else network_dropout(hidden + noise(hidden), drop)

    x, network = inputs(ROWS), Network(between)
    state = torch.get_rng_state()
    first, second = drawn(network, x, way), drawn(network, x, way)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert first.std(0).min() > 1e-3


def _by_number(hidden: Tensor, drop: nn.Module) -> Tensor:
    hidden = network_dropout(hidden, drop)
    return hidden * 2 if hidden[0, 0].item() > 0 else hidden


@pytest.mark.parametrize("way", WAYS)
def test_a_number_that_the_network_reads_is_that_of_one_draw(way: str) -> None:
    """In a batch of all draws the first row is that of the first of them."""
    x = inputs(ROWS)
    want = drawn(Network(_by_number), x)
    assert len((want[:, 0] / drawn(Network(network_dropout), x)[:, 0]).round(decimals=6).unique(dim=0)) > 1
    try:
        got = drawn(Network(_by_number), x, way)
    except BadInput:
        assert way in ("vmap", "fold", "fold_tail")
    else:
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["loop", "replay", "auto"])
def test_no_draw_is_lost_where_plan_after_plan_fails(way: str) -> None:
    """Its dropout has the examples along one axis or the other, as a number of the draw itself says."""

    def between(hidden: Tensor, drop: nn.Module) -> Tensor:
        hidden = network_dropout(hidden, drop)
        turned = hidden.transpose(0, 1) if hidden[0, 0, 0].item() > 0 else hidden
        return F.dropout(turned, 0.5, drop.training).reshape(hidden.shape).mean(1)

    with pytest.warns(RandomnessWarning):
        draws = drawn(Network(between), inputs(ROWS, 4), way)
    assert draws.shape == (11, ROWS, 3)
    assert draws.std(0).min() > 1e-3


class TakesWeights(nn.Module):
    """Its second input has as many rows as there are examples, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.drop(x) @ weights


def test_an_error_on_other_rows_than_were_given_says_so() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        bg.MCDropout(TakesWeights())(torch.randn(8, 8), torch.randn(8, 3))
    assert "2 copies of the first example" in "".join(caught.value.__notes__)
    bg.MCDropout(TakesWeights())(torch.randn(9, 8), torch.randn(8, 3))
