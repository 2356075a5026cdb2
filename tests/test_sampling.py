"""The random stream: known answers, the reference, and whether the numbers are normal.

Every seed is fixed, so a run either always passes or never. The limits are 5 standard errors (one
false alarm in 1.7 million), 5.5 where thousands of statistics are compared at once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from cases import assert_within, noise_bound
from torch import Tensor

import fastvae
from fastvae import reference

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32, 10 rounds
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = [0, 1, 0xFFFFFFFF, 1 << 32, 0x123456789ABCDEF0, 2**63 - 2]
known_answers = pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)


@pytest.fixture(params=SEEDS, ids=hex)
def seed(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def noise(seed: int, *size: int, num_samples: int = 1, sample_offset: int = 0) -> Tensor:
    """[K, *size], float32, from the kernel."""
    key = torch.tensor([seed], dtype=torch.int64)
    eps: Tensor = torch.ops.fastvae.noise.default(key, list(size), num_samples, sample_offset)
    return eps


def assert_is_the_reference(ours: Tensor, seed: int, index: Tensor) -> None:
    bound = noise_bound(reference.radius_at(seed, index))
    assert_within(ours, reference.noise_at(seed, index), bound, what="noise")


# --------------------------------------------------------------------------------- known answers


@known_answers
def test_philox_known_answers_reference(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    assert reference.philox(counter, key) == words
    as_tensors = reference.philox([torch.tensor([c]) for c in counter], key)
    assert [int(w) for w in as_tensors] == words


@known_answers
def test_philox_known_answers_kernel(
    native: None, counter: list[int], key: list[int], words: list[int]
) -> None:
    from fastvae import _C

    assert list(_C.philox(counter, key)) == words


def test_philox_kernel_against_the_reference_on_random_counters(native: None) -> None:
    from fastvae import _C

    words = np.random.default_rng(5).integers(0, 2**32, (200, 6)).tolist()
    for row in words:
        assert list(_C.philox(row[:4], row[4:])) == reference.philox(row[:4], row[4:])


# ------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize(
    ("size", "num_samples", "offset"),
    [
        ((1,), 1, 0),
        ((7,), 3, 0),
        ((3, 1), 1, 63),
        ((5, 13), 1, 0),
        ((5, 13), 4, 3),
        ((2, 64), 1, 1),
        ((3, 65), 2, 1),
        ((9, 4, 3, 5), 2, 11),
        ((3, 100_001), 1, 2),
        ((5, 17), 1, 2**31),
        ((5, 17), 3, 2**40 + 1),
        ((0, 17), 3, 0),
        ((4, 0), 2, 0),
    ],
    ids=str,
)
def test_noise_is_the_reference(
    native: None, seed: int, size: tuple[int, ...], num_samples: int, offset: int
) -> None:
    ours = noise(seed, *size, num_samples=num_samples, sample_offset=offset)
    assert ours.dtype == torch.float32 and ours.shape == (num_samples, *size)
    assert_is_the_reference(ours, seed, reference.noise_index(size, num_samples, offset))


@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("offset", [0, 2**37 + 5])
def test_rsample_draws_that_noise(num_samples: int | None, offset: int, backend: str) -> None:
    zeros = torch.zeros(6, 4, 5)
    torch.manual_seed(12)
    seed = int(torch.ops.fastvae.seed.default(zeros))
    torch.manual_seed(12)
    z = fastvae.rsample(
        zeros, zeros, num_samples=num_samples, sample_offset=offset, backend=backend
    )
    index = reference.noise_index((6, 4, 5), num_samples or 1, offset)
    assert_is_the_reference(z if num_samples else z.unsqueeze(0), seed, index)
    if backend == "cpp":
        eps = noise(seed, 6, 4, 5, num_samples=num_samples or 1, sample_offset=offset)
        assert torch.equal(z, eps if num_samples else eps[0])


@pytest.mark.parametrize("power", [31, 32, 34, 36, 38, 42])
def test_indices_beyond_32_bits(native: None, seed: int, power: int) -> None:
    """Rows of 64 around element 2^power; the counter passes 2^32 at element 2^34. A kernel that
    drops the high word repeats what it drew 2^32 (or 2^34) elements before."""
    around = noise(seed, 64, 64, sample_offset=2**power // 64 - 32)
    index = reference.noise_index((64, 64), 1, 2**power // 64 - 32)
    assert index.min() < 2**power < index.max()
    assert_is_the_reference(around, seed, index)
    start = noise(seed, 64, 64)
    later = noise(seed, 64, 64, sample_offset=2**power // 64)
    assert not (start == later).any()


def test_seed_comes_from_the_generator(native: None) -> None:
    like = torch.zeros(1)
    torch.manual_seed(3)
    first, second = (int(torch.ops.fastvae.seed.default(like)) for _ in range(2))
    torch.manual_seed(3)
    assert int(torch.ops.fastvae.seed.default(like)) == first != second
    generator = torch.Generator().manual_seed(3)
    assert int(torch.ops.fastvae.seed.default(like, generator)) == first
    assert int(torch.ops.fastvae.seed.default(like, generator)) == second
    many = [int(torch.ops.fastvae.seed.default(like)) for _ in range(200)]
    for shift in (0, 32):  # both halves of the key vary: 200 of 2^32 collide once in 200 000 runs
        assert len({seed >> shift & ONES for seed in many}) == 200


# ------------------------------------------------------------------------------------ statistics


def moment_error(power: int, count: int) -> float:
    """Standard error of the mean of z^power over count normals."""

    def moment(p: int) -> int:  # E z^p = (p - 1)!!
        return 0 if p % 2 else math.prod(range(1, p, 2))

    return math.sqrt((moment(2 * power) - moment(power) ** 2) / count)


def test_moments_to_the_sixth(native: None, seed: int) -> None:
    eps = noise(seed, 2**14, 256).double()
    for power, expected in enumerate([0, 1, 0, 3, 0, 15], start=1):
        error = moment_error(power, eps.numel())
        got = float((eps**power).mean())
        assert abs(got - expected) < 5 * error, f"moment {power}: {got}, error {error:.2g}"


def test_kolmogorov_smirnov(native: None, seed: int) -> None:
    eps = noise(seed, 2**12, 256).numpy().ravel()
    assert scipy.stats.kstest(eps, "norm").pvalue > 1e-4
    for lane in range(4):  # the four normals of a counter, each by itself
        quarter = eps.reshape(-1, 4, 16)[:, lane].ravel()
        assert scipy.stats.kstest(quarter, "norm").pvalue > 1e-4


def test_kolmogorov_smirnov_across_seeds(native: None) -> None:
    """The first number of each of 20000 neighbouring seeds: a weak key schedule shows here."""
    eps = torch.cat([noise(s, 1, 16).view(-1) for s in range(20_000)]).view(-1, 16)
    for column in range(16):
        assert scipy.stats.kstest(eps[:, column].numpy(), "norm").pvalue > 1e-5
    correlation = np.corrcoef(eps.numpy().T)
    off = np.abs(correlation[np.triu_indices(16, 1)]) * math.sqrt(20_000)
    assert off.max() < 5
    neighbours = (eps[1:] * eps[:-1]).double().mean() * math.sqrt(eps.numel())
    assert neighbours.abs() < 5


def assert_uncorrelated(a: Tensor, b: Tensor, what: str) -> None:
    """Also their squares and absolute values: the two normals of a pair share a radius."""
    count = a.numel()
    a, b = a.double().flatten(), b.double().flatten()
    for name, f in (("z", lambda t: t), ("z^2", lambda t: t**2), ("|z|", torch.abs)):
        pair = torch.stack([f(a), f(b)])
        score = float(torch.corrcoef(pair)[0, 1]) * math.sqrt(count)
        assert abs(score) < 5.5, f"{what}: {name} correlates by {score:.1f} standard errors"


def test_lanes_are_uncorrelated(native: None, seed: int) -> None:
    """All 2016 pairs within the block of 64 that one vector loop makes."""
    eps = noise(seed, 2**15, 64)[0].double()
    for values in (eps, eps**2, eps.abs()):
        correlation = torch.corrcoef(values.T) - torch.eye(64)
        assert float(correlation.abs().max()) * math.sqrt(len(eps)) < 5.5


def test_rows_samples_and_seeds_are_uncorrelated(native: None, seed: int) -> None:
    eps = noise(seed, 2049, 1024)[0]
    for lag in (1, 2, 4, 16, 1024):
        assert_uncorrelated(eps[lag:], eps[:-lag], f"rows {lag} apart")
    for shift in (1, 15, 16, 17, 32, 48, 64, 128):
        assert_uncorrelated(eps[:, shift:], eps[:, :-shift], f"elements {shift} apart")
    several = noise(seed, 1024, 1024, num_samples=2)
    assert_uncorrelated(several[0], several[1], "samples k = 0 and 1")
    for change in (1, 2, 1 << 31, 1 << 32, 1 << 62):
        assert_uncorrelated(noise(seed ^ change, 2049, 1024), eps, f"seeds {change:#x} apart")


def test_angles_and_radii(native: None, seed: int) -> None:
    """A pair's r^2 / 2 is exponential and its angle is uniform and independent of it."""
    pairs = noise(seed, 2**13, 2, 2, 16)[0].double().movedim(2, 0).flatten(1)
    radius, angle = pairs.pow(2).sum(0) / 2, torch.atan2(pairs[1], pairs[0])
    assert scipy.stats.kstest(radius.numpy(), "expon").pvalue > 1e-4
    uniform = scipy.stats.uniform(-math.pi, 2 * math.pi)
    assert scipy.stats.kstest(angle.numpy(), uniform.cdf).pvalue > 1e-4
    assert_uncorrelated(radius, angle, "radius and angle")
    assert_uncorrelated(radius, (4 * angle).cos(), "radius and 4 x angle")


