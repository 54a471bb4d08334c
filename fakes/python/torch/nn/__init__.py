"""`torch.nn`: Module with its hooks, and the few layers that a stand-in model is made of."""

from . import functional, init, modules, parameter
from .modules import (
    GELU,
    Embedding,
    Identity,
    LayerNorm,
    Linear,
    Module,
    ModuleDict,
    ModuleList,
    ReLU,
    Sequential,
    SiLU,
)
from .parameter import Parameter

__all__ = [
    "GELU",
    "Embedding",
    "Identity",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "ReLU",
    "Sequential",
    "SiLU",
    "functional",
    "init",
    "modules",
    "parameter",
]
