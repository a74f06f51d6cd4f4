"""Readers and writers of files. Import what you need from its module.

Nothing here needs an extra before audio is read or written: soundfile and torchaudio are imported then.
"""

from __future__ import annotations

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.audio import AudioError, AudioFile, audio_info, check_audio, read_audio
from ssm_modal.io.ids import IdCorpus, IdSplit, id_dtype, load_ids, open_corpus, write_corpus
from ssm_modal.io.manifests import ManifestError, read_manifest
from ssm_modal.io.recordings import (
    Clip,
    LeftOut,
    Reading,
    Recording,
    assign_splits,
    find_recordings,
    open_recordings,
)
from ssm_modal.io.speech_presets import free_spoken_digits, speech_commands
from ssm_modal.io.text import TextFileError, expand_path, iter_text, read_text, text_files
from ssm_modal.io.wav import write_wav

__all__ = [
    "AudioError",
    "AudioFile",
    "Clip",
    "IdCorpus",
    "IdSplit",
    "LeftOut",
    "ManifestError",
    "Reading",
    "Recording",
    "TextFileError",
    "assign_splits",
    "atomic_write",
    "audio_info",
    "check_audio",
    "expand_path",
    "find_recordings",
    "free_spoken_digits",
    "id_dtype",
    "iter_text",
    "load_ids",
    "open_corpus",
    "open_recordings",
    "read_audio",
    "read_manifest",
    "read_text",
    "speech_commands",
    "text_files",
    "write_corpus",
    "write_wav",
]
