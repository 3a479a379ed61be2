"""Which of the samples of a posterior that are kept a prediction uses."""

from bayesguard.errors import BadInput


def evenly_spaced(num_samples: int, kept: int) -> list[int]:
    """Return `num_samples` of 0, ..., kept - 1, evenly spaced from 0 on: a share of every chain.

    Raises:
        BadInput: There are fewer.

    Examples:
        >>> evenly_spaced(3, 10)
        [0, 3, 6]
    """
    if num_samples > kept:
        raise BadInput(
            f"num_samples={num_samples} draws were asked for, and there are {kept} posterior samples (chains x draws); ask "
            "for fewer, or keep more of them"
        )
    return [draw * kept // num_samples for draw in range(num_samples)]
