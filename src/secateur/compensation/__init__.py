"""Compensation: what reads the units that stay takes over from those that go. No training, no gradients.

| symbol | here |
| --- | --- |
| W, matrix that reads units [out, in]; K, R its columns that stay and that go | `Reader` |
| x, input of the module in the model as it is cut before it; y, in the dense model | one pass over calibration text |
| z = (1 - a) x + a y, a = 0, 1/2 or 1 | target `current`, `halfway`, `dense` |
| H = sum x x', C = sum z x' over tokens [in, in] | `Moments` |
| W_K <- W_K + (W C_K - W_K H_KK) (H_KK + lambda d I)^-1, d the mean of diag H_KK | `ridge` |
| b <- b + W_R mean(x_R) (FLAP, An et al. 2023, arXiv:2312.11983, Eq. 5) | `bias`, where the module has one |

With a = 0 it is the least-squares answer to "put out what you put out before", damped: with a large lambda the columns
that stay are left as they are, so that the worst choice is no compensation. (Shrinking towards W_K instead of zero is
ours.) With a = 1 it is "put out what the dense model would", errors of earlier layers repaired, too; but what cannot be
repaired shrinks the results, layer after layer, which costs more than it brings where much is cut. Halfway was better
than both (Arai and Ichikawa 2025, arXiv:2504.09629, have the same a for matrices that are rounded).

Modules are taken in the order in which the model calls them. Of each matrix lambda is the one of `STRENGTHS` whose
answer on three quarters of the sequences errs least on the last quarter; the answer is then computed on all of them.
Sums are in float32 or better, equations are solved in float64. Those of one module are held at a time.

`compensated` solves in the model itself, columns that go being zero (`masked`). That is not exact for the hidden
dimension, since norms go on averaging over the zeros. Where a plan cuts it, `compensate_sliced` solves the cut model's
matrices, beside the dense model (`sliced`); `cuts_hidden` tells which of the two a cut takes. Where many cuts are to be
tried, matrices are solved ahead (`Database`).
"""

from secateur.compensation.database import Database
from secateur.compensation.masked import compensated
from secateur.compensation.passes import AT_ONCE, EVERY
from secateur.compensation.sliced import compensate_sliced, cuts_hidden
from secateur.compensation.solving import ALONE, STRENGTHS, Compensated, Compensation, Moments, Reader

__all__ = [
    "ALONE", "AT_ONCE", "EVERY", "STRENGTHS", "Compensated", "Compensation", "Database", "Moments", "Reader",
    "compensate_sliced", "compensated", "cuts_hidden",
]  # fmt: skip
