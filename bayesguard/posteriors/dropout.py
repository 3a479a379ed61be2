"""MC dropout: the dropout of training is left on, and its masks are draws from an approximate posterior.

Y. Gal and Z. Ghahramani (2016). Dropout as a Bayesian approximation: representing model uncertainty in deep
learning. ICML. Each draw is one function: its masks are the same for every example unless asked otherwise.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from bayesguard.checks import check_number
from bayesguard.errors import BadInput, IdenticalDraws, RandomnessWarning
from bayesguard.likelihoods import Likelihood
from bayesguard.predictor import Options, Predictor
from bayesguard.sampling import Forward, Sampler, Strategy, Structure, silent_layers
from bayesguard.sampling.intercept import check_rate, mark_layers, watch_drop_paths


class MCDropout(Predictor):
    """A network whose dropout stays on: each draw is the network under one set of masks (eq. 6 of the paper).

    Covers every dropout module, `F.dropout`, dropout inside attention and recurrent layers, alpha and feature
    dropout, and modules named DropPath or StochasticDepth. No module changes its mode; batch statistics stay put.

    Args:
        network: The trained network; its outputs are raw.
        likelihood: What the outputs say about the target; None for `likelihoods.Categorical()`.
        p: A drop rate that replaces the network's own in predictions; None to keep them. `fit` trains with the network's own.
        layers: Names of the layers whose dropout is wanted (as in `network.named_modules()`); None for all.
        masks: "shared": one mask a draw for all examples, so that a draw is one function. "per_example": each
            example has masks of its own, as in training.
        balanced: Drop every unit equally often over each eight consecutive draws: every draw by itself is as in
            training, and their mean has a smaller error. False for independent draws.
        num_samples: Draws in one prediction.
        strategy: "auto" for the fastest, measured once for each kind of input, or one of "replay", "compact",
            "vmap", "fold", "fold_tail", "loop"; see `docs/engine.md`.
        memory_budget: Bytes that a group of draws may take; None for a quarter of what is free.
        compile: Compile a pass of many draws with `torch.compile`: it takes half a minute at the first prediction of
            each batch size, and pays on a GPU and for small layers. Never used where it does not give the same draws.
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
        balanced: bool = True,
        num_samples: int = 32,
        strategy: Strategy = "auto",
        memory_budget: int | None = None,
        compile: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(network, likelihood, num_samples=num_samples, **options)
        if masks not in ("shared", "per_example"):
            raise BadInput(f"masks must be 'shared' or 'per_example', got {masks!r}")
        if p is not None:
            check_rate(check_number(p, "p"))
            if p == 1:
                raise BadInput(
                    "p is 1, which drops everything, so that all draws would be the same; take a rate below 1"
                )
        selected = _check_layers(self.network, layers)
        watch_drop_paths(self.network)
        mark_layers(self.network, selected or frozenset())
        self._sampler = Sampler(
            per_example=masks == "per_example",
            p=p,
            selected=selected,
            balanced=balanced,
            strategy=strategy,
            memory_budget=memory_budget,
            compile=compile,
        )
        # Raised by the first prediction whose draws differ: a single dead input is then no reason to refuse.
        self._has_varied = False
        self._checked: set[Any] = set()

    def output_chunks(
        self,
        *inputs: Any,
        num_samples: int,
        seed: int,
        offset: int = 0,
        first_draw: int = 0,
        draws_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws from number `first_draw` on."""
        forward = Forward(self.network, inputs, kwargs, self.output)
        structure = self._checked_structure(forward, seed)
        start: Tensor | None = None
        varied: Tensor | None = None
        for outputs in self._sampler.chunks(
            forward, num_samples=num_samples, seed=seed, offset=offset, first=first_draw, chunk=draws_per_chunk
        ):
            if not self._has_varied and outputs.numel():
                start = outputs[:1].clone() if start is None else start
                differs = (outputs != start).any()
                varied = differs if varied is None else varied | differs
            yield outputs
        if varied is not None:
            self._has_varied = bool(varied)
        if (
            not self._has_varied
            and num_samples > 1
            and forward.num_rows
            and self._masks_differ(structure, seed, range(first_draw, first_draw + num_samples))
        ):
            raise IdenticalDraws(
                f"all {num_samples} draws are the same although {len(structure.calls)} dropout calls fired: the masks do "
                "not reach the output (a dropout whose result is not used, or features that are all zero)"
            )

    def draw(self, seed: int) -> nn.Module:
        """Return the network under the masks of one draw."""
        return _Draw(self, seed)

    can_continue = True

    @property
    def draws_per_block(self) -> int:
        """Consecutive draws that are balanced together; blocks are independent of one another."""
        return self._sampler.draws_per_block

    @property
    def is_positional(self) -> bool:
        """Whether an example's draws depend on where it stands in the data."""
        return self._sampler.per_example

    @property
    def strategy(self) -> str:
        """The strategy of the last prediction, with the reason for it."""
        plan = self._sampler.last_plan
        return "not used yet" if plan is None else f"{plan.strategy} ({plan.reason})" if plan.reason else plan.strategy

    def explain(self) -> str:
        """Say which strategy the last prediction used and why, what it costs, and what memory it takes."""
        plan = self._sampler.last_plan
        return super().explain() if plan is None else plan.explain(self.num_samples)

    def _checked_structure(self, forward: Forward, seed: int) -> Structure:
        structure = self._sampler.structure(forward, seed)
        if forward.signature in self._checked or not forward.num_rows:
            return structure
        silent = silent_layers(self._sampler, forward, seed)
        if not structure.is_random:
            raise IdenticalDraws(_explain_nothing_fired(self.network, silent))
        if silent:
            warnings.warn(
                f"dropout never fired in {', '.join(silent)}: its code may ask `if self.training`, which no call "
                "shows; use nn.Dropout there, or leave the layer out with layers=",
                RandomnessWarning,
                stacklevel=2,
            )
        self._checked.add(forward.signature)
        return structure

    def _masks_differ(self, structure: Structure, seed: int, draws: range) -> bool:
        """Tell whether masks differ at all: rare drops in few units may leave some draws whole by chance."""
        if structure.own_randomness:
            return True
        kept: list[list[Tensor]] = []
        for draw in draws:
            masks = self._sampler.masks(seed, [draw])
            kept.append([masks.keep(call.shape, call.rate, call.device) for call in structure.calls])
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
