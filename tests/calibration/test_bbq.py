"""Bayesian binning into quantiles, against integrals and loops in float64, and against a map that is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import betaln
from torch import Tensor, nn

from bayesguard.calibration import BBQ
from bayesguard.calibration.bbq import binned
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import CategoricalPredictive, Predictive

SCORES = torch.tensor([0.1, 0.15, 0.3, 0.55, 0.6, 0.8, 0.92], dtype=torch.float64)
HITS = torch.tensor([0, 1, 0, 1, 0, 1, 1])


def answers(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities that are too sure, the answers, and the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1.5 * torch.randn(count, generator=generator, dtype=torch.float64)
    return (3 * odds).sigmoid(), odds.sigmoid().bernoulli(generator=generator).long(), odds.sigmoid()


def test_marginal_likelihood_is_the_integral_of_the_likelihood_over_the_prior() -> None:
    edges = torch.tensor([0.2, 0.58], dtype=torch.float64)
    rates, evidence = binned(edges, SCORES, torch.cat([torch.zeros(1), HITS.cumsum(0)]).double())
    wanted = 0.0
    for b, (low, high, true, false) in enumerate([(0.0, 0.2, 1, 1), (0.2, 0.58, 1, 1), (0.58, 1.0, 2, 1)]):
        a, c = 2 / 3 * (low + high) / 2, 2 / 3 * (1 - (low + high) / 2)
        # With the prior's singular factors as the weight of the quadrature.
        weight = {"weight": "alg", "wvar": (a - 1, c - 1)}
        whole = quad(lambda t, m=true, n=false: t**m * (1 - t) ** n, 0, 1, **weight)[0]
        first = quad(lambda t, m=true, n=false: t ** (m + 1) * (1 - t) ** n, 0, 1, **weight)[0]
        wanted += math.log(whole) - betaln(a, c)
        assert float(rates[b]) == pytest.approx(first / whole, rel=1e-9)
    assert float(evidence) == pytest.approx(wanted, rel=1e-9)


def test_the_average_is_a_loop_over_binnings() -> None:
    """Seven scores without ties: from 1 to ceil(10 * 7 ** (1/3)) = 20 bins by rank, equal binnings once."""
    scores, hits = SCORES.numpy(), HITS.numpy()
    found, logs = [], []
    seen = set()
    for bins in range(1, 21):
        of_rank = [int((rank + 0.5) * bins / 7) for rank in range(7)]
        cuts = tuple(r for r in range(6) if of_rank[r] != of_rank[r + 1])
        if cuts in seen:
            continue
        seen.add(cuts)
        ends = [0.0, *((scores[r] + scores[r + 1]) / 2 for r in cuts), 1.0]
        rate, log = np.empty(7), 0.0
        for low, high in itertools.pairwise(ends):
            inside = (scores > low) & (scores <= high)
            a, c = (2 / (len(ends) - 1) * m for m in ((low + high) / 2, 1 - (low + high) / 2))
            n, h = inside.sum(), hits[inside].sum()
            log += betaln(a + h, c + n - h) - betaln(a, c)
            rate[inside] = (h + a) / (n + a + c)
        found.append(rate)
        logs.append(log)
    weights = np.exp(np.array(logs) - max(logs))
    wanted = (weights[:, None] * found).sum(0) / weights.sum()
    pred = Predictive.from_probs(SCORES)
    np.testing.assert_allclose(BBQ().fit(pred, HITS)(pred).probs.numpy(), (7 * wanted + 0.5) / 8, rtol=1e-10)


def test_between_the_scores_every_binning_says_its_own_bin() -> None:
    pred, new = Predictive.from_probs(SCORES), torch.tensor([0.0, 0.22, 0.58, 0.999, 1.0], dtype=torch.float64)
    bbq = BBQ().fit(pred, HITS)
    nearest = {0: 0, 1: 1, 2: 4, 3: 6, 4: 6}  # midway edges: 0.225 between 0.15 and 0.3, 0.575 between 0.55 and 0.6
    found, at = bbq(Predictive.from_probs(new)).probs, bbq(pred).probs
    torch.testing.assert_close(found, at[list(nearest.values())])


def test_new_answers_are_calibrated_and_were_not() -> None:
    """Gaps of tenths in the standard error of the mean of as many answers as the fit had there."""
    probs, targets, _ = answers(20_000, 0)
    bbq = BBQ().fit(Predictive.from_probs(probs), targets)
    new, _, truth = answers(20_000, 1)
    found = bbq(Predictive.from_probs(new)).probs

    def gaps(values: Tensor) -> Tensor:
        rows = torch.stack(values.argsort().chunk(10))
        mean = truth[rows].mean(-1)
        return (mean - values[rows].mean(-1)).abs() / (mean * (1 - mean) / rows.shape[1]).sqrt()

    assert gaps(found).max() < 5
    assert gaps(new).max() > 15


def test_classes_are_one_against_the_rest_and_nothing_is_impossible() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 300, 4, generator=generator, dtype=torch.float64)
    pred = CategoricalPredictive(logits)
    targets = torch.randint(3, (300,), generator=generator)
    with pytest.warns(CalibrationWarning, match="1 of 4 maps saw one outcome only"):
        found = BBQ().fit(pred, targets)(pred)
    each = []
    for k in range(4):
        alone = Predictive.from_probs(pred.probs[:, k])
        fitted = BBQ()
        if k == 3:
            with pytest.warns(CalibrationWarning):
                fitted.fit(alone, targets == k)
        else:
            fitted.fit(alone, targets == k)
        each.append((301 * fitted(alone).probs - 0.5 + 0.25) / 301)
    columns = torch.stack(each, -1)
    torch.testing.assert_close(found.probs, columns / columns.sum(-1, keepdim=True), rtol=1e-8, atol=1e-12)
    assert (found.probs > 0).all()
    assert found.log_prob(targets).isfinite().all()


@pytest.mark.parametrize("keep", [False, True])
def test_state_order_of_rows_and_kept_labels(keep: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 3, generator=generator)
    pred, targets = Predictive.from_logits(logits), (logits / 3).softmax(-1).multinomial(1, generator=generator)[:, 0]
    order = torch.randperm(200, generator=generator)
    fitted = nn.ModuleList([BBQ(keep_labels=keep).fit(pred, targets)])
    fresh = nn.ModuleList([BBQ(keep_labels=keep)])
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh[0](pred).probs, fitted[0](pred).probs)
    torch.testing.assert_close(BBQ(keep_labels=keep).fit(pred[order], targets[order])(pred).probs, fresh[0](pred).probs)
    if keep:
        assert torch.equal(fitted[0](pred).labels, pred.labels)


def test_ties_constants_and_inputs_that_will_not_do() -> None:
    same = Predictive.from_probs([0.25] * 8)
    assert BBQ().fit(same, [0, 1] * 4)(same).probs.unique().numel() == 1
    ends = Predictive.from_probs([0.0, 0.0, 1.0, 1.0])
    assert BBQ().fit(ends, [0, 0, 1, 1])(ends).log_prob([1, 1, 0, 0]).isfinite().all()
    with pytest.raises(NotFitted):
        BBQ()(same)
    with pytest.raises(BadInput, match="targets has shape"):
        BBQ().fit(same, [0, 1])
    with pytest.raises(BadType, match="for classification"):
        BBQ().fit(Predictive.from_normal(torch.zeros(3), 1.0), torch.zeros(3))
    with pytest.raises(BadType, match="keep_labels"):
        BBQ(keep_labels=1)  # type: ignore[arg-type]
