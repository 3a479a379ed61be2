"""Published numbers that the benchmarks are set beside, each read in the source named.

Values are as printed: NLL in nats and in the target's own units, shares between 0 and 1, Brier scores summed over classes.
"""

from typing import NamedTuple


class Quartiles(NamedTuple):
    """25, 50 and 75 % over shifted sets, in rising order."""

    lower: float
    median: float
    upper: float


class Published(NamedTuple):
    """A mean over splits with the standard error of the mean (None where it was not printed)."""

    mean: float
    error: float | None


# Y. Ovadia et al. (2019). Can you trust your model's uncertainty? NeurIPS, table G.1: CIFAR-10, ResNet-20, 16 corruptions at
# five severities. The paper's NLL rows are in reversed order; here they rise like the others.
OVADIA_CIFAR10: dict[str, dict[str, Quartiles]] = {
    "vanilla": {
        "ece": Quartiles(0.057, 0.127, 0.288),
        "brier": Quartiles(0.243, 0.425, 0.747),
        "nll": Quartiles(0.578, 1.120, 2.356),
    },
    "temperature": {
        "ece": Quartiles(0.022, 0.049, 0.180),
        "brier": Quartiles(0.227, 0.392, 0.670),
        "nll": Quartiles(0.473, 0.871, 1.685),
    },
    "ensemble": {
        "ece": Quartiles(0.031, 0.037, 0.110),
        "brier": Quartiles(0.165, 0.299, 0.572),
        "nll": Quartiles(0.342, 0.653, 1.543),
    },
    "dropout": {
        "ece": Quartiles(0.021, 0.034, 0.174),
        "brier": Quartiles(0.215, 0.349, 0.633),
        "nll": Quartiles(0.446, 0.771, 1.684),
    },
    "last_layer_dropout": {
        "ece": Quartiles(0.069, 0.136, 0.292),
        "brier": Quartiles(0.259, 0.416, 0.728),
        "nll": Quartiles(0.626, 1.086, 2.275),
    },
    "variational": {
        "ece": Quartiles(0.029, 0.064, 0.187),
        "brier": Quartiles(0.250, 0.363, 0.604),
        "nll": Quartiles(0.533, 0.823, 1.628),
    },
    "last_layer_variational": {
        "ece": Quartiles(0.058, 0.135, 0.275),
        "brier": Quartiles(0.246, 0.431, 0.732),
        "nll": Quartiles(0.591, 1.158, 2.352),
    },
}

# google/uncertainty-baselines, baselines/cifar/README.md: CIFAR-10, WRN-28-10. NLL, accuracy and ECE on clean data, then the
# means of each over 15 corruptions at five severities (another list than that of Ovadia et al.).
UNCERTAINTY_BASELINES_CIFAR10: dict[str, tuple[float, float, float, float, float, float]] = {
    "deterministic": (0.159, 0.960, 0.0231, 1.05, 0.761, 0.153),
    "dropout": (0.145, 0.961, 0.019, 1.27, 0.700, 0.167),
    "ensemble": (0.114, 0.966, 0.010, 0.81, 0.779, 0.087),
    "sngp": (0.134, 0.960, 0.007, 0.74, 0.785, 0.078),
    "rank1_cauchy": (0.120, 0.965, 0.009, 0.74, 0.805, 0.090),
    "variational": (0.211, 0.947, 0.029, 1.46, 0.713, 0.181),
}

# google/uncertainty-baselines, LeNet-5: NLL, accuracy, ECE on clean test data (None where not printed).
UNCERTAINTY_BASELINES_LENET: dict[str, dict[str, tuple[float, float, float | None]]] = {
    "mnist": {
        "deterministic": (0.037, 0.991, None),
        "ensemble": (0.016, 0.994, 0.005),
        "variational": (0.048, 0.985, 0.010),
    },
    "fashion_mnist": {
        "deterministic": (0.321, 0.910, None),
        "ensemble": (0.200, 0.932, 0.010),
        "variational": (0.292, 0.895, 0.011),
    },
}

# E. Daxberger et al. (2021). Laplace redux. NeurIPS, table 3: LeNet trained on MNIST, AUROC of the largest probability.
LAPLACE_REDUX_MNIST_AUROC: dict[str, dict[str, float]] = {
    "fashion_mnist": {"deterministic": 0.989, "ensemble": 0.992, "variational": 0.982, "last_layer_laplace": 0.985},
}
# The mean of the largest probability on the other set, same table.
LAPLACE_REDUX_MNIST_CONFIDENCE: dict[str, dict[str, float]] = {
    "fashion_mnist": {"deterministic": 0.642, "ensemble": 0.554, "variational": 0.675, "last_layer_laplace": 0.588},
}

