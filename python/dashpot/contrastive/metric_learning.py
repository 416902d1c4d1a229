"""Losses under pytorch-metric-learning's names, with its arguments: one import to swap.

    from dashpot.contrastive.metric_learning import NTXentLoss, SupConLoss

Covered is what the fused losses compute; anything else is an error that says so. `TCM` is there
under its own name: `ThresholdConsistentMarginLoss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dashpot.contrastive._pairs import check_labelled, check_number
from dashpot.contrastive.info_nce import info_nce
from dashpot.contrastive.nt_xent import nt_xent
from dashpot.contrastive.supcon_loss import supcon_loss

__all__ = ["NTXentLoss", "SupConLoss"]


class _PairLoss(nn.Module):
    """The constructor and the checks of that library's pair losses."""

    def __init__(self, temperature: float, *, distance=None, reducer=None,
                 embedding_regularizer=None, embedding_reg_weight: float = 1,
                 collect_stats: bool | None = None):  # fmt: skip
        super().__init__()
        self.temperature = check_number(temperature, "temperature")
        inverted = getattr(distance, "is_inverted", False) and getattr(distance, "power", 1) == 1
        if distance is not None and not (inverted and type(distance).__name__ ==
                                         "CosineSimilarity"):  # fmt: skip
            raise ValueError(
                f"distance: expected None or CosineSimilarity(), got {type(distance).__name__}"
            )
        for name, value in (
            ("reducer", reducer), ("embedding_regularizer", embedding_regularizer),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name}: expected None, got {type(value).__name__}")
        if collect_stats:
            raise ValueError(f"collect_stats: expected False, got {collect_stats!r}")

    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple=None,
        ref_emb: Tensor | None = None, ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """embeddings (B, D), labels (B,), ref_emb (N, D), ref_labels (N,) -> loss ()"""
        if indices_tuple is not None:
            raise ValueError(f"indices_tuple: expected None, got {type(indices_tuple).__name__}")
        labels, ref_labels = check_labelled(embeddings, labels, ref_emb, ref_labels, "ref_emb")
        return self._loss(embeddings, labels, ref_emb, ref_labels)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class NTXentLoss(_PairLoss):
    """NT-Xent: without references every label stands on exactly two rows (the two views of one
    sample), else on exactly one row of the references. Each call looks at the labels on the host.
    """

    def __init__(self, temperature: float = 0.07, **options):
        super().__init__(temperature, **options)

    def _loss(self, embeddings, labels, ref_emb, ref_labels):
        if ref_emb is None:
            ordered, order = torch.sort(labels, stable=True)
            twice = (
                len(labels) % 2 == 0
                and torch.equal(ordered[::2], ordered[1::2])
                and not bool((ordered[1:-1:2] == ordered[2::2]).any())
            )
            if not twice:
                raise ValueError("labels: expected every label on exactly two rows")
            first, second = embeddings[order[::2]], embeddings[order[1::2]]
            return nt_xent(first, second, temperature=self.temperature)
        ordered, order = torch.sort(ref_labels, stable=True)
        at = torch.searchsorted(ordered, labels)
        beyond = torch.searchsorted(ordered, labels, right=True)
        if not bool((beyond - at == 1).all()):
            raise ValueError("ref_labels: expected every label on exactly one row")
        return info_nce(embeddings, ref_emb, positives=order[at], temperature=self.temperature)


class SupConLoss(_PairLoss):
    """Supervised contrastive loss over the rows with a positive; 0 if all rows have one label."""

    def __init__(self, temperature: float = 0.1, **options):
        super().__init__(temperature, **options)

    def _loss(self, embeddings, labels, ref_emb, ref_labels):
        if ref_emb is not None:
            raise ValueError("ref_emb: expected None, got a tensor")
        loss = supcon_loss(embeddings, labels, temperature=self.temperature, normalize=True)
        return loss * (labels != labels[:1]).any()
