"""How well quantized temporal features still tell the timesteps apart: TDScore, TDR, TDC, COL and the search objective.

The four metrics take temporal features `E` [T, C] (one row per sampler step, in sampling order) and, but for the score,
their quantized values `Eq` [T, C]. They compute in float64 and return a Python float.

Marks: [P] stated in the QVD paper's abstract, [R] reconstructed, [O] ours where the paper cannot be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qvd_core.errors import QVDError

COLLISION_THRESHOLD = 1e-3  # share of the features' range; a smaller step is no difference worth a code of its own
CORRELATION_WEIGHT = 0.1
COLLISION_WEIGHT = 0.1

_NO_SPREAD = 1e-7  # distances (in [0, 1]) that spread less than this differ by the float32 rounding of the features
_NO_VARIATION = 1e-14  # share of the energy: what float32 rounding alone leaves of features that do not vary
_SAME_DISTANCE = 1e-6  # two sets of distances without spread that agree this well are the same

_SAMPLE_ROWS = 128  # a search compares its candidates on at most so many steps: as dense as long sampling runs
_STRIDE = 32  # a candidate that is given up has mostly shown its error on every 32nd row, or on a few times as many
_PART_STARTS = (range(1), range(1, 8), range(8, _STRIDE))
_SMALL = 2**14  # elements that are as quickly done at once
_GRAM_BUDGET = 2 * 10**9  # multiply-adds to spend on an exact Gram matrix: about a tenth of a second on one CPU core
_SKETCH_ROWS = 512
_CHUNK_ELEMENTS = 2**22  # float32 copies of a large projection are made 16 MiB at a time


@dataclass(frozen=True, eq=False)
class StackedWeights:
    """P [N, C] as the weights [N_i, C] it is stacked from; they are read once, one at a time, and not kept.

    rows: N, the sum of all N_i, known before any of them is read. weights: of any float dtype, on any device.
    """

    rows: int
    weights: Iterable[Tensor]

    @classmethod
    def of(cls, *weights: Tensor) -> StackedWeights:
        """Weights that are in memory anyway."""
        return cls(sum(len(weight) for weight in weights), weights)


def td_score(E: Tensor) -> float:
    """Temporal discriminability score: the mean normalized distance between the steps' features [name P, formula O].

        ẽ_i = e_i - mean_j e_j      d_ij = ||ẽ_i - ẽ_j|| / (||ẽ_i|| + ||ẽ_j|| + eps)      TDScore = mean_{i<j} d_ij

    In [0, 1]; unchanged by translation and scaling of `E`. 0 if there is nothing to tell apart: one step, equal rows.
    """
    distances = pair_distances(E)
    return _score(distances)


def td_ratio(E: Tensor, Eq: Tensor) -> float:
    """TDR = TDScore(Eq) / TDScore(E); goal 1 [O].

    1 where both scores are 0 (one step, equal rows); infinite where only the features' own score is 0, which no
    elementwise quantizer can bring about.
    """
    _check_same_shape(E, Eq)
    return _ratio(td_score(E), td_score(Eq))


def td_correlation(E: Tensor, Eq: Tensor) -> float:
    """TDC = Pearson correlation over i<j of d_ij(E) and d_ij(Eq); in [-1, 1], goal 1 [O].

    Where either set of distances does not vary, Pearson's formula is 0/0: then 1 if both sets are equal, else 0.
    One step has no pairs: 1.
    """
    _check_same_shape(E, Eq)
    return distance_correlation(pair_distances(E), pair_distances(Eq))


def collision_rate(E: Tensor, Eq: Tensor) -> float:
    """COL = share of all (step i, channel c), i < T-1, that collide; in [0, 1], goal 0 [O].

    A collision: |E[i+1, c] - E[i, c]| > 0.1 % of (max E - min E), and yet Eq[i+1, c] == Eq[i, c]. One step: 0.
    """
    _check_same_shape(E, Eq)
    return _share(adjacent_differences(E) & (Eq[1:] == Eq[:-1]))


def pair_distances(E: Tensor) -> Tensor:
    """d_ij(E) of TDScore for all i<j, float64 [T(T-1)/2], row by row. [O]"""
    features = _as_matrix(E)
    centred = features - features.mean(dim=0)
    # The distances do not depend on the scale; without it, squares of very large or small float64 leave the range.
    largest = centred.abs().amax()
    if largest > 0:
        centred = centred / largest
    norms = centred.norm(dim=1)
    first, second = torch.triu_indices(len(norms), len(norms), offset=1, device=norms.device)
    eps = torch.finfo(torch.float64).tiny  # only turns 0/0 into 0; anything larger would break scale invariance
    # pdist, not the Gram matrix: the distance of two nearly equal rows must not drown in cancellation.
    distances: Tensor = torch.pdist(centred) / (norms[first] + norms[second] + eps)
    return distances


def distance_correlation(before: Tensor, after: Tensor) -> float:
    """Pearson correlation of two sets of pair distances, float64 [pairs]; the defined cases of `td_correlation`. [O]"""
    if not len(before):
        return 1.0
    if min(before.std(correction=0), after.std(correction=0)) <= _NO_SPREAD:
        return float((before - after).abs().max().item() <= _SAME_DISTANCE)
    a, b = before - before.mean(), after - after.mean()
    pearson: float = (a @ b / (a.norm() * b.norm())).item()
    return max(-1.0, min(1.0, pearson))


def adjacent_differences(E: Tensor) -> Tensor:
    """Where the next step's value differs by more than 0.1 % of the features' range: bool [T-1, C]. [O]"""
    features = _as_matrix(E)
    threshold = COLLISION_THRESHOLD * (features.amax() - features.amin())
    return (features[1:] - features[:-1]).abs() > threshold


class TemporalObjective:
    """What the search for a quantizer minimizes on one set of features [O]; what no candidate changes is computed once.

        ||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||² + 0.1 (1 - TDC) + 0.1 COL

    features: E [T, C], float32, finite, not all zero. projection: P [N, C], or None for P = 1.
    Where E does not vary over time the error is divided by ||E Pᵀ||²; a P that maps E to zero is taken as 1.
    Of more than 128 steps, 128 evenly spaced ones stand for all, the first and the last among them.

    sample: float32 [min(T, 128), C], those steps. differs: bool [rows of it - 1, C], see `adjacent_differences`.
    """

    def __init__(self, features: Tensor, projection: Tensor | StackedWeights | None) -> None:
        self._features = features
        self._scale = features.abs().amax()  # errors are taken relative to it: squares stay inside float32
        self._energy, self._reference = _reference_energy(features / self._scale, projection)
        count = min(len(features), _SAMPLE_ROWS)
        rows = torch.linspace(0, len(features) - 1, count, dtype=torch.float64, device="cpu").round().long()
        self.sample = features[rows]
        self._parts = _spread_parts(*self.sample.shape)
        self._distances = pair_distances(self.sample)
        self.differs = adjacent_differences(self.sample)

    def __call__(self, quantizer: Callable[[Tensor], Tensor], give_up_at: float = math.inf) -> float:
        """The objective of the elementwise E -> Ê [T, C]; where its error alone reaches `give_up_at`, a lower bound."""
        error, quantized = 0.0, torch.empty_like(self.sample)
        for rows in self._parts:
            values = self.sample[rows]
            quantized[rows] = decoded = quantizer(values)
            error += self._projected_error(values, decoded, of=len(self.sample))
            if error >= give_up_at:
                return error
        penalty = _penalty(1.0, self._collisions(quantized))
        if error + penalty >= give_up_at:
            return error + penalty
        return error + penalty + _penalty(distance_correlation(self._distances, pair_distances(quantized)), 0.0)

    def channel_weights(self) -> Tensor:
        """What a squared error of 1 in each channel alone adds to the projected error: float64 [C]."""
        energies = self._energy.of_channels(self.sample.shape[1])
        return energies / (self._scale.double() ** 2 * len(self.sample) * self._reference / len(self._features))

    def report(self, quantizer: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The "objective" of E -> Ê [T, C] and its parts: "projected_error" (of all steps), "tdc", "col", and "tdr".

        "td_score" is that of the features.
        """
        error = self._projected_error(self._features, quantizer(self._features))
        quantized = quantizer(self.sample)
        distances = pair_distances(quantized)
        correlation, collisions = distance_correlation(self._distances, distances), self._collisions(quantized)
        return {
            "objective": error + _penalty(correlation, collisions),
            "td_score": _score(self._distances),
            "tdr": _ratio(_score(self._distances), _score(distances)),
            "tdc": correlation,
            "col": collisions,
            "projected_error": error,
        }

    def _collisions(self, quantized: Tensor) -> float:
        return _share(self.differs & (quantized[1:] == quantized[:-1]))

    def _projected_error(self, features: Tensor, quantized: Tensor, of: int | None = None) -> float:
        """||(Ê-E)Pᵀ||² / ||(E-mean)Pᵀ||², both per step: of some of the steps it is an estimate of that of all.

        of: the number of steps that `features` [T, C] are a part of; the parts add up.
        """
        error = self._energy((quantized - features) / self._scale) / (of or len(features))
        return error / (self._reference / len(self._features))


