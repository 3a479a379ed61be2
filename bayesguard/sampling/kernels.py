"""The fused kernels that hide a dropout inside: attention, multi-head attention, recurrent layers."""

import math
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.sampling.forward import dtype_of_autocast
from bayesguard.sampling.masks import MaskSource, PassesDiffer

Kernel = Callable[..., Any]


class Mode(Protocol):
    """What a kernel asks of the interception that it runs under."""

    @property
    def masks(self) -> MaskSource: ...

    def once(self, compute: Callable[[], Any]) -> Any: ...


def attention(
    mode: Mode,
    func: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, NeurIPS, eq. 1) with our mask on its weights.

    query `[..., T, E]`, key `[..., U, E]`, value `[..., U, F]` -> `[..., T, F]`.
    """
    masks = mode.masks
    rate = masks.rate(dropout_p, module=False)
    if rate == 0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = query @ key.mT
    # Scores are the largest tensors where inputs are long, and nobody else holds these.
    own = masks.can_overwrite and _is_plain(scores) and scores.is_contiguous()
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scores.mul_(factor) if own else scores * factor
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    attending = None
    if attn_mask is not None:
        attn_mask, attending = _without_empty_rows(attn_mask)
        scores = _masked_scores(scores, attn_mask, own)
    # Autocast does not see calls that write into a given tensor.
    in_place = own and scores.device.type == "cpu" and dtype_of_autocast(scores.device) is None
    weights = torch.softmax(scores, dim=-1, out=scores) if in_place else scores.softmax(dim=-1)
    del scores
    weights = masks.multiply(weights, rate, weights.shape, overwrite=own)
    attended = weights @ value
    return attended if attending is None else attended.masked_fill(~attending, 0.0)


def _without_empty_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return a mask under which every query attends to something, and which queries `[..., T, 1]` really do.

    A query that attends to nothing gets zeros from torch's kernels, where a softmax would be NaN.
    """
    is_bool = mask.dtype == torch.bool
    attending = (mask if is_bool else mask != -math.inf).any(dim=-1, keepdim=True)
    return mask | ~attending if is_bool else mask.masked_fill(~attending, 0.0), attending


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is an ordinary dense one: no subclass, and not inside a transform of `torch.func`."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) is Tensor and not wrapped and tensor.layout == torch.strided


def _masked_scores(scores: Tensor, mask: Tensor, own: bool) -> Tensor:
    """Return scores under a mask: booleans, True where attention is paid, or what is added."""
    is_bool = mask.dtype == torch.bool
    shape, dtype = torch.broadcast_shapes(scores.shape, mask.shape), torch.result_type(scores, mask)
    if own and _is_plain(mask) and shape == scores.shape and dtype == scores.dtype:
        return scores.masked_fill_(~mask, -math.inf) if is_bool else scores.add_(mask)
    return scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask


def multi_head_attention(mode: Mode, func: FunctionType, *args: Any, **kwargs: Any) -> Any:
    """Multi-head attention whose inner dropout asks us for its masks.

    A function mode is off while it handles a call, so the dropout inside cannot be intercepted a second time. The
    same code therefore runs with three of its global names rebound.
    """
    bound = dict(zip(func.__code__.co_varnames, args, strict=False)) | kwargs
    bound["dropout_p"] = mode.masks.rate(bound["dropout_p"], module=False)
    bound["training"] = True

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return mode.masks.multiply(input, p, input.shape)

    def scaled_dot_product_attention(*inner: Any, **options: Any) -> Tensor:
        # The rate is already ours; applying `rate` again leaves it as it is.
        return attention(mode, F.scaled_dot_product_attention, *inner, **options)

    names = func.__globals__ | {
        "has_torch_function": lambda tensors: False,
        "dropout": dropout,
        "scaled_dot_product_attention": scaled_dot_product_attention,
    }
    return FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)(**bound)


def recurrent(mode: Mode, func: Kernel, input: Tensor, *args: Any) -> Any:
    """A recurrent stack run layer by layer, with our masks between its layers.

    Handles both signatures of `torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu`: padded
    `(input, hx, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)` and packed
    `(data, batch_sizes, hx, weights, has_biases, num_layers, dropout, train, bidirectional)`.
    """
    packed = isinstance(args[2], (list, tuple))
    sizes = args[:1] if packed else ()
    hx, weights, has_biases, num_layers, dropout, _, bidirectional, *layout = args[len(sizes) :]
    rate = mode.masks.rate(dropout, module=False)
    if rate == 0 or num_layers == 1:
        return func(input, *sizes, hx, weights, has_biases, num_layers, 0.0, False, bidirectional, *layout)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    finals = []
    for layer in range(num_layers):
        if layer:
            before = input.shape
            input = _mask_sequence(mode.masks, input, rate, sizes[0] if packed else None)
            if input.shape != before:
                # The kernel does not check the rows of its state itself.
                raise PassesDiffer(
                    "a recurrent layer's state does not go with draws that are folded between its layers"
                )
        state = _layer_state(hx, slice(layer * directions, (layer + 1) * directions))
        own = weights[layer * per_layer : (layer + 1) * per_layer]
        run = partial(func, input, *sizes, state, own, has_biases, 1, 0.0, False, bidirectional, *layout)
        # Nothing before the first mask depends on the draw.
        input, *final = run() if layer else mode.once(run)
        finals.append(final)
    return (input, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def _layer_state(hx: Any, rows: slice) -> Any:
    # An LSTM has two states, the others one.
    return hx[rows] if isinstance(hx, Tensor) else [state[rows] for state in hx]


def _mask_sequence(masks: MaskSource, input: Tensor, rate: float, batch_sizes: Tensor | None) -> Tensor:
    shape = list(input.shape) if batch_sizes is None else [len(batch_sizes), input.shape[-1]]
    if batch_sizes is None:
        return masks.multiply(input, rate, shape)
    # Packed rows lie time step by time step: one mask a step serves all the sequences that reach it.
    keep = masks.keep(shape, rate, input.device).repeat_interleave(batch_sizes.to(input.device), dim=0)
    return input * keep.to(input.dtype) / (1 - rate) if rate < 1 else input * 0
