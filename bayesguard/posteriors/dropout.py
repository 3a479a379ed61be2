"""MC dropout: the dropout of training is left on, and its masks are draws from an approximate posterior.

Y. Gal and Z. Ghahramani (2016). Dropout as a Bayesian approximation: representing model uncertainty in deep
learning. ICML. Each draw is one function: its masks are the same for every example unless asked otherwise.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput, IdenticalDraws, RandomnessWarning
from bayesguard.likelihoods import Likelihood
from bayesguard.predictor import Options, Predictor
from bayesguard.sampling import Forward, Plan, Sampler, silent_dropout
from bayesguard.sampling.engine import Strategy
from bayesguard.sampling.intercept import check_rate, mark_layers, watch_drop_paths


class MCDropout(Predictor):
    """A network whose dropout stays on: each draw is the network under one set of masks (eq. 6 of the paper).

    Covers every dropout module, `F.dropout`, dropout inside attention and recurrent layers, alpha and feature
    dropout, and modules named DropPath or StochasticDepth. No module changes its mode; batch statistics stay put.

    Args:
        network: The trained network; its outputs are raw.
        likelihood: What the outputs say about the target; None for `likelihoods.Categorical()`.
        p: A drop rate that replaces the network's own; None to keep them.
        layers: Names of the layers whose dropout is wanted (as in `network.named_modules()`); None for all.
        masks: "shared": one mask a draw for all examples, so that a draw is one function. "per_example": each
            example has masks of its own, as in training.
        num_samples: Draws in one prediction.
        strategy: "auto", or one of "replay", "vmap", "fold", "loop"; see `docs/engine.md`.
        memory_budget: Bytes that a group of draws may take; None for a quarter of what is free.
        options: `output`, `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Raises:
        IdenticalDraws: At the first prediction, when no dropout fired or none reaches the output.

    Examples:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3))
        >>> pred = MCDropout(network, num_samples=100)(torch.ones(2, 4))
        >>> pred.num_samples, bool((pred.uncertainty().epistemic > 0).all())
        (100, True)
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        p: float | None = None,
        layers: Sequence[str] | None = None,
        masks: Literal["shared", "per_example"] = "shared",
        num_samples: int = 32,
        strategy: Strategy = "auto",
        memory_budget: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(network, likelihood, num_samples=num_samples, **options)
        if masks not in ("shared", "per_example"):
            raise BadInput(f"masks must be 'shared' or 'per_example', got {masks!r}")
        if p is not None:
            check_rate(p)
        selected = _check_layers(self.network, layers)
        watch_drop_paths(self.network)
        mark_layers(self.network, selected or frozenset())
        self._sampler = Sampler(
            per_example=masks == "per_example",
            p=p,
            selected=selected,
            strategy=strategy,
            memory_budget=memory_budget,
        )
        # Raised by the first prediction whose draws differ: a single dead input is then no reason to refuse.
        self._has_varied = False

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws."""
        forward = Forward(self.network, inputs, kwargs, self.output)
        plan = self._checked_plan(forward, seed)
        first: Tensor | None = None
        for outputs in self._sampler.chunks(forward, num_samples=num_samples, seed=seed, offset=offset):
            if not self._has_varied and outputs.numel():
                first = outputs[:1] if first is None else first
                self._has_varied = bool((outputs != first).any())
            yield outputs
        if (
            not self._has_varied
            and num_samples > 1
            and forward.num_rows
            and self._masks_differ(plan, seed, num_samples)
        ):
            raise IdenticalDraws(
                f"all {num_samples} draws are the same although {len(plan.calls)} dropout calls fired: the masks do "
                "not reach the output (a dropout whose result is not used, or features that are all zero)"
            )

    def draw(self, seed: int) -> nn.Module:
        """Return the network under the masks of one draw."""
        return _Draw(self, seed)

    @property
    def strategy(self) -> str:
        """The strategy of the last prediction, with the reason for it."""
        plan = self._sampler.last_plan
        return "not used yet" if plan is None else f"{plan.strategy} ({plan.reason})" if plan.reason else plan.strategy

    def _checked_plan(self, forward: Forward, seed: int) -> Plan:
        known = forward.signature in self._sampler.plans
        plan = self._sampler.plan(forward, seed)
        if known or not forward.num_rows:
            return plan
        silent = silent_dropout(self._sampler, forward, seed)
        if not plan.is_random:
            raise IdenticalDraws(_explain_nothing_fired(self.network, silent))
        if silent:
            warnings.warn(
                f"dropout never fired in {', '.join(silent)}: its code may ask `if self.training`, which no call "
                "shows; use nn.Dropout there, or leave the layer out with layers=",
                RandomnessWarning,
                stacklevel=2,
            )
        return plan

    def _masks_differ(self, plan: Plan, seed: int, num_samples: int) -> bool:
        """Tell whether masks differ at all: rare drops in few units may leave some draws whole by chance."""
        if plan.own_randomness:
            return True
        kept: list[list[Tensor]] = []
        for draw in range(num_samples):
            masks = self._sampler.masks(seed, [draw])
            kept.append([masks.keep(call.shape, call.rate, call.device) for call in plan.calls])
        return any(not torch.equal(a, b) for draw in kept[1:] for a, b in zip(kept[0], draw, strict=True))


class _Draw(nn.Module):
    """One function of an MC-dropout posterior."""

    def __init__(self, predictor: MCDropout, seed: int) -> None:
        super().__init__()
        self.network, self.output, self.seed = predictor.network, predictor.output, seed
        self._sampler = predictor._sampler

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        return self._sampler.once(Forward(self.network, inputs, kwargs, self.output), seed=self.seed)


def _check_layers(network: nn.Module, layers: Sequence[str] | None) -> frozenset[str] | None:
    if layers is None:
        return None
    names = dict(network.named_modules())
    unknown = [name for name in layers if name not in names]
    if isinstance(layers, str) or unknown or not layers:
        raise BadInput(
            f"layers must be names of the network's modules, got {layers!r}; it has {', '.join(filter(None, names))}"
        )
    return frozenset(layers)


def _explain_nothing_fired(network: nn.Module, silent: list[str]) -> str:
    zero = [name for name, module in network.named_modules() if getattr(module, "p", None) == 0.0]
    causes = []
    if silent:
        causes.append(f"{', '.join(silent)} ran without a call to a dropout function (code behind `if self.training`?)")
    if zero:
        causes.append(f"{', '.join(zero)} has p=0: give MCDropout a rate, p=0.1")
    if not causes:
        causes.append("the network has no dropout: train one with dropout, or use DeepEnsemble")
    return "no dropout fired, so every draw would be the same and the uncertainty a confident zero; " + "; ".join(
        causes
    )
