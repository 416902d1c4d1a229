"""Robust aggregation: p workers' gradients into one update (family `aggregate`).

Every rule that commutes with rotations needs the rows only twice: once for the p x p Gram matrix
K = G G^T or the squared distances D, once for the combination c^T G. In between lies a tiny problem
on them. So the family is a few ops and what is made of them:

    gram, pairwise_sqdist   rows (p, d) -> (p, p)      one streaming read
    <rule>_coeffs           (p, p) -> c (p,)           no pass over d
    combine                 rows (p, d), c -> (d,)     one streaming read, one write
    <rule>                  combine(grads, <rule>_coeffs(pairwise_sqdist(grads)))
    robust_aggregate        any rule, after pre-stages: NNM, Bucketing, Clipping

Rules that sort each coordinate's values by themselves need the rows once:

    coordinate_rules        rows (p, d) -> (d,) per rule   one streaming read, one write per rule
    coordinate_median, trimmed_mean, meamed, phocas        one rule of it
    bulyan_rows             (p, p) -> which rows (p,)      no pass over d
    bulyan                  pairwise_sqdist, bulyan_rows, coordinate_rules on the rows chosen

`grads` is a tensor (p, ...), a list of p tensors, or p lists of parameters' gradients; lists are
read where they lie. Shapes: p workers, d coordinates, S parameters ("segments") per worker.
"""

from dashpot.aggregate.bucketing import Bucketing, bucketing
from dashpot.aggregate.bulyan import BULYAN, bulyan
from dashpot.aggregate.bulyan_rows import BULYAN_ROWS, bulyan_rows
from dashpot.aggregate.centered_clipping import CENTERED_CLIPPING, centered_clipping
from dashpot.aggregate.centered_clipping_coeffs import (
    CENTERED_CLIPPING_COEFFS,
    centered_clipping_coeffs,
)
from dashpot.aggregate.clipping import AdaptiveClipping, Clipping
from dashpot.aggregate.combine import COMBINE, combine
from dashpot.aggregate.coordinate_median import COORDINATE_MEDIAN, coordinate_median
from dashpot.aggregate.coordinate_rules import COORDINATE_RULES, coordinate_rules
from dashpot.aggregate.flag_aggregate import FLAG_AGGREGATE, flag_aggregate
from dashpot.aggregate.flag_coeffs import FLAG_COEFFS, FlagInfo, flag_coeffs
from dashpot.aggregate.geometric_median import GEOMETRIC_MEDIAN, geometric_median
from dashpot.aggregate.geometric_median_coeffs import (
    GEOMETRIC_MEDIAN_COEFFS,
    geometric_median_coeffs,
)
from dashpot.aggregate.gram import GRAM, gram
from dashpot.aggregate.krum import KRUM, krum
from dashpot.aggregate.krum_coeffs import KRUM_COEFFS, krum_coeffs
from dashpot.aggregate.mda import MDA_CHAIN, mda
from dashpot.aggregate.mda_coeffs import MDA_COEFFS, mda_coeffs
from dashpot.aggregate.meamed import MEAMED, meamed
from dashpot.aggregate.mean import MEAN, mean
from dashpot.aggregate.monna import MONNA, monna
from dashpot.aggregate.multi_krum import MULTI_KRUM, multi_krum
from dashpot.aggregate.nnm import NNM, NNM_CHAIN, nnm
from dashpot.aggregate.nnm_coeffs import NNM_COEFFS, nnm_coeffs
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST, pairwise_sqdist
from dashpot.aggregate.phocas import PHOCAS, phocas
from dashpot.aggregate.robust_aggregate import (
    ROBUST_AGGREGATE,
    RobustAggregator,
    robust_aggregate,
)
from dashpot.aggregate.trimmed_mean import TRIMMED_MEAN, trimmed_mean

__all__ = [
    "NNM", "AdaptiveClipping", "Bucketing", "Clipping", "FlagInfo", "RobustAggregator",
    "bucketing", "bulyan", "bulyan_rows", "centered_clipping", "centered_clipping_coeffs",
    "combine", "coordinate_median", "coordinate_rules", "flag_aggregate", "flag_coeffs",
    "geometric_median", "geometric_median_coeffs", "gram", "krum", "krum_coeffs", "mda",
    "mda_coeffs", "meamed", "mean", "monna", "multi_krum", "nnm", "nnm_coeffs", "pairwise_sqdist",
    "phocas", "robust_aggregate", "trimmed_mean",
]  # fmt: skip

OPS = (
    GRAM, PAIRWISE_SQDIST, COMBINE, FLAG_COEFFS, KRUM_COEFFS, MDA_COEFFS, NNM_COEFFS,
    GEOMETRIC_MEDIAN_COEFFS, CENTERED_CLIPPING_COEFFS, FLAG_AGGREGATE, KRUM, MULTI_KRUM, MDA_CHAIN,
    MONNA, GEOMETRIC_MEDIAN, CENTERED_CLIPPING, MEAN, NNM_CHAIN, ROBUST_AGGREGATE, COORDINATE_RULES,
    COORDINATE_MEDIAN, TRIMMED_MEAN, MEAMED, PHOCAS, BULYAN_ROWS, BULYAN,
)  # fmt: skip
