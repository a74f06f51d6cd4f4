"""Readers and writers of files. Import what you need from its module.

Nothing here needs an extra before files of its field are read or written: soundfile, torchaudio and
Biopython are imported then.
"""

from __future__ import annotations

from ssm_modal.io.atomic import atomic_write
from ssm_modal.io.audio import AudioError, AudioFile, audio_info, check_audio, read_audio
from ssm_modal.io.cache import cache_folder
from ssm_modal.io.fasta import NucleotideRecord, iter_fasta, read_fasta
from ssm_modal.io.genbank import iter_genbank, read_genbank
from ssm_modal.io.genome import GENOME_SUFFIXES, Genome, GenomeRecord, iter_records, open_genome
from ssm_modal.io.ids import IdCorpus, IdSplit, id_dtype, load_ids, open_corpus, write_corpus
from ssm_modal.io.intervals import Feature, read_bed, read_features
from ssm_modal.io.labelled_sequences import LabelledSequence, class_names, read_labelled_sequences
from ssm_modal.io.manifests import ManifestError, read_manifest
from ssm_modal.io.nucleotides import GenomeError, LetterError, letters_of, reverse_complement, text_of
from ssm_modal.io.recordings import (
    Clip,
    LeftOut,
    Reading,
    Recording,
    assign_splits,
    find_recordings,
    open_recordings,
)
from ssm_modal.io.regions import Region, parse_region
from ssm_modal.io.speech_presets import free_spoken_digits, speech_commands
from ssm_modal.io.text import TextFileError, expand_path, iter_text, read_text, text_files
from ssm_modal.io.wav import write_wav

__all__ = [
    "GENOME_SUFFIXES",
    "AudioError",
    "AudioFile",
    "Clip",
    "Feature",
    "Genome",
    "GenomeError",
    "GenomeRecord",
    "IdCorpus",
    "IdSplit",
    "LabelledSequence",
    "LeftOut",
    "LetterError",
    "ManifestError",
    "NucleotideRecord",
    "Reading",
    "Recording",
    "Region",
    "TextFileError",
    "assign_splits",
    "atomic_write",
    "audio_info",
    "cache_folder",
    "check_audio",
    "class_names",
    "expand_path",
    "find_recordings",
    "free_spoken_digits",
    "id_dtype",
    "iter_fasta",
    "iter_genbank",
    "iter_records",
    "iter_text",
    "letters_of",
    "load_ids",
    "open_corpus",
    "open_genome",
    "open_recordings",
    "parse_region",
    "read_audio",
    "read_bed",
    "read_fasta",
    "read_features",
    "read_genbank",
    "read_labelled_sequences",
    "read_manifest",
    "read_text",
    "reverse_complement",
    "speech_commands",
    "text_files",
    "text_of",
    "write_corpus",
    "write_wav",
]
