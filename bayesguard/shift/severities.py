"""The severity table, in the order and the units of the script that made CIFAR-10-C."""

# Lengths are in pixels of a 32-pixel image, colours in [0, 1]. A row holds severities 1 to 5.
SEVERITIES: dict[str, tuple[float | tuple[float, ...], ...]] = {
    # standard deviation
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    # photons in a pixel of value 1
    "shot_noise": (500, 250, 100, 75, 50),
    # share of values replaced
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    # standard deviation relative to the value
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),
    # standard deviation
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    # radius of the disk, standard deviation of its antialiasing
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
    # standard deviation of the blur, largest displacement, passes
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    # radius, standard deviation
    "motion_blur": ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
    # largest zoom; zooms go there from 1 in steps of 0.01. The script's arange stops short of 1.16, 1.21
    # and 1.26 but, by rounding, not of 1.06 and 1.11: these are the zooms that the published files have.
    "zoom_blur": (1.06, 1.11, 1.15, 1.20, 1.25),
    # mean and standard deviation of the flakes, their zoom, threshold, radius and standard deviation of the
    # fall, weight of the image
    "snow": (
        (0.10, 0.2, 1.00, 0.60, 8, 3, 0.95),
        (0.10, 0.2, 1.00, 0.50, 10, 4, 0.90),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.90),
        (0.25, 0.3, 2.25, 0.60, 12, 6, 0.85),
        (0.30, 0.3, 1.25, 0.65, 14, 12, 0.80),
    ),
    # weight of the image, weight of the frost
    "frost": ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    # thickness, decay of the plasma
    "fog": ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
    # added to the value of hue, saturation, value
    "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),
    # mean and standard deviation of the liquid, its smoothing, threshold, strength of water or
    # smoothing of mud, whether it is mud
    "spatter": (
        (0.62, 0.1, 0.7, 0.70, 0.5, 0),
        (0.65, 0.1, 0.8, 0.70, 0.5, 0),
        (0.65, 0.3, 1.0, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
    # factor on the distance from the mean
    "contrast": (0.75, 0.50, 0.40, 0.30, 0.15),
    # factor on the saturation, added to it
    "saturate": ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
    # in sides of the image: strength and smoothing of the displacement, jitter of the affine map
    "elastic_transform": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.10, 0.04, 0.05),
        (0.10, 0.03, 0.03),
    ),
    # side of the small image, in sides of the image
    "pixelate": (0.95, 0.90, 0.85, 0.75, 0.65),
    # quality, 1 to 100
    "jpeg_compression": (80, 65, 58, 50, 40),
}