# ------------------------------------------------------------------------------------------- tail


def test_the_reach_of_the_map() -> None:
    smallest, largest = torch.tensor([0]), torch.tensor([ONES])
    reach, zero = reference.box_muller(smallest, smallest)
    assert abs(float(reach) - math.sqrt(64 * math.log(2))) < 1e-14  # 6.66 sigma
    assert float(zero) == 0
    least, _ = reference.box_muller(largest, smallest)
    assert 0 < float(least) < 3e-5


def test_tail_counts_and_atoms(native: None) -> None:
    """2^27 pairs. A u of only 24 bits has its smallest values 2^-24 apart, so that beyond r = 5.5
    (29 values of u there) radii repeat, and beyond 5.77 there's nothing; here u is 31 bits deep,
    and each extreme is checked against the reference by its own index."""
    rows, chunks, found = 2**16, 64, []
    totals = torch.zeros(4, dtype=torch.int64)
    cuts = [3.0, 4.0, 5.0, 5.68]
    for chunk in range(chunks):
        eps = noise(99, rows, 64, sample_offset=chunk * rows)[0]
        pairs = eps.view(rows, 2, 2, 16)
        radius = pairs.square().sum(2).sqrt()
        totals += torch.tensor([int((radius > cut).sum()) for cut in cuts])
        row, pair, lane = (radius > cuts[-1]).nonzero(as_tuple=True)
        for r, p, j in zip(row.tolist(), pair.tolist(), lane.tolist(), strict=True):
            index = torch.tensor([(chunk * rows + r) * 64 + 32 * p + j + 16 * i for i in (0, 1)])
            assert_is_the_reference(pairs[r, p, :, j], 99, index)
            found.append(float(radius[r, p, j]))
    count = rows * chunks * 32
    for cut, total in zip(cuts, totals.tolist(), strict=True):
        expected = count * math.exp(-(cut**2) / 2)
        assert abs(total - expected) < 5 * math.sqrt(expected), f"beyond {cut}: {total}"
    assert len(found) == len(set(found)) and len(found) >= 5
    assert max(found) > 5.78
