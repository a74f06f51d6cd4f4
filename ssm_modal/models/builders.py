"""The registered models that are none of the published ones: numbers only.

`mamba_lm`, `s4d_lm` and `transformer_lm` are small models to be sized by overrides. They compare at the same
d_model and about the same parameters: a Mamba layer and an S4D layer have about 6 d_model^2 weights, a
Transformer block (attention 4 d_model^2, MLP 8 d_model^2) twice that, so it takes half the n_layers.
"""

from __future__ import annotations

from dataclasses import replace

from ssm_modal.backbone import BackboneConfig, SashimiConfig, WaveNetConfig
from ssm_modal.layers import (
    AttentionConfig,
    BidirectionalConfig,
    FilterbankConfig,
    IdsConfig,
    MambaConfig,
    MLPConfig,
    S4DConfig,
    StrandsConfig,
    StridedWaveformConfig,
    WaveformConfig,
)
from ssm_modal.models.causal_lm import CausalLMConfig
from ssm_modal.models.classifier import SequenceClassifierConfig
from ssm_modal.models.masked_lm import MaskedLMConfig
from ssm_modal.models.registry import register_model
from ssm_modal.models.sequence_cnn import SequenceCNNConfig
from ssm_modal.models.waveform_cnn import WaveformCNNConfig
from ssm_modal.tokenizers.dna import NucleotideTokenizer

_NUCLEOTIDES = NucleotideTokenizer().vocab_size


@register_model
def mamba_lm() -> CausalLMConfig:
    """Mamba over bytes, to be sized by overrides."""
    return CausalLMConfig(
        vocab_size=256, backbone=BackboneConfig(d_model=256, n_layers=8, mixer=MambaConfig())
    )


@register_model
def s4d_lm() -> CausalLMConfig:
    """The time-invariant baseline, of mamba_lm's size at the same d_model and n_layers."""
    return CausalLMConfig(vocab_size=256, backbone=BackboneConfig(d_model=256, n_layers=8, mixer=S4DConfig()))


@register_model
def transformer_lm() -> CausalLMConfig:
    """The attention baseline with rotary positions, of mamba_lm's size at half its n_layers."""
    return CausalLMConfig(
        vocab_size=256,
        backbone=BackboneConfig(d_model=256, n_layers=4, mixer=AttentionConfig(n_heads=4), mlp=MLPConfig()),
    )


@register_model
def hybrid_lm() -> CausalLMConfig:
    """Seven Mamba layers to one of attention, without positions: the Mamba layers know the order."""
    return CausalLMConfig(
        vocab_size=256,
        backbone=BackboneConfig(
            d_model=256,
            n_layers=8,
            mixer=(*(MambaConfig(),) * 4, AttentionConfig(n_heads=4, rope_theta=None), *(MambaConfig(),) * 3),
        ),
    )


def _waveforms(backbone: SashimiConfig | WaveNetConfig) -> CausalLMConfig:
    """Over mu-law ids, begin and end and the begin ids of ten classes; the embedding as large as what the
    stages add to it."""
    return CausalLMConfig(vocab_size=268, backbone=backbone, tie_embeddings=False, embedding_std=1.0)


@register_model
def sashimi_lm() -> CausalLMConfig:
    """Waveforms: S4D at every sample, Mamba at every 4th and 16th."""
    return _waveforms(SashimiConfig(d_model=80, n_layers=(4, 2), stage_expand=1.0))


@register_model
def sashimi_lm_s4d() -> CausalLMConfig:
    """sashimi_lm with S4D in every stage, of its size."""
    inner = S4DConfig(expand=2, d_state=16)
    return _waveforms(
        SashimiConfig(d_model=80, n_layers=(4, 2), stage_expand=1.0, mixer=(S4DConfig(expand=1), inner))
    )


@register_model
def wavenet_lm() -> CausalLMConfig:
    """The convolutional baseline for waveforms, of sashimi_lm's size at 7 / 10 of its d_model."""
    return _waveforms(WaveNetConfig(d_model=56, d_skip=64))


@register_model
def audio_classifier() -> SequenceClassifierConfig:
    """Ten classes of waveforms at 8 or 16 kHz: a strided front end under Mamba in both directions."""
    return SequenceClassifierConfig(
        n_classes=10,
        input=StridedWaveformConfig(kernel=64, stride=16, scale=8.0),
        backbone=BackboneConfig(
            d_model=64, n_layers=4, mixer=MambaConfig(), bidirectional=BidirectionalConfig()
        ),
    )


