"""Robust aggregation: p workers' gradients into one update (family `aggregate`).

Every rule that commutes with rotations needs the rows only twice: once for the p x p Gram matrix
K = G G^T, once for the combination c^T G. In between lies a tiny problem on K. So the family is
three ops and what is made of them:

    gram, pairwise_sqdist   rows (p, d) -> (p, p)      one streaming read
    flag_coeffs             (p, p) -> c (p,)           no pass over d
    combine                 rows (p, d), c -> (d,)     one streaming read, one write
    flag_aggregate          combine(grads, flag_coeffs(gram(grads)))

Rules that sort each coordinate's values by themselves need the rows once:

    coordinate_rules        rows (p, d) -> (d,) per rule   one streaming read, one write per rule
    coordinate_median, trimmed_mean, meamed, phocas        one rule of it
    bulyan_rows             (p, p) -> which rows (p,)      no pass over d
    bulyan                  pairwise_sqdist, bulyan_rows, coordinate_rules on the rows chosen

`grads` is a tensor (p, ...), a list of p tensors, or p lists of parameters' gradients; lists are
read where they lie. Shapes: p workers, d coordinates, S parameters ("segments") per worker.
"""

from dashpot.aggregate.bulyan import BULYAN, bulyan
from dashpot.aggregate.bulyan_rows import BULYAN_ROWS, bulyan_rows
from dashpot.aggregate.combine import COMBINE, combine
from dashpot.aggregate.coordinate_median import COORDINATE_MEDIAN, coordinate_median
from dashpot.aggregate.coordinate_rules import COORDINATE_RULES, coordinate_rules
from dashpot.aggregate.flag_aggregate import FLAG_AGGREGATE, flag_aggregate
from dashpot.aggregate.flag_coeffs import FLAG_COEFFS, FlagInfo, flag_coeffs
from dashpot.aggregate.gram import GRAM, gram
from dashpot.aggregate.meamed import MEAMED, meamed
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST, pairwise_sqdist
from dashpot.aggregate.phocas import PHOCAS, phocas
from dashpot.aggregate.trimmed_mean import TRIMMED_MEAN, trimmed_mean

__all__ = [
    "FlagInfo", "bulyan", "bulyan_rows", "combine", "coordinate_median", "coordinate_rules",
    "flag_aggregate", "flag_coeffs", "gram", "meamed", "pairwise_sqdist", "phocas", "trimmed_mean",
]  # fmt: skip

OPS = (
    GRAM, PAIRWISE_SQDIST, COMBINE, FLAG_COEFFS, FLAG_AGGREGATE, COORDINATE_RULES,
    COORDINATE_MEDIAN, TRIMMED_MEAN, MEAMED, PHOCAS, BULYAN_ROWS, BULYAN,
)  # fmt: skip
