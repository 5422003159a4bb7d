"""The search of a learning rate, whatever is trained."""

from collections.abc import Callable


def search_rate(middle: float, loss_at: Callable[[float], float]) -> dict[float, float]:
    """The validation loss of a short training at a rate -> the losses of the rates that were tried.

    These are the middle, a third and three times of it, and on beyond an edge while that is better
    than all others by a hundredth.
    """
    grid = (two_digits(middle / 3), middle, two_digits(middle * 3))
    losses = {rate: loss_at(rate) for rate in grid}
    for factor, outermost in ((1 / 3, min), (3, max)):
        edge = outermost(losses)
        while losses[edge] < 0.99 * min(loss for rate, loss in losses.items() if rate != edge):
            edge = two_digits(edge * factor)
            losses[edge] = loss_at(edge)
    return losses


def two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")
