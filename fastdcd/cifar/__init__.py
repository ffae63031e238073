"""Networks for small images, in the forms of the distillation literature.

Layers are in the order of the code published with CRD (Tian et al. 2020), which that literature trains
with: its checkpoints load by order (teacher.checkpoint_by_order).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from fastdcd.cifar import mobilenet, resnet, shufflenet, vgg, wide_resnet

BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    **resnet.BUILDERS,
    **wide_resnet.BUILDERS,
    **vgg.BUILDERS,
    **mobilenet.BUILDERS,
    **shufflenet.BUILDERS,
}


def build(name: str, classes: int) -> nn.Module:
    """A network by name, whatever its capitals. Raises ValueError for an unknown one, with the nearest."""
    by_lower = {each.lower(): builder for each, builder in BUILDERS.items()}
    if name.lower() not in by_lower:
        near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(BUILDERS)}"
        raise ValueError(f"model: cifar has no {name!r}; {hint}")
    return by_lower[name.lower()](classes)
