"""Classes from the features of a pretrained backbone: before/checkpoint.py --data CLASS_FOLDERS --weights FILE"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2


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
    p.add_argument("--workers", type=int, default=8)
    args = p.parse_args(argv)

    scaled = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    data = ImageFolder(args.data, v2.Compose([v2.Resize(args.size), v2.CenterCrop(args.size), *scaled]))
    loading = {"batch_size": min(args.batch_size, len(data)), "num_workers": args.workers}
    backbone = resnet18()
    if args.weights:
        backbone.load_state_dict(torch.load(args.weights))

    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    backbone.fc = nn.Identity()
    backbone.eval()
    with torch.no_grad():
        features = torch.cat([backbone(normalize(x)) for x, _ in DataLoader(data, **loading)])

    scores = {"backbone": accuracy(features, torch.tensor(data.targets))}
    print(scores)
    return scores


if __name__ == "__main__":
    main()
