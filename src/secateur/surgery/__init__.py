"""Surgery: remove units, reversibly (`mask`) or finally (`slice`), and prove that both mean the same."""

from secateur.surgery.expressible import Expressible, expressible
from secateur.surgery.masking import mask
from secateur.surgery.padding import pad
from secateur.surgery.proof import Proof, prove
from secateur.surgery.selection import select
from secateur.surgery.slicing import slice
from secateur.surgery.unpadding import unpad

__all__ = ["Expressible", "Proof", "expressible", "mask", "pad", "prove", "select", "slice", "unpad"]