def _spread_parts(steps: int, channels: int) -> list[Tensor]:
    """Row numbers [T] in a few parts, small ones first, each evenly spread over the steps."""
    rows = torch.arange(steps, device="cpu")
    if steps < _STRIDE or steps * channels <= _SMALL:
        return [rows]
    return [torch.cat([rows[start::_STRIDE] for start in starts]) for starts in _PART_STARTS]


def _score(distances: Tensor) -> float:
    return distances.mean().item() if len(distances) else 0.0


def _ratio(before: float, after: float) -> float:
    if before == 0.0:
        return 1.0 if after == 0.0 else math.inf
    return after / before


def _penalty(correlation: float, collisions: float) -> float:
    return CORRELATION_WEIGHT * (1.0 - correlation) + COLLISION_WEIGHT * collisions


def _reference_energy(features: Tensor, projection: Tensor | StackedWeights | None) -> tuple[_ProjectedEnergy, float]:
    """How to measure errors, and what to divide them by (see `TemporalObjective`)."""
    mean = features.mean(dim=0, dtype=torch.float64)
    centred = (features.double() - mean).float()
    for candidate in (projection, None):
        energy = _ProjectedEnergy(candidate, features.shape[1])
        over_time = energy(centred)
        total = over_time + len(features) * energy(mean.float()[None])
        if over_time > _NO_VARIATION * total:
            return energy, over_time
        if total > 0.0:
            return energy, total
    raise AssertionError("features that are not all zero have energy")


