"""The depth of each parameter in a network, for learning rates that fall towards the input."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def layer_depths(model: nn.Module, ranges: Collection[int] = ()) -> dict[int, int]:
    """The layer, counted from 0, to which each parameter belongs, by the parameter's id.

    The network is taken apart in the order in which its modules are defined. Sequential, ModuleList and ModuleDict are
    taken apart, and so is a module with more than half of all parameters, such as a transformer's encoder. Every other
    module is one layer: a convolution, an MBConv, a transformer's block, Swin's stage. A normalisation belongs to the layer
    before it, and so does a parameter of a module that is taken apart.

    Args:
        model: the network.
        ranges: ids of the quantizers' ranges. They belong to the layer that they are in, or else to the one before.
    """
    sizes = {module: sum(parameter.numel() for parameter in module.parameters()) for module in model.modules()}
    depths: dict[int, int] = {}
    layers = -1

    def visit(module: nn.Module) -> None:
        nonlocal layers
        opened = type(module) in _CONTAINERS or 2 * sizes[module] > sizes[model]
        if opened and any(sizes[child] for child in module.children()):
            for parameter in module.parameters(recurse=False):
                depths.setdefault(id(parameter), max(layers, 0))
            for child in module.children():
                visit(child)
        elif sizes[module]:
            new = [parameter for parameter in module.parameters() if id(parameter) not in depths]
            if not (isinstance(module, _NORMS) or all(id(parameter) in ranges for parameter in new)):
                layers += 1
            depths.update({id(parameter): max(layers, 0) for parameter in new})

    visit(model)
    return depths
