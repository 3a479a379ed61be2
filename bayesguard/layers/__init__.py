"""Bayesian layers: torch's own, run under a sample of their weights.

`kl_divergence(network)` is what a training loop of one's own adds, divided by the rows of the data;
`fixed_draw(seed)` makes a network one function, `at_mean()` the one at the mean; `convert(network)` replaces the layers of
an ordinary network.
"""

from bayesguard.layers.base import BayesianLayer as BayesianLayer
from bayesguard.layers.base import at_mean as at_mean
from bayesguard.layers.base import bayesian_layers as bayesian_layers
from bayesguard.layers.base import fixed_draw as fixed_draw
from bayesguard.layers.base import kl_divergence as kl_divergence
from bayesguard.layers.convert import Conversion as Conversion
from bayesguard.layers.convert import convert as convert
from bayesguard.layers.joined import LayerPosteriors as LayerPosteriors
from bayesguard.layers.joined import LayerPriors as LayerPriors
from bayesguard.layers.torch_layers import GRU as GRU
from bayesguard.layers.torch_layers import LSTM as LSTM
from bayesguard.layers.torch_layers import Conv1d as Conv1d
from bayesguard.layers.torch_layers import Conv2d as Conv2d
from bayesguard.layers.torch_layers import Conv3d as Conv3d
from bayesguard.layers.torch_layers import ConvTranspose2d as ConvTranspose2d
from bayesguard.layers.torch_layers import Embedding as Embedding
from bayesguard.layers.torch_layers import Linear as Linear
from bayesguard.layers.torch_layers import MultiheadAttention as MultiheadAttention