class _ProjectedEnergy:
    """||D Pᵀ||² for many D [T, C] and one P [N, C] (None: P = 1), reduced to what that takes once.

    A P of up to C rows is kept; a taller one becomes its Gram matrix PᵀP, since ||D Pᵀ||² = tr(D PᵀP Dᵀ). Where that
    costs too much, a random sketch stands in for P: an unbiased estimate, within a few per cent. [O]
    """

    def __init__(self, projection: Tensor | StackedWeights | None, channels: int) -> None:
        self._gram: Tensor | None = None
        self._rows: Tensor | None = None
        if projection is None:
            return
        if isinstance(projection, Tensor):
            _check_projection(projection, channels)
            projection = StackedWeights.of(projection)
        if projection.rows * channels**2 > _GRAM_BUDGET and projection.rows > _SKETCH_ROWS:
            self._rows = _sketch(projection, channels)
        elif projection.rows > channels:
            self._gram = _gram_matrix(projection, channels)
        else:
            self._rows = torch.cat([chunk.cpu() for chunk in _float_chunks(projection, channels)])
        reduced = self._rows if self._gram is None else self._gram
        if reduced is not None and not torch.isfinite(reduced).all():
            raise QVDError("projection holds NaN or infinity: load the weights again, in bfloat16 or float32.")

    def __call__(self, difference: Tensor) -> float:
        """||D Pᵀ||² of `difference` D [T, C], float32 on the CPU."""
        if self._gram is not None:
            return max(0.0, ((difference @ self._gram) * difference).sum(dtype=torch.float64).item())
        if self._rows is not None:
            difference = difference @ self._rows.T
        return difference.square().sum(dtype=torch.float64).item()

    def of_channels(self, channels: int) -> Tensor:
        """||D Pᵀ||² of a unit D in each channel: float64 [C]."""
        if self._gram is not None:
            return self._gram.diagonal().double()
        if self._rows is not None:
            return self._rows.square().sum(dim=0, dtype=torch.float64)
        return torch.ones(channels, dtype=torch.float64, device="cpu")


