"""State dicts as they were when the weights of heads were stacked over the spaces of equal hidden widths."""

import torch


def stacked(model, prefix=""):
    """The state dict of a `StyleHeads` or `ProjectionHeads` in that form; `prefix` goes before every key."""
    state = dict(model.state_dict())
    out = {k: t for k, t in state.items() if not k.startswith("projections.")}
    for i, widths in enumerate(dict.fromkeys(model.hidden.values())):
        heads = [f"projections.{model.projections.key(n)}" for n in model.spaces if model.hidden[n] == widths]
        depth = len(widths)

        def each(place, heads=heads):
            return [state[f"{head}.{place}"] for head in heads if f"{head}.{place}" in state]

        for k in range(depth):
            weights, biases = each(f"linears.{k}.weight"), each(f"linears.{k}.bias")
            if k == 0:
                out[f"stacks.{i}.first.weight"] = torch.cat(weights)
            else:
                out[f"stacks.{i}.products.{k - 1}"] = torch.stack(weights)
            if biases:
                out[f"stacks.{i}.{f'biases.{k - 1}_bias' if k else 'first.bias'}"] = torch.cat(biases)
            for name in ("weight", "bias", "running_mean", "running_var"):
                if parts := each(f"norms.{k}.{name}"):
                    out[f"stacks.{i}.norms.{k}.{name}"] = torch.cat(parts)
            if counts := each(f"norms.{k}.num_batches_tracked"):
                out[f"stacks.{i}.norms.{k}.num_batches_tracked"] = counts[0]
        for j, head in enumerate(heads):
            for name in ("weight", "bias"):
                out[f"stacks.{i}.last.{j}.{name}"] = state[f"{head}.linears.{depth}.{name}"]
    return {prefix + k: t for k, t in out.items()}
