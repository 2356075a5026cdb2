"""The extension: build facts, the contract between languages, set-up with something missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import FAMILIES

import fastvae
import fastvae._C as _C
from fastvae import reference
from fastvae.likelihoods import registry

ROOT = Path(__file__).parent.parent
ISAS = _C.build_info()["isas"].split(",")
USABLE = ISAS[: ISAS.index(_C.build_info()["isa"]) + 1]


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_build_info() -> None:
    info = _C.build_info()
    assert info["version"] == fastvae.__version__
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["isa"] in ISAS
    assert re.fullmatch(r"(.*[Cc]lang )?\d+\.\d+.*", info["compiler"])  # g++ gives its number alone


def test_every_source_is_compiled() -> None:
    folder = ROOT / "csrc"
    listed = [
        name
        for unity in folder.glob("unity_*.cpp")
        for name in (unity.name, *re.findall(r'#include "(.+\.cpp)"', unity.read_text()))
    ]
    alone = ["cpu/dispatch.cpp", "cpu/kernels.cpp"]
    assert sorted([*listed, *alone]) == sorted(
        str(p.relative_to(folder)) for p in folder.glob("**/*.cpp")
    )


def test_cpp_and_python_have_the_same_families() -> None:
    assert sorted(_C.likelihoods()) == sorted(registry)
    for name, make in registry.items():
        likelihood = make()
        assert likelihood.family == name
        # One option too many is refused: the two languages agree on their number.
        x, recon = likelihood.sample_inputs((2, 3))
        recon = likelihood.params(recon, x)
        torch.ops.fastvae.log_likelihood(x, recon, name, likelihood.options)
        with pytest.raises(ValueError, match="options"):
            torch.ops.fastvae.log_likelihood(x, recon, name, (*likelihood.options, 1.0))


def test_every_family_has_an_oracle_and_awkward_inputs() -> None:
    assert set(reference.ORACLES) == set(registry)
    assert {family.name for family in FAMILIES.values()} == set(registry)


NUMERICS = ("likelihood", "likelihood_gradients", "latent", "kl_divergence", "sampling")
NUMERICS += ("vec", "extremes")
CHOSEN = {
    "every_formula": "cpp and (contiguous or extremes)",
    "everything": "not eager and not triton",
}


@pytest.mark.parametrize(
    "chosen", ["every_formula", pytest.param("everything", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("isa", USABLE[:-1])  # the last is the one that this run uses
def test_every_instruction_set_passes_the_numerics(isa: str, chosen: str) -> None:
    code = "import fastvae._C as c; print(c.build_info()['isa'])"
    assert python(code, ATEN_CPU_CAPABILITY=isa.lower()) == isa
    env = {**os.environ, "ATEN_CPU_CAPABILITY": isa.lower()}
    files = [f"tests/test_{n}.py" for n in NUMERICS]
    options = ["--products", "all", "-k", CHOSEN[chosen]]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qxp", "no:cacheprovider", *options, *files],
        env=env, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif("AVX512" not in USABLE, reason="needs AVX-512 to compare with AVX2")
def test_draws_are_the_same_bits_on_avx2_and_avx512() -> None:
    code = (
        "import torch, fastvae, hashlib; s = torch.tensor([42]);"
        "n = torch.ops.fastvae.noise(s, [300, 1000], 1, 0);"
        "print(hashlib.sha256(n.numpy().tobytes()).hexdigest())"
    )
    digests = {python(code, ATEN_CPU_CAPABILITY=isa) for isa in ("avx2", "avx512")}
    assert len(digests) == 1


def test_without_the_extension_the_eager_backend_serves() -> None:
    code = (
        "import sys; sys.modules['fastvae._C'] = None\n"  # as where it isn't built
        "import torch, fastvae; b = fastvae.backends(); assert not b['cpp'].available;"
        "assert 'not built' in b['cpp'].detail; assert b['eager'].available;"
        "mu = torch.zeros(2, 3, requires_grad=True);"
        "z, kl = fastvae.rsample_kl(mu, mu); x = torch.rand(2, 3);"
        "fastvae.ELBOLoss()(z, x, kl=kl).backward(); assert mu.grad is not None\n"
        "try: fastvae.rsample(mu, mu, backend='cpp')\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend 'cpp' is not available: the C++ extension is not built")
    assert done.stderr == ""


def test_import_is_silent_and_does_not_need_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['triton'] = None; import fastvae"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_instruction_sets_share_no_weak_symbols() -> None:
    """A weak symbol outside the namespaces could be the AVX-512 copy on a machine without it."""
    objects = [p for p in ROOT.glob("build/temp*/*/**/kernels.o") if "AVX" in str(p)]
    if not objects:
        pytest.skip("built elsewhere: no object files beside the sources")
    for path in objects:
        isa = next(part for part in path.parts if part.startswith("AVX"))
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True).stdout
        weak = [line[17:] for line in listing.splitlines() if re.search(r" [WVu] ", line[16:20])]
        # Data, and clang's two calls that end the process.
        harmless = ("DW.ref", "lazy_init_num_threads", "__clang_call_terminate")
        leaked = [s for s in weak if isa not in s and not any(name in s for name in harmless)]
        assert not leaked, leaked