def _gram_matrix(projection: StackedWeights, channels: int) -> Tensor:
    """PᵀP [C, C] of P [N, C] in float32, on the CPU; chunk by chunk on the device where P lies."""
    gram = torch.zeros(channels, channels, dtype=torch.float64, device="cpu")
    for chunk in _float_chunks(projection, channels):
        gram += (chunk.T @ chunk).cpu()
    return gram.float()


def _sketch(projection: StackedWeights, channels: int) -> Tensor:
    """CountSketch of P [N, C]: R [rows, C] with E||D Rᵀ||² = ||D Pᵀ||², on the CPU, in one pass over P. [O]

    Each row of P is added, with a random sign, to a random row of R.
    """
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(_SKETCH_ROWS, (projection.rows,), generator=generator, device="cpu")
    sign = torch.randint(2, (projection.rows, 1), generator=generator, device="cpu").float() * 2 - 1
    sketch = torch.zeros(_SKETCH_ROWS, channels, dtype=torch.float32, device="cpu")
    done = 0
    for chunk in _float_chunks(projection, channels):
        sketch = sketch.to(chunk.device)  # weights mostly lie on one device
        part = slice(done, done + len(chunk))
        sketch.index_add_(0, target[part].to(chunk.device), chunk * sign[part].to(chunk.device))
        done += len(chunk)
    return sketch.cpu()


def _float_chunks(projection: StackedWeights, channels: int) -> Iterator[Tensor]:
    """The rows of P [N, C] in float32, a bounded number at a time."""
    rows = max(1, _CHUNK_ELEMENTS // channels)
    for weight in projection.weights:
        _check_projection(weight, channels)
        for start in range(0, len(weight), rows):
            yield weight[start : start + rows].detach().float()


def _check_projection(weight: Tensor, channels: int) -> None:
    if weight.dim() != 2 or weight.shape[1] != channels or len(weight) == 0:
        raise QVDError(
            f"projection has shape {tuple(weight.shape)}, expected [N, {channels}]: "
            "stack the weights of the layers that read these features."
        )


def _share(mask: Tensor) -> float:
    return mask.double().mean().item() if mask.numel() else 0.0


def _as_matrix(E: Tensor) -> Tensor:
    """`E` in float64, or a QVDError where it is no finite, non-empty matrix."""
    if E.dim() != 2 or E.numel() == 0:
        raise QVDError(f"temporal features must be a non-empty matrix [T, C], got shape {tuple(E.shape)}.")
    if not torch.isfinite(E).all():
        raise QVDError("temporal features hold NaN or infinity: compute them in float32.")
    return E.double()


def _check_same_shape(E: Tensor, Eq: Tensor) -> None:
    if E.shape != Eq.shape:
        raise QVDError(f"features {tuple(E.shape)} and quantized features {tuple(Eq.shape)} must have one shape.")
