"""On every network of the contract suite, replay computes once what no draw changes, and gives the loop's very bits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bayesguard as bg
from bayesguard.data import split_inputs
from tests.contract.test_contract import CASES

# Dropout before the only layer; and attention as the first layer, which counts as one random call with its projections.
DRAWS_FIRST = {"functional dropout", "attention"}


class Products(TorchDispatchMode):
    """Counts matrix products, convolutions, look-ups and recurrent steps."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in {"addmm", "mm", "bmm", "convolution", "embedding", "mkldnn_rnn_layer"}
        return func(*args, **(kwargs or {}))


def drawn(case: str, strategy: Any, num_samples: int) -> tuple[Tensor, int]:
    """Return the draws of one network, and the products that they took once the network was known."""
    make, inputs, _, options = CASES[case]
    torch.manual_seed(0)
    predictor = bg.MCDropout(make(), strategy=strategy, **options)
    positional, keywords = split_inputs(inputs)
    predictor.draw_outputs(*positional, num_samples=num_samples, **keywords)
    with Products() as products:  # type: ignore[no-untyped-call]
        outputs = predictor.draw_outputs(*positional, num_samples=num_samples, **keywords)
    return outputs, products.count


@pytest.mark.parametrize("case", CASES)
def test_replay_computes_the_prefix_once(case: str) -> None:
    (outputs, few), (more_outputs, more) = drawn(case, "replay", 1), drawn(case, "replay", 5)
    (_, once), (want, looped) = drawn(case, "loop", 1), drawn(case, "loop", 5)
    assert torch.equal(more_outputs, want)
    assert torch.equal(outputs, want[:1])
    # The first draw is a whole pass in either case; each further one of the loop is another.
    assert few == once
    assert looped == 5 * once
    if case in DRAWS_FIRST:
        assert more == looped
    else:
        assert more < looped