# J. Liu et al. (2020, SNGP) and google/uncertainty-baselines: CLINC150, BERT-base: NLL, accuracy, ECE, AUROC, AUPRC of out-of-scope.
UNCERTAINTY_BASELINES_CLINC: dict[str, tuple[float, float, float, float, float]] = {
    "deterministic": (0.186, 0.965, 0.0218, 0.942, 0.853),
    "dropout": (0.171, 0.965, 0.0170, 0.951, 0.861),
    "sngp": (0.139, 0.969, 0.0104, 0.969, 0.908),
    "ensemble": (0.169, 0.975, 0.0128, 0.958, 0.862),
}

UCI_SETS = ("boston", "concrete", "energy", "kin8nm", "naval", "power", "protein", "wine", "yacht")


def _by_set(means: tuple[float, ...], errors: tuple[float, ...], *, deviations: bool = False) -> dict[str, Published]:
    """Pair means with standard errors; `deviations` are turned into those (20 splits, protein 5)."""
    root = {name: (5 if name == "protein" else 20) ** 0.5 if deviations else 1.0 for name in UCI_SETS}
    return {
        name: Published(mean, error / root[name]) for name, mean, error in zip(UCI_SETS, means, errors, strict=True)
    }


# The 20 standard splits (protein 5). "ensemble", "dropout_2016" and "pbp": B. Lakshminarayanan et al. (2017, NeurIPS), table 1,
# whose +- is a standard deviation for the first two and a standard error for the last; "dropout": the result files of
# yaringal/DropoutUncertaintyExps (4,000 epochs, grid search), means and standard errors over the splits. The NLL is minus the
# log-likelihood printed there. Where the chosen precision lies on the edge of that grid (energy, naval, yacht) the likelihood of
# "dropout" is limited by the grid.
UCI: dict[str, dict[str, dict[str, Published]]] = {
    "rmse": {
        "ensemble": _by_set(
            (3.28, 6.03, 2.09, 0.09, 0.00, 4.11, 4.71, 0.64, 1.58),
            (1.00, 0.58, 0.29, 0.00, 0.00, 0.17, 0.06, 0.04, 0.48),
            deviations=True,
        ),
        "dropout_2016": _by_set(
            (2.97, 5.23, 1.66, 0.10, 0.01, 4.02, 4.36, 0.62, 1.11),
            (0.85, 0.53, 0.19, 0.00, 0.00, 0.18, 0.04, 0.04, 0.38),
            deviations=True,
        ),
        "dropout": _by_set(
            (2.9036, 4.8265, 0.5389, 0.0789, 0.00074, 4.0142, 4.2742, 0.6218, 0.6663),
            (0.1768, 0.1605, 0.0135, 0.0006, 0.00005, 0.0368, 0.0209, 0.0080, 0.0486),
        ),
        "pbp": _by_set(
            (3.01, 5.67, 1.80, 0.10, 0.01, 4.12, 4.73, 0.64, 1.02), (0.18, 0.09, 0.05, 0.0, 0.0, 0.03, 0.01, 0.01, 0.05)
        ),
    },
    "nll": {
        "ensemble": _by_set(
            (2.41, 3.06, 1.38, -1.20, -5.63, 2.79, 2.83, 0.94, 1.18),
            (0.25, 0.18, 0.22, 0.02, 0.05, 0.04, 0.02, 0.12, 0.21),
            deviations=True,
        ),
        "dropout_2016": _by_set(
            (2.46, 3.04, 1.99, -0.95, -3.80, 2.80, 2.89, 0.93, 1.55),
            (0.25, 0.09, 0.09, 0.03, 0.05, 0.05, 0.01, 0.06, 0.12),
            deviations=True,
        ),
        "dropout": _by_set(
            (2.4019, 2.9367, 1.2115, -1.1364, -4.4495, 2.8078, 2.8713, 0.9281, 1.2501),
            (0.0417, 0.0248, 0.0053, 0.0066, 0.0022, 0.0086, 0.0015, 0.0127, 0.0153),
        ),
        "pbp": _by_set(
            (2.57, 3.16, 2.04, -0.90, -3.73, 2.84, 2.97, 0.97, 1.63),
            (0.09, 0.02, 0.02, 0.01, 0.01, 0.01, 0.00, 0.01, 0.02),
        ),
    },
}

# The middle of the three precisions of the noise that the same result files search, 1 / (unit of the target)^2.
UCI_PRECISIONS = dict(zip(UCI_SETS, (0.15, 0.05, 0.5, 200.0, 4e4, 0.1, 0.05, 3.0, 0.5), strict=True))
