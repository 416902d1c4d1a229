"""Robust aggregation: p workers' gradients into one update (family `aggregate`).

Every rule that commutes with rotations needs the rows only twice: once for the p x p Gram matrix
K = G G^T, once for the combination c^T G. In between lies a tiny problem on K. So the family is
three ops and what is made of them:

    gram, pairwise_sqdist   rows (p, d) -> (p, p)      one streaming read
    flag_coeffs             (p, p) -> c (p,)           no pass over d
    combine                 rows (p, d), c -> (d,)     one streaming read, one write
    flag_aggregate          combine(grads, flag_coeffs(gram(grads)))

`grads` is a tensor (p, ...), a list of p tensors, or p lists of parameters' gradients; lists are
read where they lie. Shapes: p workers, d coordinates, S parameters ("segments") per worker.
"""

from dashpot.aggregate.combine import COMBINE, combine
from dashpot.aggregate.flag_aggregate import FLAG_AGGREGATE, flag_aggregate
from dashpot.aggregate.flag_coeffs import FLAG_COEFFS, FlagInfo, flag_coeffs
from dashpot.aggregate.gram import GRAM, gram
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST, pairwise_sqdist

__all__ = ["FlagInfo", "combine", "flag_aggregate", "flag_coeffs", "gram", "pairwise_sqdist"]

OPS = (GRAM, PAIRWISE_SQDIST, COMBINE, FLAG_COEFFS, FLAG_AGGREGATE)
