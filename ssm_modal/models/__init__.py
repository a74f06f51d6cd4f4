"""Models: an embedding or tokenizer, a backbone and a head, joined; and the registry of named ones."""

from ssm_modal.models import builders, image_builders, published  # register the named models
from ssm_modal.models.base import Model, ModelConfig
from ssm_modal.models.causal_lm import CausalLM, CausalLMConfig
from ssm_modal.models.classifier import ClassifierState, SequenceClassifier, SequenceClassifierConfig
from ssm_modal.models.masked_lm import MaskedLM, MaskedLMConfig
from ssm_modal.models.memory import ModelMemory, memory_table, model_memory
from ssm_modal.models.registry import create_model, list_models, model_config, register_model
from ssm_modal.models.sequence_cnn import SequenceCNN, SequenceCNNConfig
from ssm_modal.models.vision import VisionMambaConfig
from ssm_modal.models.waveform_cnn import WaveformCNN, WaveformCNNConfig

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "ClassifierState",
    "MaskedLM",
    "MaskedLMConfig",
    "Model",
    "ModelConfig",
    "ModelMemory",
    "SequenceCNN",
    "SequenceCNNConfig",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "VisionMambaConfig",
    "WaveformCNN",
    "WaveformCNNConfig",
    "builders",
    "create_model",
    "image_builders",
    "list_models",
    "memory_table",
    "model_config",
    "model_memory",
    "published",
    "register_model",
]
