"""The one exception of QVD: bad input, said in one line that names the cause and the remedy."""


class QVDError(ValueError):
    """Bad input (model, weights, scales, checkpoint or settings); nothing was changed."""
