"""Evaluation of language models: log-likelihoods of texts of any length, streamed."""

from __future__ import annotations

from ssm_modal.evaluation.likelihood import Scored, TextScore, score_rows, score_text

__all__ = ["Scored", "TextScore", "score_rows", "score_text"]
