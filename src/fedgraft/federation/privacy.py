"""Client-level differential privacy: what the adapters of all rounds may tell of any one client.

    d_i     what client i changed, all numbers of all its factors as one vector
    cut     d_i min(1, max_norm / |d_i|)
    next    start + (sum of all cut d_i + noise) / n
    noise   of each number Gaussian, of standard deviation noise_multiplier * max_norm
    n       the clients that were asked, however many answered

One client adds a vector of length max_norm at most to the sum, whatever it sends. So whoever sees
next can hardly tell whether that client's change was counted or taken as zero: what they conclude
is at most e^epsilon times as likely, but for a chance of delta. These are the clipped changes and
the fixed denominator of McMahan et al. (arXiv 1710.06963), with equal weights: a weight is the
client's word, and would be a factor on its length.

What rounds add up to. A round is a Gaussian mechanism of sensitivity 1 and deviation z, the noise
multiplier; T of them, each of which may depend on those before, are exactly one of deviation
z / sqrt(T) (Dong, Roth and Su, arXiv 1905.02383, corollary 3.3). Its epsilon at a delta has a
closed form (Balle and Wang, arXiv 1805.06530), which dp-accounting solves to twelve digits. Renyi
accounting gives an upper bound on that number, and accounting by privacy loss distributions an
approximation from above; both are for mechanisms without such a form. Tests hold all three
together.

Sampling clients makes nothing smaller here. Amplification needs a sample that stays secret. Ours
does not: the history names who took part, and whoever is asked knows it. (A plan draws a fixed
share without replacement, too; dp-accounting has a bound for that, but where one client is
replaced by another, at twice the sensitivity, and for a secret sample.) So each client counts as
if it were in every round, and fewer rounds or more noise are the only ways to a smaller epsilon.

What is not covered: centroids, counts of examples, scores and losses that clients send, and who
answered; a department's text that several of its clients hold; and the server itself, which sees
each change before it adds the noise.

Where noise comes from. A seeded generator makes a run repeatable, and its noise can be subtracted
by whoever knows or guesses the seed. So noise is from the system's entropy, unless a study asks
for `repeatable` by name; what is then spent says so. Noise is drawn and added in float64 and the
result rounded to float32; attacks on the lowest bits of such sums (arXiv 2112.05307) are made
harder by that rounding, not impossible.

How this differs from Flower 1.41, which clips and adds noise likewise: it drops a round that one
client is missing from, since its mean is over those who answered, where here the missing count as
no change; its noise comes from numpy's global generator, in float32; its accountant is Renyi's.

With `fedavg` of A and B, and with `ffa`, of B alone: half the numbers, and so less noise. Of many
numbers a few clients drown in noise: its length is about noise_multiplier max_norm sqrt(numbers)
/ n, where the mean's is max_norm at most. See docs/privacy.md.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import Layer
from fedgraft.federation.history import Spent
from fedgraft.federation.robust import check_start, distance_moved, moved, of_one_size
from fedgraft.federation.update import Tensors, Update, modules
from fedgraft.provenance import derive_seed

Draw = Callable[[int], bytes]
"""Gives so many random bytes."""


class Privacy(BaseModel):
    """How much of a client may show: an epsilon to keep over all rounds, or the noise of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of all rounds of the plan together; noise is chosen for it."""
    noise_multiplier: float | None = Field(default=None, ge=0.01, allow_inf_nan=False)
    """The noise's standard deviation in units of `max_norm`, each round. At 0.01 one round has an
    epsilon above 5,000: no protection."""
    delta: float = Field(gt=0, lt=1)
    """Far below 1 / clients: publishing one client of n at random has a delta of 1 / n."""
    max_norm: float = Field(gt=0, allow_inf_nan=False)
    """Euclidean norm that a client's change in a round is cut to; about the median is usual."""
    repeatable: bool = False
    """Noise from the plan's seed. For studies alone: see the head of this file."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Privacy":
        if (self.epsilon is None) == (self.noise_multiplier is None):
            found = "neither" if self.epsilon is None else "both"
            raise ValueError(
                f"expected either epsilon or noise_multiplier, found {found}; give epsilon to have "
                "the noise chosen, or noise_multiplier to be told the epsilon"
            )
        return self

    def multiplier(self, num_rounds: int) -> float:
        """The noise multiplier of each round of a plan of so many.

        Raises FederationError where dp-accounting is not installed: no noise without its account.
        """
        check_installed()
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return multiplier_for(self.epsilon, self.delta, num_rounds)


def multiplier_for(epsilon: float, delta: float, num_rounds: int) -> float:
    """The least noise multiplier with which so many rounds keep epsilon at delta.

    Raises FederationError where dp-accounting is not installed, or there is no round.
    """
    check_installed()
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    if num_rounds < 1:
        raise FederationError(
            f"expected at least one round to choose the noise for, found {num_rounds}; give the "
            "rounds that are planned"
        )
    least = float(get_sigma_gaussian(epsilon, delta)) * math.sqrt(num_rounds)
    return least * (1 + 1e-9)  # the other side of what the solver leaves open


def epsilon_of(noise_multiplier: float, delta: float, num_rounds: int) -> float:
    """The epsilon at delta of so many rounds, each of which any client may be in; 0 for none.

    Raises FederationError where dp-accounting is not installed.
    """
    check_installed()
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    if num_rounds == 0:
        return 0.0
    return float(get_epsilon_gaussian(noise_multiplier / math.sqrt(num_rounds), delta))


def spent(privacy: Privacy, num_rounds: int, *, num_planned: int | None = None) -> Spent:
    """What the rounds so far cost any one client, with what that means in words.

    Args:
        num_rounds: Rounds whose adapters were given out.
        num_planned: Rounds that the noise was chosen for; `num_rounds` where None.

    Raises FederationError where dp-accounting is not installed.
    """
    multiplier = privacy.multiplier(num_rounds if num_planned is None else num_planned)
    epsilon = epsilon_of(multiplier, privacy.delta, num_rounds)
    return Spent(
        epsilon=epsilon,
        delta=privacy.delta,
        num_rounds=num_rounds,
        noise_multiplier=multiplier,
        max_norm=privacy.max_norm,
        words=_words(epsilon, privacy, num_rounds),
    )


def noised(
    updates: Iterable[Update],
    start: Tensors,
    privacy: Privacy,
    *,
    num_rounds: int,
    num_expected: int,
    seed: int,
) -> Iterator[Layer]:
    """Yield the layers of start + (sum of clipped changes + noise) / num_expected.

    Each tensor that the updates have is noised, so let clients send what is trained and no more.
    Reads each tensor twice, one client's at a time. To take the result twice is to add noise once:
    keep it.

    Args:
        updates: Checked ones, of one size.
        start: The adapter that the round began with.
        num_rounds: Of the plan, which the noise is chosen for.
        num_expected: Clients that were asked, not those that answered: who answers is not the
            server's to choose.
        seed: Of this round and group; looked at where `privacy.repeatable` alone.

    Raises FederationError, before the first layer, for more updates than were asked for, for
    updates of several sizes, without end or for another `start`, and where dp-accounting is not
    installed.
    """
    found = of_one_size(updates)
    check_start(found, start)
    if len(found) > num_expected:
        raise FederationError(
            f"expected at most {num_expected} updates, the clients that were asked, found "
            f"{len(found)}; give the number of all that were asked"
        )
    shares = [_share(update, start, privacy.max_norm) for update in found]
    deviation = privacy.multiplier(num_rounds) * privacy.max_norm
    draw = np.random.default_rng(derive_seed(seed, "noise")).bytes
    return _layers(
        found, shares, start, deviation, num_expected, draw if privacy.repeatable else os.urandom
    )


def _layers(
    updates: Sequence[Update],
    shares: Sequence[float],
    start: Tensors,
    deviation: float,
    num_expected: int,
    draw: Draw,
) -> Iterator[Layer]:
    names = sorted(updates[0].tensors)
    for module in modules(names):
        tensors = {}
        for name in names:
            if name.startswith(f"{module}.lora_"):
                total = deviation * gaussian(start[name].shape, draw)
                for update, share in zip(updates, shares, strict=True):
                    total += share * moved(name, update.tensors, start)
                tensors[name] = (start[name] + total / num_expected).astype(np.float32)
        yield Layer(module=module, adapters={updates[0].size: tensors})


def _share(update: Update, start: Tensors, max_norm: float) -> float:
    """How much of a client's change is left by clipping."""
    norm = distance_moved(update.tensors, start)
    if not math.isfinite(norm):
        raise FederationError(
            f"client {update.client!r}: expected a change of finite length, found {norm}; check "
            "updates before their noise is added"
        )
    return 1.0 if norm <= max_norm else max_norm / norm


