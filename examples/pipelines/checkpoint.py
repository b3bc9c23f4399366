"""Style spaces for a pretrained backbone: examples/pipelines/checkpoint.py --data CLASS_FOLDERS --weights FILE"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2

from ssd_addon import EquivarianceLoss, JointEntropyLoss, StructuredViews, StyleHeads, recipe
from ssd_addon.metrics import embed, parameter_matrix


def accuracy(features, labels, steps=200):
    """Accuracy of a linear probe on the other images, after fitting it to every second one."""
    x = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    torch.manual_seed(0)
    probe = nn.Linear(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(probe(x[::2]), labels[::2]).backward()
        optimizer.step()
    return (probe(x[1::2]).argmax(1) == labels[1::2]).float().mean().item()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", required=True)
    p.add_argument("--weights", help="a state dict of resnet18 (default: an untrained network)")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--batch-size", type=int, default=256)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--workers", type=int, default=8)
    args = p.parse_args(argv)

    scaled = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    data = ImageFolder(args.data, v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *scaled]))
    loading = {"batch_size": min(args.batch_size, len(data)), "num_workers": args.workers}
    backbone = resnet18()
    if args.weights:
        backbone.load_state_dict(torch.load(args.weights, weights_only=True))

    r = recipe("color_spatial", size=args.size)
    views = StructuredViews(**r.views)
    model = StyleHeads(backbone, r.spaces, hidden=(512,)).freeze()
    criterion, equivariance = JointEntropyLoss(**r.loss), EquivarianceLoss(r.spaces, views, **r.equivariance)
    model.on_sphere = criterion.on_sphere
    trained = [p for p in (*model.parameters(), *equivariance.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(args.epochs):
        for x, _ in DataLoader(data, shuffle=True, drop_last=True, **loading):
            batch = views(x)
            z = model(batch)
            loss = criterion(z) + equivariance(z, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features = embed(model, (views.plain(x) for x, _ in DataLoader(data, **loading)), on_sphere=False)

    scores = {name: accuracy(each, torch.tensor(data.targets)) for name, each in features.items()}
    print(scores)
    images, _ = next(iter(DataLoader(data, **loading)))
    print(parameter_matrix(model, views, images, draws=4, backbone=True))
    return scores


if __name__ == "__main__":
    main()
