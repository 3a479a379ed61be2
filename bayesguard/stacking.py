"""Stacking: several predictors as one mixture, with the weights that held-out data give them.

Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Using stacking to average Bayesian predictive distributions. Bayesian
Analysis 13, section 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput, BadType
from bayesguard.predictor import Part, Predictor
from bayesguard.sampling import derive_seed

_GAP = 1e-7
_MAX_STEPS = 100_000


class StackingWeights(NamedTuple):
    """Weights on the simplex `[M]`, and how far at most their mean log score is below the best, in nats."""

    weights: Tensor
    gap: float


def stacking_weights(log_scores: Tensor) -> StackingWeights:
    """Return the weights that maximise the mean log score of the mixture (eq. 4 of the paper).

    The problem is concave. Each step of expectation maximisation raises the score; at the end the optimum is certified:
    no weights score more than `gap` better.

    Args:
        log_scores: Log densities of the answers under each predictor, in nats `[M, N]`.

    Examples:
        >>> stacking_weights(torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log()).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    scores = log_scores.double()
    if scores.dim() != 2 or not scores.numel() or bool(scores.isnan().any()):
        raise BadInput(f"log_scores must be numbers [M, N], got shape {tuple(scores.shape)}")
    best = scores.amax(0)
    if bool((best == -torch.inf).any()):
        row = int((best == -torch.inf).nonzero()[0])
        raise BadInput(f"row {row} has density zero under every predictor, so that no mixture explains it")
    # Densities relative to the best: no answer under- or overflows.
    relative = (scores - best).exp()
    weights = scores.new_full((len(scores),), 1 / len(scores))
    gap = torch.inf
    for _ in range(_MAX_STEPS):
        gradient = (relative / (weights @ relative)).mean(1)
        # By concavity no weights score more than this better (Cover, 1984, IEEE Transactions on Information Theory 30).
        gap = gradient.amax().log().item()
        if gap < _GAP:
            break
        weights = weights * gradient
        weights = weights / weights.sum()
    return StackingWeights(weights, max(gap, 0.0))


def stack(
    predictors: Mapping[str, Predictor] | Sequence[Predictor],
    validation: Any,
    *,
    batch_size: int | None = None,
    copy: bool = True,
) -> "Stacked":
    """Return the mixture of fitted predictors whose weights maximise the mean log score of held-out data.

    Args:
        predictors: Fitted predictors, by name or in order; each keeps its calibrators.
        validation: Held-out data, which none of them was fitted to.
        batch_size: Rows a batch, where the data are a pair of arrays.
        copy: False to work on the predictors themselves.

    Raises:
        BadInput: Fewer than two predictors, or an answer that none of them allows.
        BadType: Predictors of different kinds of answers.

    Examples:
        >>> import torch, bayesguard as bg
        >>> x, y = torch.randn(50, 2), torch.randint(0, 2, (50,))
        >>> stacked = stack({"a": bg.Deterministic(nn.Linear(2, 2)), "b": bg.Deterministic(nn.Linear(2, 2))}, (x, y))
        >>> stacked(x).probs.shape, sorted(stacked.named_weights)
        (torch.Size([50, 2]), ['a', 'b'])
    """
    named = dict(predictors) if isinstance(predictors, Mapping) else {str(k): p for k, p in enumerate(predictors)}
    if len(named) < 2:
        raise BadInput(f"stacking needs two predictors at least, got {len(named)}")
    for name, predictor in named.items():
        if not isinstance(predictor, Predictor):
            raise BadType(f"predictors[{name!r}] must be a bayesguard predictor, got {type(predictor).__name__}")
    rows, kinds = [], set()
    for predictor in named.values():
        predictive, targets = predictor.predict_with_targets(validation, batch_size=batch_size)
        kinds.add(type(predictive).__name__)
        rows.append(predictive.log_prob(targets).double().reshape(len(targets), -1).sum(1))
    if len(kinds) > 1:
        raise BadType(f"predictors answer in different kinds ({', '.join(sorted(kinds))}), and cannot be mixed")
    found = stacking_weights(torch.stack(rows))
    return Stacked(named, found.weights, found.gap, copy=copy)


class Stacked(Predictor):
    """A mixture of predictors with given weights; made by `stack`.

    Args:
        predictors: By name.
        weights: Their weights `[M]`.
        gap: How far at most the weights' score is below the best, in nats.
        copy: False to work on the predictors themselves.
    """

    weights: Tensor

    def __init__(
        self, predictors: Mapping[str, Predictor], weights: Tensor, gap: float = 0.0, *, copy: bool = True
    ) -> None:
        own = [deepcopy(predictor) if copy else predictor for predictor in predictors.values()]
        total = sum(predictor.num_samples for predictor in own)
        super().__init__(nn.ModuleList(own), own[0].likelihood, num_samples=total, copy=False, seed=own[0].seed)
        self.likelihood.requires_grad_(False)
        self.input_key, self.target_key = own[0].input_key, own[0].target_key
        self.names, self.gap = list(predictors), gap
        self.register_buffer("weights", weights.double())
        self.network.training = False

    @property
    def members(self) -> list[Predictor]:
        """The predictors."""
        return [member for member in self.network.children() if isinstance(member, Predictor)]

    @property
    def named_weights(self) -> dict[str, float]:
        """Each predictor's weight by its name."""
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    def predictives(self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any) -> Iterator[Part]:
        """Yield each predictor's calibrated answer, with its weight; those of weight zero are not asked."""
        for index, (member, weight) in enumerate(zip(self.members, self.weights.tolist(), strict=True)):
            if weight > 0:
                draws = self._member_samples(member, num_samples)
                own = derive_seed(seed, "member", index) % 2**62
                answer = member(*inputs, num_samples=draws, seed=own, offset=offset, **kwargs)
                yield Part(self._calibrated(answer, "draws"), weight)

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the predictors' raw outputs, one predictor after another; their weights are not in them."""
        for index, member in enumerate(self.members):
            own = derive_seed(seed, "member", index) % 2**62
            draws = self._member_samples(member, num_samples)
            yield from member.output_chunks(*inputs, num_samples=draws, seed=own, offset=offset, **kwargs)

    def _member_samples(self, member: Predictor, num_samples: int) -> int:
        return member.num_samples if num_samples == self.num_samples else max(1, num_samples // len(self.members))

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return the sum of the predictors' objectives on one batch; the weights are not trained by it."""
        return torch.stack([member.loss(inputs, targets, num_data=num_data) for member in self.members]).sum()

    def fit(self, data: Any, **settings: Any) -> Any:
        """Refuse: predictors are fitted first, and stacked on data that they have not seen."""
        raise BadInput("a stacked predictor is not fitted; fit its predictors, and stack them on held-out data")

    def draw(self, seed: int) -> nn.Module:
        """Return one function of one predictor, chosen with its weight."""
        point = derive_seed(seed, "which member") / 2**63
        index = int((self.weights.cumsum(0) <= point).sum())
        return self.members[min(index, len(self.members) - 1)].draw(seed)

    @property
    def is_exact(self) -> bool:
        return all(member.is_exact for member in self.members)

    @property
    def strategy(self) -> str:
        """How the last prediction was computed."""
        return "; ".join(f"{name}: {member.strategy}" for name, member in zip(self.names, self.members, strict=True))
