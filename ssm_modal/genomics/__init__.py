"""Language models of DNA at work: variant scores, in-silico mutagenesis, embeddings and tracks."""

from __future__ import annotations

from ssm_modal.genomics.embedding import EmbeddingConfig, embed
from ssm_modal.genomics.likelihood_track import likelihood_track
from ssm_modal.genomics.log_probs import LogProbs, Query
from ssm_modal.genomics.mutagenesis import Mutations, mutate_region
from ssm_modal.genomics.places import Place, place_of, whole_record
from ssm_modal.genomics.streaming import HiddenStates, StreamConfig
from ssm_modal.genomics.variant_scores import VariantScorer

__all__ = [
    "EmbeddingConfig",
    "HiddenStates",
    "LogProbs",
    "Mutations",
    "Place",
    "Query",
    "StreamConfig",
    "VariantScorer",
    "embed",
    "likelihood_track",
    "mutate_region",
    "place_of",
    "whole_record",
]
