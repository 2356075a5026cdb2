"""Programs that leave torch: none of our operators in them, and equal values in their runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FAMILIES, Family
from torch import Tensor, nn

import fastvae

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),  # torch's own
]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


class Scored(nn.Module):
    """An encoder's output, and a loss and its parts."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.criterion = fastvae.ELBOLoss(family.make(), beta=0.5, reduction="none")

    def forward(self, x: Tensor, mu: Tensor, logvar: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        kl = fastvae.kl_divergence(mu, logvar, prior=(0.5, mu.detach()))
        loss = self.criterion(params if len(params) > 1 else params[0], x, kl=kl)
        return loss, kl, fastvae.kl_divergence(mu, logvar, mask=mu > 0)


class Drawn(nn.Module):
    def forward(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        return *fastvae.rsample_kl(mu, logvar), fastvae.rsample(mu, logvar, num_samples=3)


def program(module: nn.Module, given: tuple[Tensor, ...]) -> Any:
    table = torch.export.default_decompositions()
    table.update(fastvae.export.decompositions())
    exported = torch.export.export(module.eval(), given).run_decompositions(table)
    ours = [n for n in exported.graph.nodes if "fastvae" in str(n.target)]
    assert not ours
    return exported


def in_onnx(exported: Any, given: tuple[Tensor, ...], folder: Path) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    path = folder / "model.onnx"
    torch.onnx.export(exported, (), path, verbose=False)
    session = runtime.InferenceSession(path)
    inputs = zip(session.get_inputs(), given, strict=True)
    return [torch.from_numpy(t) for t in session.run(None, {i.name: t.numpy() for i, t in inputs})]


def scored(family: Family) -> tuple[Scored, tuple[Tensor, ...]]:
    x, *params = family.inputs((4, 6), torch.float32)
    return Scored(family), (x, torch.randn(4, 3), torch.randn(4, 3), *params)


@families
def test_an_exported_program_has_equal_values(family: Family) -> None:
    module, given = scored(family)
    with torch.no_grad():
        torch.testing.assert_close(program(module, given).module()(*given), module(*given))


@pytest.mark.filterwarnings("ignore")  # torch's exporter's own
@families
def test_onnx_has_equal_values(family: Family, tmp_path: Path) -> None:
    if family.name.startswith(("poisson", "negative", "zero")):
        pytest.skip("ONNX has no ln Γ")
    module, given = scored(family)
    with torch.no_grad():
        torch.testing.assert_close(
            in_onnx(program(module, given), given, tmp_path), list(module(*given))
        )


@pytest.mark.filterwarnings("ignore")
def test_onnx_draws_noise_of_its_own(tmp_path: Path) -> None:
    mu, logvar = torch.randn(4000, 5), torch.randn(4000, 5)
    z, kl, several = in_onnx(program(Drawn(), (mu, logvar)), (mu, logvar), tmp_path)
    torch.testing.assert_close(kl, fastvae.kl_divergence(mu, logvar))
    eps = (torch.stack([z, *several]) - mu) / (logvar / 2).exp()
    assert eps.shape == (4, 4000, 5)
    assert eps.mean().abs() < 0.02 and (eps.std() - 1).abs() < 0.02
    correlation = torch.corrcoef(eps.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.05


def test_gradients_are_refused() -> None:
    row_forward = fastvae.export.decompositions()[torch.ops.fastvae.row_forward.default]
    x, logits = torch.rand(2, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match="a forward pass alone"):
        row_forward(x, [logits], "bernoulli", [], None, None, 1.0, [False, True])
