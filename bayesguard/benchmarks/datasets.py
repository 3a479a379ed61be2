"""The benchmarks' data sets: images in three parts, images to be told apart from them, and regression with its splits."""

from bayesguard.benchmarks.data.images import ImageSet, Part, load, ood_images
from bayesguard.benchmarks.data.regression import Regression, Standardised, regression, standardised

__all__ = ["ImageSet", "Part", "Regression", "Standardised", "load", "ood_images", "regression", "standardised"]
