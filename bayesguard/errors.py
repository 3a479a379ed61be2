"""The errors and warnings that bayesguard raises; each message names the argument, its value and the way out."""


class BayesguardError(Exception):
    """Base of every error that bayesguard raises."""


class BadInput(BayesguardError, ValueError):
    """An argument has a value that cannot be used; the message says which, what was given and what is allowed."""


class BadType(BayesguardError, TypeError):
    """An argument has a type that cannot be used."""


class UnsupportedNetwork(BadType):
    """A network that cannot be wrapped as it is: scripted, lazy, or impossible to copy."""


class IdenticalDraws(BayesguardError, RuntimeError):
    """All draws of a stochastic predictor are the same: its uncertainty would be a confident zero."""


class NotFitted(BayesguardError, RuntimeError):
    """A calibrator or predictor was used before it was fitted."""


class BadFile(BayesguardError, ValueError):
    """A file is damaged, from a newer version, or not what was expected; the message has its path."""


class BayesguardWarning(UserWarning):
    """Base of every warning that bayesguard gives."""


class CalibrationWarning(BayesguardWarning):
    """A calibrator stopped at a bound, had too little data to be trusted, or learned from too mild perturbations."""


class ConvergenceWarning(BayesguardWarning):
    """Markov chains disagree, so that their draws may not be from the posterior."""


class RandomnessWarning(BayesguardWarning):
    """A network is random where it should not be, or not random where it should be."""
