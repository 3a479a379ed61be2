"""Texts as tensors: files of tensors hold nothing else, and states are kept in them."""

import torch
from torch import Tensor


def text_as_tensor(text: str) -> Tensor:
    """Return the bytes of a text, uint8 on the CPU."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def text_of_tensor(content: Tensor) -> str:
    """Return the text that `text_as_tensor` was given."""
    return bytes(content.tolist()).decode()