@register_model
def audio_classifier_causal() -> SequenceClassifierConfig:
    """audio_classifier in one direction, with a state to stream by: few layers and wide, since the time of a
    short chunk goes by the layers."""
    return SequenceClassifierConfig(
        n_classes=10,
        input=StridedWaveformConfig(kernel=64, stride=16, scale=8.0),
        backbone=BackboneConfig(d_model=88, n_layers=4, mixer=MambaConfig()),
    )


@register_model
def audio_classifier_s4d() -> SequenceClassifierConfig:
    """S4D in both directions over every sample of the waveform: its time step can be rescaled."""
    return SequenceClassifierConfig(
        n_classes=10,
        input=WaveformConfig(scale=8.0),
        backbone=BackboneConfig(
            d_model=64, n_layers=4, mixer=S4DConfig(), bidirectional=BidirectionalConfig()
        ),
    )


@register_model
def audio_classifier_filterbank() -> SequenceClassifierConfig:
    """Ten classes of waveforms at 8 kHz: log energies of learned filters every 10 ms, relative to each
    recording's loudness and spectrum, under Mamba in both directions."""
    return SequenceClassifierConfig(
        n_classes=10,
        input=FilterbankConfig(normalize="mean", floor=1e-4),
        backbone=BackboneConfig(
            d_model=64, n_layers=4, mixer=MambaConfig(), dropout=0.1, bidirectional=BidirectionalConfig()
        ),
        head_dropout=0.2,
    )


@register_model
def waveform_cnn() -> WaveformCNNConfig:
    """Ten classes of waveforms at 8 kHz: the plain convolutional baseline."""
    return WaveformCNNConfig(n_classes=10)


@register_model
def ids_classifier() -> SequenceClassifierConfig:
    """Two classes of byte sequences, Mamba in both directions, to be sized by overrides."""
    return SequenceClassifierConfig(
        n_classes=2,
        input=IdsConfig(vocab_size=256),
        backbone=BackboneConfig(
            d_model=128, n_layers=4, mixer=MambaConfig(), bidirectional=BidirectionalConfig()
        ),
    )


@register_model
def dna_lm() -> CausalLMConfig:
    """Causal Mamba over nucleotides, to be sized by overrides."""
    return CausalLMConfig(
        vocab_size=_NUCLEOTIDES, backbone=BackboneConfig(d_model=256, n_layers=8, mixer=MambaConfig())
    )


def _bimamba(d_model: int, n_layers: int) -> BackboneConfig:
    """BiMamba of arXiv 2403.03234: two directions added under one pair of projections."""
    return BackboneConfig(
        d_model=d_model,
        n_layers=n_layers,
        mixer=MambaConfig(),
        bidirectional=BidirectionalConfig(combine="sum", share="projections"),
    )


@register_model
def caduceus_ps() -> MaskedLMConfig:
    """Caduceus-PS over nucleotides, of the size of the published model for windows of 131,072 bases
    (kuleshov-group/caduceus: d_model 256, which counts one strand, 16 layers)."""
    return MaskedLMConfig(vocab_size=_NUCLEOTIDES, backbone=_bimamba(256, 16), strands=StrandsConfig())


@register_model
def caduceus_ph() -> MaskedLMConfig:
    """Caduceus-Ph: caduceus_ps without its second strand, to be trained on windows of either strand
    (`reverse_complement: true` of the data)."""
    return MaskedLMConfig(vocab_size=_NUCLEOTIDES, backbone=_bimamba(256, 16))


def _dna_classifier(strands: StrandsConfig | None = None) -> SequenceClassifierConfig:
    return SequenceClassifierConfig(
        n_classes=2,
        input=IdsConfig(vocab_size=_NUCLEOTIDES),
        backbone=_bimamba(128, 4),
        strands=strands,
    )


@register_model
def caduceus_ps_classifier() -> SequenceClassifierConfig:
    """Two classes of DNA, the same for both strands: the backbone of caduceus_ps, four layers."""
    return _dna_classifier(StrandsConfig())


@register_model
def caduceus_ph_classifier() -> SequenceClassifierConfig:
    """Two classes of DNA, trained on one strand at a time and evaluated on both, averaged."""
    return replace(_dna_classifier(StrandsConfig()), strand_use="evaluation")


@register_model
def dna_classifier() -> SequenceClassifierConfig:
    """Two classes of DNA read on the strand given alone: the plain model beside caduceus_ps_classifier."""
    return _dna_classifier()


@register_model
def dna_classifier_s4d() -> SequenceClassifierConfig:
    """The time-invariant baseline, of dna_classifier's size at the same d_model and n_layers."""
    return _dna_classifier().with_overrides({"backbone.mixer": S4DConfig()})


@register_model
def dna_cnn() -> SequenceCNNConfig:
    """Two classes of DNA by three convolutions: the baseline."""
    return SequenceCNNConfig(n_classes=2, vocab_size=_NUCLEOTIDES)