def gaussian(shape: tuple[int, ...], draw: Draw) -> NDArray[np.float64]:
    """Independent standard normal numbers from random bytes (Box and Muller 1958).

    None is beyond 8.7, where one in 10^17 would be.
    """
    count = math.prod(shape)
    num_pairs = (count + 1) // 2
    whole = np.frombuffer(draw(16 * num_pairs), "<u8").reshape(2, num_pairs)
    uniform = ((whole >> 11) + 0.5) * 2.0**-53  # between 0 and 1, never one of them
    length, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * math.pi * uniform[1]
    both = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
    found: NDArray[np.float64] = both[:count].reshape(shape)
    return found


def _words(epsilon: float, privacy: Privacy, num_rounds: int) -> str:
    told = math.ceil(epsilon * 1000) / 1000  # never less than it is
    rounds = "1 round" if num_rounds == 1 else f"{num_rounds} rounds"
    words = (
        f"Client-level differential privacy with epsilon = {told} and delta = {privacy.delta:g} "
        f"over {rounds}. Protected is each client's training: for whoever sees the adapters of all "
        "rounds, whatever they conclude is at most e^epsilon times as likely as if that client's "
        "change had been taken as zero in every round, but for a chance of delta. Sampling of "
        "clients counts for nothing. The server is trusted: it sees each client's change and adds "
        "the noise. Not covered are centroids, counts, scores and losses, and who took part; nor "
        "text that several clients hold."
    )
    if privacy.repeatable:
        words += (
            " The noise came from the seed of the plan: whoever knows the seed can take it off, "
            "and for them epsilon and delta do not hold. For studies alone."
        )
    return words


def check_installed() -> None:
    """Raise FederationError where dp-accounting is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise FederationError(
            f"expected the library dp-accounting, which says what noise costs, found: {error}; "
            "install it: pip install 'fedgraft[privacy]'"
        ) from error
