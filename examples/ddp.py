"""A VAE on several processes: DistributedDataParallel around the model and its loss.

    torchrun --nproc_per_node=2 examples/ddp.py

Rank 0 prints the loss per epoch, in nats per digit. --batch-size counts the digits of all ranks.
With --same-noise a digit's noise is a function of the epoch and of its index in the dataset, and
training the same, to rounding, on any number of ranks that divides the batch.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import fastvae
from fastvae.likelihoods import Gaussian


class Digits(Dataset[tuple[int, Tensor]]):
    """Yields each image with its index in the dataset."""

    def __init__(self) -> None:
        self.images = torch.tensor(load_digits().data, dtype=torch.float32) / 16

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.images[index]


class VAE(nn.Module):
    """Returns the loss, as DistributedDataParallel averages the gradients of what it wraps: the
    learned noise level of the pixels is a parameter of the criterion."""

    def __init__(self, latents: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.GELU(), nn.Linear(hidden, 64))
        self.criterion = fastvae.ELBOLoss(Gaussian(logvar=nn.Parameter(torch.tensor(-2.0))))

    def forward(self, x: Tensor, index: Tensor | None = None, seed: int | None = None) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z, kl = fastvae.rsample_kl(mu, logvar, seed=seed, sample_index=index)
        loss: Tensor = self.criterion(self.decoder(z), x, kl=kl)
        return loss


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--same-noise", action="store_true", help="on any number of ranks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")

    torch.manual_seed(args.seed)  # the same weights on every rank …
    model = DistributedDataParallel(VAE().to(device))
    torch.manual_seed(args.seed + rank)  # … and other noise
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    data = Digits()
    sampler = DistributedSampler[int](data, seed=args.seed, drop_last=True)
    loader = DataLoader(data, args.batch_size // ranks, sampler=sampler, drop_last=True)
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=device)
        for index, x in loader:
            if args.same_noise:
                loss = model(x.to(device), index.to(device), seed=args.seed * 2**32 + epoch)
            else:
                loss = model(x.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"{epoch:4d}  loss {total.item() / (ranks * len(loader)):9.5f}", flush=True)
    dist.barrier()  # gloo's thread lets go of `total` now, not when the interpreter is gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
