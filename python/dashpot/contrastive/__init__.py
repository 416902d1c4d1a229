"""Contrastive losses: tiles of a similarity matrix that is never stored (family `contrastive`).

Rows are normalised once; a sweep over pairs of blocks forms a tile of cosines, takes what it needs
from it (a sum of exponentials per row, the nearest neighbours) and forgets it. The backward sweep
forms the tile again, turns it into weights, and multiplies by the rows of the other side.

Shapes: B queries, N keys, D coordinates.
"""

from dashpot.contrastive.info_nce import INFO_NCE, info_nce

__all__ = ["info_nce"]

OPS = (INFO_NCE,)
