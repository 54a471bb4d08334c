"""`torch.utils`"""

from . import deterministic, dlpack

__all__ = ["deterministic", "dlpack"]
