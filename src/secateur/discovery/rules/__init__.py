"""What each aten operator teaches about the axes of its operands, one concept per file.

A rule has the signature `(trace, func, args, kwargs, out)`, reads its operands' axes with `trace.dims`, ties them with
`unify`, `partition` and `factorise`, and says with `trace.set` what the results are made of. Element-wise operators
need no rule.
"""

from secateur.discovery.rules import (
    attention,
    choice,
    complex_numbers,
    contraction,
    convolution,
    counting,
    creation,
    diagonal,
    elementwise,
    layout,
    lookup,
    norm,
    opaque,
    padding,
    pieces,
    reduction,
    scan,
    softmax,
    write,
)

__all__ = [
    "attention",
    "choice",
    "complex_numbers",
    "contraction",
    "convolution",
    "counting",
    "creation",
    "diagonal",
    "elementwise",
    "layout",
    "lookup",
    "norm",
    "opaque",
    "padding",
    "pieces",
    "reduction",
    "scan",
    "softmax",
    "write",
]
