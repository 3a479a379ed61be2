"""What every shift is: a name, a severity, a seed, and a call that returns shifted inputs."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_count, check_finite
from bayesguard.errors import BadInput, BadType


def check_severity(severity: int) -> int:
    """Return a severity of 1 to 5, or raise."""
    if check_count(severity, "severity") > 5:
        raise BadInput(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    return int(severity)


class Shift(ABC):
    """A perturbation of inputs, of one kind and one severity, deterministic for a seed.

    Called with `generator=None`, a shift draws from a fresh generator that its seed, name and severity
    determine: the same shift and the same batch give the same bits on one device, and every batch gets the
    same noise. To shift a data set batch by batch with fresh noise, pass one generator to all calls:

    >>> import torch
    >>> from bayesguard.shift import Corruption
    >>> shift = Corruption("gaussian_noise", severity=3)
    >>> generator = shift.generator("cpu")
    >>> shifted = [shift(batch, generator) for batch in torch.rand(6, 1, 8, 8).split(3)]

    The result then depends on the sizes of the batches. Default generators are neither read nor moved, the
    input is never changed in place, and no gradient flows through a shift.

    Args:
        name: what the shift is called in tables.
        severity: its place on the axis of its kind; larger is further from clean.
        seed: of the default generator.
    """

    def __init__(self, name: str, severity: float, seed: int = 0) -> None:
        self.name = name
        self.severity = severity
        self.seed = check_count(seed, "seed", minimum=0)

    def __repr__(self) -> str:
        """Return the name, the severity and the seed."""
        return f"{type(self).__name__}({self.name!r}, severity={self.severity:g}, seed={self.seed})"

    @abstractmethod
    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return shifted inputs of the same shape, dtype and device; an empty batch stays empty."""

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator on `device`, a function of the seed, the name and the severity."""
        return seeded(device, self.seed, self.name, float(self.severity))

    def _stream(self, generator: torch.Generator | None, device: torch.device) -> torch.Generator:
        """Return the generator to draw from, after checking that it lives where the inputs live."""
        if generator is None:
            return self.generator(device)
        if not isinstance(generator, torch.Generator):
            raise BadType(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator.device.type != device.type:
            raise BadInput(
                f"generator is on {generator.device}, the inputs on {device}; "
                "make one with shift.generator(inputs.device)"
            )
        return generator


class ImageShift(Shift):
    """A shift of images `[N, C, H, W]` in [0, 1]; half precision is computed in float32 and cast back."""

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return shifted images.

        Args:
            inputs: images `[N, C, H, W]`, floating point, in [0, 1]; a NumPy array is accepted.
            generator: where random numbers come from, on the device of the images; None for a fresh one of
                this shift's own.

        Returns:
            Images of the same shape, dtype and device, in [0, 1].

        Raises:
            BadType: the images are not floating point.
            BadInput: they have another rank, NaN, infinities or values outside of [0, 1].
        """
        images = check_images(inputs)
        self.check_size(images)
        stream = self._stream(generator, images.device)
        if not len(images):
            return images.clone()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            shifted = self.apply(images.to(torch.promote_types(images.dtype, torch.float32)), stream)
            return shifted.clamp(0, 1).to(images.dtype)

    @abstractmethod
    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return shifted images, clamped later; `images` are checked and must not be changed in place."""

    def check_size(self, images: Tensor) -> None:
        """Raise BadInput for images that this shift cannot take."""


def seeded(device: torch.device | str, *key: object) -> torch.Generator:
    """Return a fresh generator, a function of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)


def check_images(images: object) -> Tensor:
    """Return `images` as a tensor `[N, C, H, W]` of floats in [0, 1], or raise what is wrong with them."""
    value = as_tensor(images, "images")
    if not value.is_floating_point():
        way_out = "divide uint8 images by 255" if value.dtype == torch.uint8 else "convert to floats in [0, 1]"
        raise BadType(f"images must be floating point in [0, 1], got dtype {value.dtype}; {way_out}")
    if value.dim() != 4:
        way_out = "images[None] makes a batch of one, images[:, None] adds the channel of grey images"
        raise BadInput(f"images must be [N, C, H, W], got shape {tuple(value.shape)}; {way_out}")
    check_finite(value, "images")
    outside = (value < 0) | (value > 1)
    if outside.any():
        row = bad_row(outside)
        worst = value[row][outside[row]][0].item()
        way_out = "divide by 255" if 1 < value.amax() <= 255 and value.amin() >= 0 else "undo the normalisation"
        raise BadInput(f"images must be in [0, 1], got {worst:g} in row {row}; {way_out} before the shift")
    return value


def image_scale(images: Tensor) -> float:
    """Return the shorter side relative to 32 pixels, the factor on every length of the severity table."""
    return min(images.shape[-2:]) / 32


class Composed(Shift):
    """Shifts one after another, each of what the one before it left: nature seldom comes with one at a time.

    Its name is that of its parts joined by "+", its severity the sum of theirs.

    Args:
        shifts: Two or more, in their order.
        seed: Of the default generator, from which all parts draw in turn; see `Shift`.

    Raises:
        BadInput: Fewer than two shifts.
        BadType: One that is no `Shift`.

    Examples:
        >>> from bayesguard.shift import Corruption
        >>> Composed([Corruption("fog", severity=2), Corruption("gaussian_noise", severity=1)])
        Composed('fog+gaussian_noise', severity=3, seed=0)
    """

    def __init__(self, shifts: Sequence[Shift], seed: int = 0) -> None:
        self.shifts = tuple(shifts)
        for shift in self.shifts:
            if not isinstance(shift, Shift):
                raise BadType(f"shifts has a {type(shift).__name__}; Composed takes bayesguard.shift objects")
        if len(self.shifts) < 2:
            raise BadInput(f"shifts must be two or more, got {len(self.shifts)}")
        super().__init__("+".join(shift.name for shift in self.shifts), sum(s.severity for s in self.shifts), seed)

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return shifted inputs; arguments, errors and result as those of the parts."""
        shifted = as_tensor(inputs, "inputs")
        stream = self._stream(generator, shifted.device)
        for shift in self.shifts:
            shifted = shift(shifted, stream)
        return shifted
